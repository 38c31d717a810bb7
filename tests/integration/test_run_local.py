"""The compiled pipeline in subprocesses: what runs on a cluster is what runs here, step by step."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities.model_registry import ModelVersion

from braintumor.artifacts import read_json
from braintumor.attempt_report import STEPS
from braintumor.registry.server import connected

NAME = "brain-tumor-phantoms"
RECIPE = {"head_epochs": 2, "epochs": 0}


def results(output: Path) -> dict[str, Path]:
    """The folders of the last run, by task."""
    last = max((folder for folder in output.iterdir() if folder.is_dir()), key=lambda folder: folder.stat().st_mtime)
    return {folder.name: folder for folder in last.iterdir() if folder.is_dir()}


def versions() -> list[ModelVersion]:
    with connected() as client:
        return list(client.search_model_versions(f"name = '{NAME}'"))


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("BRAINTUMOR_WEBHOOK", raising=False)
    yield


def test_pipeline_registers_then_finds_nothing_new_and_a_stricter_gate_refuses_the_same_metrics(
    store: Path,
    tmp_path: Path,
    braintumor: Any,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
) -> None:
    dataset_maker(tmp_path / "data")
    params_writer(tmp_path / "params.yaml", train=RECIPE)
    output = tmp_path / "build/pipeline"

    ended = braintumor("pipeline", "run-local")
    assert ended.code == 0, ended.err + ended.out
    assert "registered" in ended.out
    tasks = results(output)
    assert tasks.keys() == {*STEPS, "report"}
    assert "# Registered" in (tasks["report"] / "ending").read_text()
    first = read_json(tasks["evaluate"] / "evaluation/metrics.json", "")
    [version] = versions()
    assert version.tags["model_digest"] == first["model_digest"]
    with connected() as client:
        run = client.get_run(version.run_id)
    assert run.data.tags["outcome"] == "registered"
    assert {run.data.tags[f"step.{step}"] for step in STEPS} == {"done"}
    assert run.data.metrics["test_accuracy"] == first["accuracy"]

    again = braintumor("pipeline", "run-local")
    assert again.code == 0, again.err
    assert "nothing new" in again.out
    assert results(output).keys() == {"resolve", "report"}

    params_writer(tmp_path / "params.yaml", train=RECIPE, gate={"min_accuracy": {"value": 1.0, "required": True}})
    refused = braintumor("pipeline", "run-local")
    assert refused.code == 4
    assert "Error: " in refused.err and "accuracy" in refused.err
    tasks = results(output)
    assert tasks.keys() == {*STEPS, "report"} - {"register"}
    assert "The gate is closed" in (tasks["gate"] / "report").read_text()
    # Trained anew with the same seed: the same model, to the last digit.
    assert read_json(tasks["evaluate"] / "evaluation/metrics.json", "") == first
    assert len(versions()) == 1

    # The same commands by hand, as `dvc repro` types them.
    params_writer(tmp_path / "params.yaml", train=RECIPE)
    for step in STEPS:
        assert braintumor(step).code == 0
    assert read_json(tmp_path / "build/evaluation/metrics.json", "") == first
    assert len(versions()) == 1


def test_critical_finding_fails_the_run_in_validate_and_keeps_its_pages(
    store: Path,
    tmp_path: Path,
    braintumor: Any,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
) -> None:
    data = dataset_maker(tmp_path / "data", n_train=6, n_test=2)
    params_writer(tmp_path / "params.yaml", validate={"min_images_per_class": 50})
    ended = braintumor("pipeline", "run-local", "--dataset", data)
    assert ended.code == 2
    assert "failed in validate" in ended.err and "can't be trained on" in ended.err
    assert results(tmp_path / "build/pipeline").keys() == {"resolve", "validate", "report"}
    with connected() as client:
        [experiment] = [found for found in client.search_experiments() if found.name == "brain-tumor"]
        [run] = client.search_runs([experiment.experiment_id])
        pages = {file.path for file in client.list_artifacts(run.info.run_id, "failed/validate")}
    assert run.info.status == "FAILED"
    assert run.data.tags["outcome"] == "failed in validate"
    assert "failed/validate/index.html" in pages
    assert versions() == []


def test_shards_of_the_validation_give_the_manifest_that_one_task_gives(
    store: Path,
    tmp_path: Path,
    braintumor: Any,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset_maker(tmp_path / "data", n_train=6, n_test=2)
    params = params_writer(tmp_path / "params.yaml")
    content = yaml.safe_load(params.read_text())
    content["cluster"]["validation_shards"] = 2
    params.write_text(yaml.safe_dump(content))
    # Nothing after the validation is of interest here.
    (tmp_path / "crash").mkdir()
    (tmp_path / "crash/sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "crash"))
    monkeypatch.setenv("CRASH", "--function_to_execute split")
    ended = braintumor("pipeline", "run-local")
    assert "failed in split" in ended.err, ended.err
    tasks = results(tmp_path / "build/pipeline")
    run = tasks["gather"].parent
    assert len(list(run.glob("*/scan/scanned/seal.json"))) == len(list(run.glob("*/match/matched/seal.json"))) == 2
    assert (tasks["validate"] / "report").is_file()

    assert braintumor("resolve").code == braintumor("validate").code == 0
    for name in ("manifest.parquet", "leakage.json", "findings.json", "difference.json"):
        shared = tasks["validate"] / "validation" / name
        assert shared.read_bytes() == (tmp_path / "build/validation" / name).read_bytes(), name


CRASH = """
import os, signal, sys
if os.environ.get("CRASH") in " ".join(sys.argv):
    import braintumor.steps.split as step
    step.split = lambda *inputs: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_task_leaves_its_name_and_its_log(
    store: Path,
    tmp_path: Path,
    braintumor: Any,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset_maker(tmp_path / "data", n_train=6, n_test=2)
    params_writer(tmp_path / "params.yaml")
    (tmp_path / "crash").mkdir()
    (tmp_path / "crash/sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "crash"))
    monkeypatch.setenv("CRASH", "--function_to_execute split")
    ended = braintumor("pipeline", "run-local")
    assert ended.code == 2
    assert "failed in split: it was killed" in ended.err
    with connected() as client:
        runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
        assert [run.data.tags["outcome"] for run in runs] == ["failed in split"]
    log = next((tmp_path / "build/pipeline").glob("*/log.txt"))
    assert "finished with status" in log.read_text()


def test_artifacts_of_different_data_are_refused(
    store: Path,
    tmp_path: Path,
    braintumor: Any,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
) -> None:
    one = dataset_maker(tmp_path / "one", n_train=6, n_test=2)
    other = dataset_maker(tmp_path / "other", n_train=7, n_test=2)
    params_writer(tmp_path / "params.yaml")
    build = tmp_path / "build"
    assert braintumor("resolve", "--dataset", one).code == 0
    ended = braintumor("validate", "--dataset", other)
    assert ended.code == 2
    assert "run 'braintumor resolve' again" in ended.err
    assert braintumor("validate", "--dataset", one).code == 0
    ended = braintumor("split", "--dataset", other)
    assert ended.code == 2 and not (build / "split").exists()
    assert json.loads((build / "resolve/context.json").read_text())["n_images"] == 32
