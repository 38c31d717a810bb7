"""The evidence of an evaluation: complete, the same every time, and beside the champion."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest

from braintumor.artifacts import read_json
from braintumor.registry.server import connected

ROOT = Path(__file__).parents[2]
NAME = "brain-tumor-phantoms"
PICTURES = {"bootstrap_samples": 200, "ood_probes": 8, "robustness_images": 8, "gallery_images": 2}
EXPECTED = ("better", "worse", "no difference found")
BEFORE = ("resolve", "validate", "split", "train")


def evidence_of(folder: Path) -> dict[str, Any]:
    """The evidence in an evaluation's folder."""
    return read_json(folder / "evidence.json", "braintumor evaluate")


@pytest.fixture(name="trained")
def trained_project(
    store: Path, tmp_path: Path, braintumor: Any, dataset_maker: Callable[..., Path], params_writer: Callable[..., Path]
) -> Path:
    """A project up to the training: its head alone, on few images; 160 test images."""
    dataset_maker(tmp_path / "data", n_test=40)
    params_writer(tmp_path / "params.yaml", train={"epochs": 0, "head_epochs": 4})
    for step in BEFORE:
        ended = braintumor(step)
        assert ended.code == 0, ended.err
    return tmp_path


def test_evaluation_is_complete_repeatable_and_kept_by_mlflow(
    trained: Path, braintumor: Any, params_writer: Callable[..., Path]
) -> None:
    params_writer(trained / "params.yaml", train={"epochs": 0, "head_epochs": 4}, evaluate=PICTURES)
    ended = braintumor("evaluate")
    assert ended.code == 0, ended.err
    build = trained / "build"
    first = {path: path.read_bytes() for path in (build / "evaluation").rglob("*") if path.is_file()}
    evidence = evidence_of(build / "evaluation")
    schema = json.loads((ROOT / "docs/evidence.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(evidence)
    assert evidence["comparison"]["verdict"] == "no champion"
    assert set(evidence["ood"]["kinds"]) == set(pd.read_csv(build / "evaluation/ood_scores.csv")["kind"])

    # 'is like the training' holds for most of the calibration rows, as the threshold promises.
    calibration = pd.read_csv(build / "model/calibration.csv")
    split = pd.read_csv(build / "split/splits.csv")
    assert set(calibration["path"]) == set(split.loc[split["split"] == "calibration", "path"])
    assert (calibration["ood_score"] <= 1).mean() >= 0.9

    page = (build / "evaluation/report.html").read_text()
    assert len(page) < 5_000_000
    # What is encoded may hold any letters.
    bare = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]*", "", page)
    assert not re.search(r"https?://", bare)

    assert braintumor("evaluate").code == 0
    assert {path: path.read_bytes() for path in first} == first

    for harm in ("build/model/calibration.csv", "build/split/floors.csv", "build/validation/manifest.parquet"):
        file = trained / harm
        content = file.read_bytes()
        file.write_bytes(content.replace(b"glioma", b"notumor"))
        ended = braintumor("evaluate")
        assert ended.code == 2 and ended.err.startswith("Error: ") and "Traceback" not in ended.err
        file.write_bytes(content)
    assert {path: path.read_bytes() for path in first} == first

    assert braintumor("gate").code == 0
    assert braintumor("register").code == 0
    run_id = read_json(build / "registration/registration.json", "")["run_id"]
    with connected() as client:
        kept = {Path(file.path).name for file in client.list_artifacts(run_id, "evaluation")}
        figures = client.get_run(run_id).data.metrics
    assert {"metrics.json", "evidence.json", "report.html", "confusion_matrix.png"} <= kept
    # File names may tell who the patients are.
    assert not {"predictions.csv", "label_errors.csv", "curves"} & kept
    assert figures["test_ood_auroc"] == evidence["ood"]["auroc"]


def test_champion_is_scored_on_the_images_that_it_has_not_seen(
    trained: Path,
    braintumor: Any,
    params_writer: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    closed_port: int,
) -> None:
    for step in ("evaluate", "gate", "register"):
        assert braintumor(step).code == 0
    with connected() as client:
        client.set_registered_model_alias(NAME, "champion", "1")
    build = trained / "build"

    # Another split: some of what is tested now, the champion was trained on.
    params_writer(
        trained / "params.yaml",
        train={"epochs": 0, "head_epochs": 3, "seed": 5},
        split={"protocol": "grouped", "test_fraction": 0.7, "max_share_deviation": 1.0},
        evaluate=PICTURES | {"robustness_images": 0},
        privacy={"copy_images": "none", "hash_names": True},
    )
    for step in ("resolve", "split", "train", "evaluate"):
        ended = braintumor(step)
        assert ended.code == 0, ended.err
    tested = pd.read_csv(build / "evaluation/predictions.csv").set_index("path")
    seen = tested.index[tested.index.str.startswith("train/")]
    compared = evidence_of(build / "evaluation")["comparison"]
    assert (compared["champion"], compared["n_excluded"]) == ("1", len(seen))
    assert compared["n"] == len(tested) - len(seen)
    assert compared["verdict"] in EXPECTED
    unseen = tested.drop(seen)
    accuracy = (unseen["label"] == unseen["predicted"]).mean()
    assert compared["figures"]["accuracy"]["challenger"] == pytest.approx(accuracy)

    # Nothing of the images leaves the data set: neither pictures nor names.
    shown = (build / "evaluation/report.html").read_text() + (build / "evaluation/evidence.json").read_text()
    assert "data:image/jpeg" not in shown
    assert not [path for path in tested.index if Path(path).stem in shown]

    # Whether there is a better champion, nobody knows now.
    before = (build / "evaluation/metrics.json").read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    ended = braintumor("evaluate")
    assert ended.code == 5 and "Traceback" not in ended.err
    assert (build / "evaluation/metrics.json").read_bytes() == before
