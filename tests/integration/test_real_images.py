"""What is known of the public images, where they are at hand: ../shared/brain-tumor-mri."""

from collections import Counter
from pathlib import Path

import pytest

from braintumor.data.duplicates import measure_leakage
from braintumor.data.intake import import_dataset
from braintumor.data.manifest import Survey, survey
from braintumor.data.oddities import odd_kinds
from braintumor.data.splits import make_splits
from braintumor.params import load_params

ROOT = Path(__file__).parents[2]
IMAGES = ROOT.parent / "shared" / "brain-tumor-mri"
PARAMS = load_params(ROOT / "params/real-cpu.yaml")

pytestmark = pytest.mark.skipif(not IMAGES.is_dir(), reason="../shared/brain-tumor-mri is not here")


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    dataset = tmp_path_factory.mktemp("real") / "data"
    assert import_dataset(IMAGES, dataset).n_images == 6401
    return survey(dataset, 1, PARAMS.validation.copy_correlation)


def test_three_of_four_test_images_have_a_copy_in_training(surveyed: Survey) -> None:
    leakage = measure_leakage(surveyed.images)
    assert (leakage["leaked_test_images"], leakage["n_test"]) == (913, 1206)
    assert leakage["n_groups"] == 3213
    assert leakage["exact_copies"] == 399
    assert leakage["copies"]["across"] == {"groups": 649, "images": 2661}
    assert len(leakage["label_conflicts"]) == 4


def test_banners_frames_arrows_and_edge_filters_are_found(surveyed: Survey) -> None:
    kinds = Counter(kind for its in odd_kinds(surveyed.images, PARAMS.validation) for kind in its)
    assert kinds == {"coloured": 39, "banner": 32, "white_frame": 92, "arrows": 12, "edge_filtered": 185}


def test_the_official_split_is_free_of_copies_and_the_control_is_as_large(surveyed: Survey) -> None:
    made = {
        protocol: make_splits(surveyed.images, PARAMS.split.model_copy(update={"protocol": protocol}))
        for protocol in ("official", "control")
    }
    sizes = {protocol: splits.rows["split"].value_counts().to_dict() for protocol, splits in made.items()}
    assert sizes["official"] == sizes["control"] == {"train": 2640, "val": 405, "calibration": 402, "test": 1206}
    assert made["official"].leaked_share == 0
    assert made["control"].leaked_share == pytest.approx(0.647, abs=0.001)
    assert made["official"].claim == "copy-free, patients unknown"
