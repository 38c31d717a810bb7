from pathlib import Path
from typing import Any

import pytest

from braintumor.artifacts import sha256_of_file, write_json
from braintumor.errors import UserError
from braintumor.summary import RunFiles, show_summary, summarise

DATA, SPLITS, MODEL, TEST = "a" * 32, "b" * 64, "c" * 64, "d" * 32


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """The outputs of a whole run."""
    write_json(tmp_path / "resolve/context.json", {"data_md5": DATA, "n_images": 881})
    findings = [{"name": "balance", "severity": "warning", "message": "m", "culprits": []}]
    write_json(tmp_path / "validation/findings.json", {"data_md5": DATA, "n_images": 881, "findings": findings})
    write_json(tmp_path / "validation/leakage.json", {"data_md5": DATA, "n_copies": 22, "leaked_share": 0.25})
    split = {
        "data_md5": DATA, "splits_sha256": SPLITS, "protocol": "official", "claim": "patient-disjoint",
        "sizes": {"train": 489, "val": 91, "calibration": 71, "test": 230}, "nearest_neighbour_accuracy": 0.278,
        "statistics_accuracy": 0.312, "test_md5": TEST,
    }  # fmt: skip
    write_json(tmp_path / "split/split.json", split)
    training = {
        "model_digest": MODEL, "splits_sha256": SPLITS, "epochs_run": 22, "seconds": 90.4, "best_epoch": 21,
        "best_val_accuracy": 0.989,
    }  # fmt: skip
    write_json(tmp_path / "model/training.json", training)
    metrics = {
        "model_digest": MODEL, "splits_sha256": SPLITS, "accuracy": 0.9783, "accuracy_interval": [0.953, 0.996],
        "confidence_level": 0.95, "n_test": 230, "n_groups": 132, "tumour_sensitivity": 0.99,
        "tumour_specificity": 0.97, "ece": 0.0214, "ood_auroc": 0.98765,
    }  # fmt: skip
    write_json(tmp_path / "evaluation/metrics.json", metrics)
    decide(tmp_path, passed=True)
    write_json(tmp_path / "gate/test_uses.json", {"test_md5": TEST, "earlier_decisions": 2})
    registration = {"model_digest": MODEL, "model_name": "densenet", "version": "3", "alias": "challenger"}
    write_json(tmp_path / "registration/registration.json", registration)
    return tmp_path


def decide(build: Path, passed: bool) -> None:
    check: dict[str, Any] = {"name": "min_accuracy", "passed": passed, "reason": "accuracy 0.9 is below 0.92"}
    digests = {"metrics_sha256": sha256_of_file(build / "evaluation/metrics.json")}
    write_json(build / "gate/decision.json", {"passed": passed, "checks": [check], "digests": digests})


def rows(build: Path) -> dict[str, str]:
    return dict(summarise(RunFiles.read(build)))


def test_whole_run_is_told_in_one_table(build: Path) -> None:
    told = rows(build)
    assert told["images checked"] == "881"
    assert told["findings"] == "0 critical, 1 warnings"
    assert told["copies"].startswith("22; 25.0% of the declared test images")
    assert told["split"] == "489 train, 91 val, 71 calibration, 230 test (official; patient-disjoint)"
    assert told["training"].startswith("22 epochs in 90 s, kept epoch 21")
    assert told["confidence"].startswith("calibration error 2.1%;") and told["confidence"].endswith("of 0.988")
    assert told["floors"].startswith("27.8% by the nearest neighbour, 31.2% by")
    assert told["test set"] == "used for 2 earlier decisions"
    assert told["test accuracy"].startswith("97.83%  (95% interval 95.3% to 99.6%, 230 images")
    assert told["gate"] == "passed, 1 checks"
    assert told["registered"] == "densenet version 3 (challenger)"


def test_uses_that_nobody_could_count_and_those_of_another_test_set_are_told_as_such(build: Path) -> None:
    write_json(build / "gate/test_uses.json", {"test_md5": TEST, "earlier_decisions": None})
    assert "not known" in rows(build)["test set"]
    write_json(build / "gate/test_uses.json", {"test_md5": "e" * 32, "earlier_decisions": 2})
    assert rows(build)["test set"].startswith("stale")


def test_new_data_make_everything_after_them_stale(build: Path) -> None:
    write_json(build / "resolve/context.json", {"data_md5": "d" * 32, "n_images": 900})
    told = rows(build)
    for what in ("images checked", "findings", "copies", "split"):
        assert told[what].startswith("stale"), what


def test_new_model_makes_the_old_evaluation_and_version_stale(build: Path) -> None:
    write_json(build / "model/training.json", {"model_digest": "e" * 64, "splits_sha256": SPLITS, "epochs_run": 1,
                                               "seconds": 1, "best_epoch": 1, "best_val_accuracy": 0.5})  # fmt: skip
    told = rows(build)
    assert told["test accuracy"].startswith("stale")
    assert told["registered"].startswith("stale")


def test_closed_gate_says_why_and_hides_the_version_before(build: Path) -> None:
    decide(build, passed=False)
    told = rows(build)
    assert told["gate"] == "NOT PASSED, 1 checks\naccuracy 0.9 is below 0.92"
    assert told["registered"].startswith("stale")


def test_decision_about_another_evaluation_is_stale(build: Path) -> None:
    (build / "evaluation/metrics.json").write_text((build / "evaluation/metrics.json").read_text() + "\n")
    assert rows(build)["gate"].startswith("stale")


def test_steps_that_have_not_run_are_told(build: Path) -> None:
    (build / "gate/decision.json").unlink()
    (build / "registration/registration.json").unlink()
    told = rows(build)
    assert (told["gate"], told["registered"]) == ("not run", "not run")


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no outputs"):
        RunFiles.read(tmp_path)


def test_table_ends_with_where_to_look_next(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(build)
    told = capsys.readouterr().out
    assert "make ui" in told
    assert "data_docs/index.html" in told
