import socket

import numpy as np
import pytest
from numpy.typing import NDArray

from braintumor.model.probes import draw_probes

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def slices() -> Images:
    random = np.random.default_rng(3)
    rows, columns = np.mgrid[:32, :32]
    inside = np.hypot(rows - 18, columns - 15) < 12
    return (inside * random.integers(30, 200, (12, 32, 32))).astype(np.uint8)[..., None]


def test_every_kind_holds_as_many_images_as_asked_for_and_says_what_they_are(slices: Images) -> None:
    probes = draw_probes(slices, 10, seed=1)
    assert len(probes) >= 8
    for probe in probes.values():
        assert probe.shape == (10, 32, 32, 1)
        assert probe.dtype == np.uint8
        assert len(np.unique(probe.reshape(10, -1), axis=0)) == 10


def test_kinds_made_of_slices_are_no_more_than_there_are_slices(slices: Images) -> None:
    probes = draw_probes(slices[:3], 10, seed=1)
    assert len(probes["inverted"]) == 3
    assert len(probes["photographs"]) == 10


def test_same_seed_and_images_in_any_order_give_the_same_probes(slices: Images) -> None:
    one, same = draw_probes(slices, 6, seed=1), draw_probes(slices[::-1], 6, seed=1)
    for kind, probe in one.items():
        assert np.array_equal(probe, same[kind])
    other = draw_probes(slices, 6, seed=2)
    assert not np.array_equal(one["noise"], other["noise"])
    assert not np.array_equal(one["inverted"], other["inverted"])


def test_slices_come_turned_and_inverted(slices: Images) -> None:
    probes = draw_probes(slices, len(slices), seed=1)
    originals = {image.tobytes() for image in slices}
    upright = np.rot90(probes["turned by 180°"], 2, axes=(1, 2))
    assert {image.tobytes() for image in upright} == originals
    assert {(255 - image).tobytes() for image in probes["inverted"]} == originals
    for image in probes["turned by 90°"]:
        assert {np.rot90(image, turns).tobytes() for turns in (1, 3)} & originals


def test_texture_keeps_the_brightness_of_its_slice(slices: Images) -> None:
    textures = draw_probes(slices, len(slices), seed=1)["texture"]
    # Below black nothing can be shown, so they are a little brighter.
    assert slices.mean() <= textures.mean() < 1.5 * slices.mean()


def test_nothing_is_fetched(slices: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("probes went to the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    organs = draw_probes(slices, 5, seed=1)["other organs"]
    assert all(image.std() > 20 for image in organs)
