import numpy as np
import pytest
from numpy.typing import NDArray

from braintumor.data.slices import Refused, SliceRule, Volume, choose_slices, make_volume, show_slice
from braintumor.errors import UserError


def column(n_slices: int, tissue: range) -> NDArray[np.float32]:
    """A volume (x, y, z) with the same tissue in some of its slices."""
    voxels = np.zeros((16, 16, n_slices), np.float32)
    voxels[4:12, 4:12, tissue.start : tissue.stop] = 500 + np.arange(64).reshape(8, 8, 1)
    return voxels


def volume(voxels: NDArray[np.float32], axis: int = 2, lesion: NDArray[np.bool_] | None = None) -> Volume:
    return make_volume(voxels, (1.0, 1.0, 1.0), axis, (), lesion=lesion)


@pytest.mark.parametrize(
    ("n_slices", "share", "expected"),
    [
        (5, 0.6, [40, 52, 64, 76, 88]),
        (1, 0.6, [64]),
        (2, 0.5, [51, 76]),
        (3, 1.0, [30, 64, 97]),
        (500, 0.1, list(range(59, 69))),
    ],
)
def test_the_rule_takes_even_steps_through_the_middle_of_the_tissue(
    n_slices: int, share: float, expected: list[int]
) -> None:
    chosen = choose_slices(volume(column(120, range(14, 114))), SliceRule("acquired", n_slices, share))
    assert chosen == expected


@pytest.mark.parametrize("n_tissue", [1, 2, 3])
def test_a_volume_of_few_slices_gives_what_it_has(n_tissue: int) -> None:
    chosen = choose_slices(volume(column(9, range(4, 4 + n_tissue))), SliceRule())
    assert chosen
    assert set(chosen) <= set(range(4, 4 + n_tissue))


def test_nearly_empty_slices_are_never_taken() -> None:
    voxels = column(40, range(10, 20))
    voxels[4, 4, :] = 600
    assert set(choose_slices(volume(voxels), SliceRule(slices_per_volume=40, middle_share=1))) == set(range(10, 20))


def test_a_mask_takes_the_place_of_the_middle() -> None:
    lesion = np.zeros((16, 16, 40), bool)
    lesion[5:9, 5:9, 2:5] = True
    lesion[5, 5, 20] = True
    assert choose_slices(volume(column(40, range(40)), lesion=lesion), SliceRule()) == [2, 3, 4]


@pytest.mark.parametrize(("per_volume", "share"), [(0, 0.6), (5, 0.0), (5, 1.1), (5, float("nan"))])
def test_a_rule_that_takes_nothing_is_refused(per_volume: int, share: float) -> None:
    with pytest.raises(UserError):
        SliceRule(slices_per_volume=per_volume, middle_share=share)


def test_a_volume_without_contrast_is_refused() -> None:
    with pytest.raises(Refused, match="alike"):
        volume(np.ones((8, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("axis", "corner"),
    [(2, "the patient's right front"), (1, "the patient's right top"), (0, "the patient's front top")],
)
def test_the_upper_left_pixel_is_the_patients_right_front_or_top(axis: int, corner: str) -> None:
    voxels = np.random.default_rng(0).uniform(0, 100, (4, 5, 6)).astype(np.float32)
    voxels[-1, -1, -1] = 1000
    shown = show_slice(volume(voxels, axis), voxels.shape[axis] - 1)
    assert shown.argmax() == 0, corner
    assert shown.shape == {2: (5, 4), 1: (6, 4), 0: (6, 5)}[axis]


def test_long_voxels_are_stretched_to_squares() -> None:
    voxels = np.random.default_rng(0).uniform(0, 100, (10, 20, 6)).astype(np.float32)
    assert show_slice(make_volume(voxels, (1.0, 1.0, 4.0), 0, ()), 5).shape == (24, 20)
    assert show_slice(make_volume(voxels, (0.5, 1.0, 4.0), 2, ()), 3).shape == (40, 10)
    with pytest.raises(Refused, match="too uneven"):
        show_slice(make_volume(voxels, (1.0, 1.0, 40.0), 0, ()), 5)
