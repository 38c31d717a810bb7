"""A step has one function and several faces: they agree."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from typer.main import get_command

from braintumor.cli import app
from braintumor.model.perturbations import PERTURBATIONS
from braintumor.params import SECTIONS

ROOT = Path(__file__).parents[2]
STEPS = ("resolve", "validate", "split", "train", "evaluate", "gate", "register")
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# They share the work of `validate` between the tasks of a cluster. On one machine it does all of it itself: for them
# there is no stage and no command.
PARTS_OF_VALIDATE = ("scan", "gather", "match")
# What changes how a step tells, stores or records its result, and never the result itself.
NO_INFLUENCE = {
    "braintumor",
    *(f"braintumor.{name}" for name in ("artifacts", "errors", "interruption", "params", "progress")),
}
# How the copies are searched for among very many images; `validate` alone searches.
SEARCH = {"braintumor.data.fingerprint_store", "braintumor.data.neighbours"}
RECORDS = ("braintumor.registry.",)
# Of the registry's modules, those that shape a step's result.
OF_THE_REGISTRY = {"gate": {"braintumor.registry.policy"}, "evaluate": {"braintumor.registry.champion"}}
# They bring the same bytes, verified, from wherever they lie.
TRANSPORT = {"braintumor.object_store", "braintumor.data.dvc_remote", "braintumor.data.dataset_cache"}
# The data version and the split are checked through these; their own results are files that the stage depends on.
CHECKS = SEARCH | {
    f"braintumor.data.{name}"
    for name in ("contents", "manifest", "masks", "duplicates", "oddities", "patients", "splits", "split_check")
}
# They make what MLflow is shown of the data, beside the step's result.
SHOWN_IN_THE_RUN = {"braintumor.data.profile", "braintumor.data.privacy"}
CLEARING = ("checkpoints", "densenet", "flat")
EXEMPT = {
    # A stage has no shards.
    "validate": {"braintumor.data.shards"},
    "split": SEARCH | {f"braintumor.data.{name}" for name in ("masks", "oddities", "patients", "split_check")},
    # It only shares the module with the step that publishes evaluations.
    "train": CHECKS | SHOWN_IN_THE_RUN | {"braintumor.evidence.plots", "braintumor.evidence.verdicts"},
    # It clears what the training left for a next attempt. Masks, planes and privacy decide what its report shows.
    "evaluate": (
        CHECKS | SHOWN_IN_THE_RUN | {f"braintumor.model.{name}" for name in ("densenet", "checkpoints", "flat")}
    )
    - {f"braintumor.data.{name}" for name in ("contents", "masks", "patients", "privacy")},
    "gate": SHOWN_IN_THE_RUN,
}


def test_every_step_is_a_module_a_function_a_command_and_a_stage() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for step in STEPS:
        assert callable(getattr(import_module(f"braintumor.steps.{step}"), step))
        assert step in commands
        assert STAGES[step]["cmd"].startswith(f"braintumor {step} ")
    assert list(STAGES) == list(STEPS)
    assert {path.stem for path in (ROOT / "braintumor/steps").glob("*.py")} == {"__init__", *STEPS, *PARTS_OF_VALIDATE}


@pytest.mark.parametrize("part", PARTS_OF_VALIDATE)
def test_every_part_of_the_validation_is_a_module_a_function_and_a_component_and_neither_command_nor_stage(
    part: str,
) -> None:
    assert callable(getattr(import_module(f"braintumor.steps.{part}"), part))
    assert callable(getattr(import_module(f"components.{part}"), part).python_func)
    assert part not in get_command(app).commands  # type: ignore[attr-defined]
    assert part not in STAGES


@pytest.mark.parametrize("step", STEPS)
def test_command_offers_the_folders_of_its_function(step: str) -> None:
    function = inspect.signature(getattr(import_module(f"braintumor.steps.{step}"), step))
    folders = {name for name, parameter in function.parameters.items() if parameter.annotation is Path}
    command = get_command(app).commands[step]  # type: ignore[attr-defined]
    offered = {option.lstrip("-") for parameter in command.params for option in parameter.opts}
    assert folders <= offered
    assert offered == folders | {"params"}


@pytest.mark.parametrize("step", STEPS)
def test_stage_names_every_folder_that_it_reads_and_writes(step: str) -> None:
    stage = STAGES[step]
    options = dict(re.findall(r"--(\w+) (\S+)", stage["cmd"]))
    outs = [
        next(iter(out)) if isinstance(out, dict) else out for out in stage.get("outs", []) + stage.get("metrics", [])
    ]
    output = options.pop("output")
    assert all(out == output or out.startswith(f"{output}/") for out in outs)
    for folder in options.values():
        assert any(dep == folder or dep.startswith(f"{folder}/") for dep in stage["deps"]), folder


def test_stages_depend_on_each_other_as_the_steps_are_ordered() -> None:
    made: dict[str, str] = {}
    for step in STEPS:
        outs = STAGES[step].get("outs", []) + STAGES[step].get("metrics", [])
        for dep in STAGES[step]["deps"]:
            if dep.startswith("build/"):
                assert any(dep == out or out.startswith(f"{dep}/") for out in made), f"{step} needs {dep} too early"
        made |= {next(iter(out)) if isinstance(out, dict) else out: step for out in outs}


@pytest.mark.parametrize("step", EXEMPT)
def test_stage_depends_on_every_module_that_shapes_its_result(step: str) -> None:
    graph = grimp.build_graph("braintumor")
    found = graph.find_upstream_modules(f"braintumor.steps.{step}") | {f"braintumor.steps.{step}"}
    packages = {module for module in found if graph.find_children(module)}
    records = {module for module in found if module.startswith(RECORDS)} - OF_THE_REGISTRY.get(step, set())
    shaping = found - packages - records - NO_INFLUENCE - TRANSPORT - EXEMPT[step]
    expected = {f"{module.replace('.', '/')}.py" for module in shaping}
    modules = {dep for dep in STAGES[step]["deps"] if dep.endswith(".py")}
    assert modules == expected


def test_each_stage_tracks_its_own_section_of_the_parameters() -> None:
    for step in STEPS:
        tracked = STAGES[step].get("params", [])
        assert set(tracked) <= set(SECTIONS)
        if step in SECTIONS:
            assert step in tracked


def test_plots_name_columns_that_the_evaluation_writes() -> None:
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    drawn = {Path(file).stem: plot for entry in plots if isinstance(entry, dict) for file, plot in entry.items()}
    written = {
        "reliability": {"confidence", "accuracy", "n"},
        "risk_coverage": {"kept", "wrong", "threshold"},
        "robustness": {"step", *PERTURBATIONS},
    }
    for name, columns in written.items():
        y = drawn[name]["y"]
        assert {drawn[name]["x"], *([y] if isinstance(y, str) else y)} <= columns
    assert set(drawn["robustness"]["y"]) == set(PERTURBATIONS)


def test_steps_with_effects_always_run() -> None:
    assert {step for step in STEPS if STAGES[step].get("always_changed")} == {"resolve", "register"}


def test_no_default_remote_can_receive_images() -> None:
    config = (ROOT / ".dvc/config").read_text()
    assert "remote = " not in config
    for pointer in ("data.dvc", "weights.dvc"):
        assert "remote" not in (ROOT / pointer).read_text()


def test_locks_hold_hashes_and_no_addresses() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text
        pins = re.findall(r"^[A-Za-z0-9_.\[\]-]+==\S+", text, re.MULTILINE)
        # That of the linters holds nothing of ours.
        assert len(pins) > (90 if lock.name == "security.txt" else 100)
        assert text.count("--hash=sha256:") >= len(pins)


def test_run_lock_is_a_part_of_the_dev_lock() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^\S+==\S+", (ROOT / "requirements" / name).read_text(), re.MULTILINE))

    assert pins("run.txt") <= pins("dev.txt")
