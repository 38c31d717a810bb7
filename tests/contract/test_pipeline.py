"""The compiled pipeline: its edges are those of the DVC graph, and every profile has what Kubernetes needs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from braintumor.attempt_report import STEPS
from braintumor.errors import UserError
from braintumor.params import Profile, list_profiles, load_profile, parse_params
from pipelines.compiled import compile_pipeline, refuse_incomplete

ROOT = Path(__file__).parents[2]
PROFILES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))
ON_GPU = {"production", "reference"}
IMAGE = "example.test/braintumor@sha256:" + "a" * 64
TASKS = {*STEPS, "report"}
PARTS = ("scan", "gather", "match")  # of validate, where several tasks share it
FOLDERS = {
    "resolve": "resolve", "validation": "validate", "split": "split", "model": "train", "evaluation": "evaluate",
    "gate": "gate",
}  # fmt: skip

Document = dict[str, Any]


class Package:
    """Both documents of a compiled pipeline, and its tasks wherever they are nested."""

    def __init__(self, text: str) -> None:
        self.graph, self.platform = (document for document in yaml.safe_load_all(text) if document)
        self.tasks: dict[str, Document] = {}
        self.inside: dict[str, str] = {}
        self._collect(self.graph["root"], "root")

    def _collect(self, component: Document, name: str) -> None:
        for task_name, task in component["dag"]["tasks"].items():
            self.inside[task_name] = name
            inner = self.graph["components"][task["componentRef"]["name"]]
            if "dag" in inner:
                self._collect(inner, task_name)
            else:
                self.tasks[task_name] = task

    def container(self, step: str) -> Document:
        container: Document = self.graph["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
        return container

    def kubernetes(self, step: str) -> Document:
        executors = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        settings: Document = executors[f"exec-{step}"]
        return settings

    def sources(self, step: str) -> set[str]:
        """The steps whose artifacts this one takes; within conditions they come by the names of the outer inputs."""
        found = set()
        for source in self.tasks[step]["inputs"].get("artifacts", {}).values():
            if "taskOutputArtifact" in source:
                found.add(source["taskOutputArtifact"]["producerTask"])
            else:
                found.add(source["componentInputArtifact"].removeprefix("pipelinechannel--").partition("-")[0])
        return found

    def environment(self, step: str) -> dict[str, str]:
        """The variables of a task, and where each comes from."""
        settings = self.kubernetes(step)
        found = {entry["name"]: "field" for entry in settings.get("fieldPathAsEnv", [])}
        for kind, key in (("secretAsEnv", "secretKey"), ("configMapAsEnv", "configMapKey")):
            for source in settings.get(kind, []):
                for entry in source["keyToEnv"]:
                    found[entry["envVar"]] = f"{kind}{'?' if source.get('optional') else ''}"
                    assert entry[key] == entry["envVar"]
        return found


@pytest.fixture(scope="module", params=PROFILES)
def package(request: pytest.FixtureRequest) -> tuple[str, Profile, Package]:
    profile = load_profile(request.param, ROOT / "params")
    return request.param, profile, Package(compile_pipeline(profile, IMAGE))


def test_every_component_is_named_after_its_step_and_calls_it() -> None:
    for step in STEPS:
        tree = ast.parse((ROOT / "components" / f"{step}.py").read_text())
        [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert function.name == step
        imported = {
            (node.module, name.name)
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        }
        called = {
            node.func.id
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        wanted = "resolve_attempt" if step == "resolve" else step
        assert (f"braintumor.steps.{step}", wanted) in imported
        assert wanted in called
        # What decides belongs to the step; `x if y else z` in a line that is printed decides nothing.
        assert not [node for node in ast.walk(function) if isinstance(node, ast.If | ast.For | ast.While | ast.Try)]
        marks = re.findall(r'step_of_the_attempt\("(\w+)"', ast.unparse(function).replace("'", '"'))
        assert marks == [step]
        # What fails outside the block would be told of the next step.
        block = next(node for node in function.body if isinstance(node, ast.With))
        after = function.body[function.body.index(block) + 1 :]
        assert all(isinstance(node, ast.Return) or ast.unparse(node).startswith("print(") for node in after), step
    beside = {"__init__", "views", "train_on_nodes", "training_job", "training_worker"} | {"validate_shards", *PARTS}
    assert {path.stem for path in (ROOT / "components").glob("*.py")} - beside == set(TASKS)


def test_dvc_and_kubeflow_have_the_same_edges(package: tuple[str, Profile, Package]) -> None:
    _, _, compiled = package
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for step in STEPS:
        built = {dep.split("/")[1] for dep in stages[step]["deps"] if dep.startswith("build/")}
        assert compiled.sources(step) == {FOLDERS[folder] for folder in built}, step


@pytest.fixture(scope="module")
def sharded(package: tuple[str, Profile, Package]) -> tuple[Profile, Package]:
    _, profile, _ = package
    several = profile.model_copy(update={"cluster": profile.cluster.model_copy(update={"validation_shards": 3})})
    return several, Package(compile_pipeline(several, IMAGE))


def test_without_shards_no_task_shares_the_validation(package: tuple[str, Profile, Package]) -> None:
    _, profile, compiled = package
    assert profile.cluster.validation_shards == 1
    assert compiled.tasks.keys() == TASKS
    assert "survey" not in compiled.graph["components"]["comp-validate"]["inputDefinitions"]["artifacts"]


def test_shards_are_scanned_gathered_matched_and_all_of_them_validated(sharded: tuple[Profile, Package]) -> None:
    _, compiled = sharded
    assert compiled.tasks.keys() == TASKS | set(PARTS)
    loops = {}
    for component in compiled.graph["components"].values():
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if "parameterIterator" in task:
                loops[name] = task["parameterIterator"]["items"]["raw"]
    assert loops == {compiled.inside["scan"]: "[0, 1, 2]", compiled.inside["match"]: "[0, 1, 2]"}
    for part in ("scan", "match"):
        share, count = (compiled.tasks[part]["inputs"]["parameters"][name] for name in ("share", "shares"))
        assert share["componentInputParameter"].startswith("pipelinechannel--loop-item-param-")
        assert count == {"runtimeValue": {"constant": 3}}
    # Inside the same condition as the rest: nothing is read where nothing is new.
    assert {compiled.inside[step] for step in ("gather", "validate", "split")} == {compiled.inside["gate"]}
    assert {compiled.inside[compiled.inside[part]] for part in ("scan", "match")} == {compiled.inside["gate"]}
    assert compiled.sources("gather") == {compiled.inside["scan"]}
    assert compiled.sources("match") == {"gather"}
    assert compiled.sources("validate") == {"resolve", "gather", compiled.inside["match"]}
    assert compiled.sources("split") == {"validate"}


def test_the_parts_are_placed_like_the_validation(sharded: tuple[Profile, Package]) -> None:
    profile, compiled = sharded
    for part in PARTS:
        assert compiled.container(part)["resources"] == compiled.container("validate")["resources"]
        assert compiled.container(part)["image"] == IMAGE
        settings, model = compiled.kubernetes(part), compiled.kubernetes("validate")
        for name in ("activeDeadlineSeconds", "securityContext", "imagePullPolicy"):
            assert settings[name] == model[name]
        assert settings["podMetadata"]["labels"] == {
            "app.kubernetes.io/name": "braintumor", "app.kubernetes.io/component": part,
        }  # fmt: skip
        assert compiled.tasks[part]["cachingOptions"]["enableCache"] is True
        retries = compiled.tasks[part]["retryPolicy"]
        assert retries["maxRetryCount"] == 2
        assert int(retries["backoffMaxDuration"].removesuffix("s")) >= 3 * int(settings["activeDeadlineSeconds"])
    # The images and what fetches them are for who reads them.
    assert compiled.environment("scan") == compiled.environment("validate")
    assert compiled.environment("gather") == compiled.environment("match") == compiled.environment("gate")
    assert compiled.kubernetes("scan")["pvcMount"] == compiled.kubernetes("validate")["pvcMount"]
    assert "retryPolicy" not in compiled.tasks["validate"]
    # Kubeflow's cache does not look into artifacts.
    for task, names in {
        "gather": {"scan_digests"},
        "match": {"dataset"},
        "validate": {"context_digest", "survey_digest", "match_digests"},
    }.items():
        assert names <= compiled.tasks[task]["inputs"]["parameters"].keys()
    tagged = Package(compile_pipeline(profile, "example.test:5000/braintumor:1.0"))
    assert not any(task["cachingOptions"].get("enableCache") for task in tagged.tasks.values())


def test_the_components_of_the_parts_call_their_functions_and_mark_the_validation() -> None:
    for name in (*PARTS, "validate_shards"):
        tree = ast.parse((ROOT / "components" / f"{name}.py").read_text())
        [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert function.name == name.removesuffix("_shards")
        text = ast.unparse(function).replace("'", '"')
        assert f"from braintumor.steps.{function.name} import {function.name}" in text
        assert not [node for node in ast.walk(function) if isinstance(node, ast.If | ast.For | ast.While | ast.Try)]
        marks = re.findall(r'(?:part_of_the_step|step_of_the_attempt)\("(\w+)"', text)
        assert marks == ["validate"]


def test_nothing_new_stops_all_but_resolve_and_a_closed_gate_stops_register(
    package: tuple[str, Profile, Package],
) -> None:
    _, _, compiled = package
    inside = compiled.inside
    conditions = {}
    for component in [compiled.graph["root"], *compiled.graph["components"].values()]:
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if "triggerPolicy" in task and "condition" in task["triggerPolicy"]:
                conditions[name] = " ".join(task["triggerPolicy"]["condition"].split())
    assert inside["register"] != inside["gate"]
    assert {inside[step] for step in STEPS[1:6]} == {inside["gate"]}
    assert inside[inside["register"]] == inside["gate"]
    assert inside[inside["gate"]] == inside["resolve"]
    assert conditions == {
        inside["gate"]: "inputs.parameter_values['pipelinechannel--resolve-Output'] == true",
        inside["register"]: "inputs.parameter_values['pipelinechannel--gate-Output'] == true",
    }


def test_report_runs_at_the_end_however_it_comes(package: tuple[str, Profile, Package]) -> None:
    _, _, compiled = package
    task = compiled.tasks["report"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert compiled.inside["report"] == "root"
    assert task["inputs"]["parameters"]["status"]["taskFinalStatus"]["producerTask"] == compiled.inside["resolve"]


def test_parameters_of_the_profile_travel_as_text_that_gives_them_back(
    package: tuple[str, Profile, Package],
) -> None:
    _, profile, compiled = package
    inputs = compiled.graph["root"]["inputDefinitions"]["parameters"]
    assert {name: entry.get("defaultValue") for name, entry in inputs.items()} == {
        "dataset": "latest", "force": False, "params": profile.as_json(),
    }  # fmt: skip
    sent = parse_params(inputs["params"]["defaultValue"])
    assert sent.model_dump() == profile.model_dump(exclude={"cluster", "promote"})


def test_only_steps_without_effects_are_cached_and_only_with_a_digest(package: tuple[str, Profile, Package]) -> None:
    _, profile, compiled = package
    assert {step for step in TASKS if compiled.tasks[step]["cachingOptions"].get("enableCache")} == {
        "validate",
        "split",
    }
    tagged = Package(compile_pipeline(profile, "example.test:5000/braintumor:1.0"))
    assert not any(task["cachingOptions"].get("enableCache") for task in tagged.tasks.values())
    # Kubeflow's cache does not look into artifacts: their digests are inputs of their own.
    for step in ("validate", "split"):
        inputs = compiled.tasks[step]["inputs"]["parameters"]
        assert any(name.endswith("_digest") for name in inputs)
        assert not any("run" in name for name in inputs)
    for step in ("train", "evaluate", "gate", "register"):
        assert "run_id" in compiled.tasks[step]["inputs"]["parameters"]
    assert all(compiled.container(step)["image"] == IMAGE for step in TASKS)


def test_a_critical_finding_is_never_tried_again_and_all_else_is_with_back_off(
    package: tuple[str, Profile, Package],
) -> None:
    _, _, compiled = package
    for step in TASKS:
        retries = compiled.tasks[step].get("retryPolicy")
        if step in {"validate", "report"}:
            assert retries is None
            continue
        assert retries is not None
        tries = retries["maxRetryCount"]
        assert 1 <= tries <= 3
        assert retries["backoffDuration"] == "60s" and retries["backoffFactor"] == 2.0
        # Argo counts it from the first try's start, and ends the try that is under way then.
        enough = (tries + 1) * int(compiled.kubernetes(step)["activeDeadlineSeconds"]) + 60 * (2**tries - 1)
        assert int(retries["backoffMaxDuration"].removesuffix("s")) >= enough


def test_every_task_has_limits_a_time_and_no_root(package: tuple[str, Profile, Package]) -> None:
    _, profile, compiled = package
    for step in TASKS:
        wanted = {"train": profile.cluster.train, "evaluate": profile.cluster.evaluate}.get(step, profile.cluster.steps)
        resources = compiled.container(step)["resources"]
        assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == wanted.cpu
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == wanted.memory
        settings = compiled.kubernetes(step)
        assert int(settings["activeDeadlineSeconds"]) == wanted.timeout_minutes * 60
        assert settings["securityContext"]["runAsNonRoot"] is True
        assert int(settings["securityContext"]["runAsUser"]) == profile.cluster.run_as_user
        assert settings["podMetadata"]["labels"]["app.kubernetes.io/component"] == step


def test_gpu_nodes_are_asked_for_where_the_profile_says_so(package: tuple[str, Profile, Package]) -> None:
    name, profile, compiled = package
    assert (profile.cluster.gpu is not None) == (name in ON_GPU)
    for step in TASKS:
        settings, resources = compiled.kubernetes(step), compiled.container(step)["resources"]
        if step in {"train", "evaluate"}:
            assert settings["emptyDirMounts"] == [
                {
                    "volumeName": "shared-memory", "mountPath": "/dev/shm", "medium": "Memory",
                    "sizeLimit": profile.cluster.shared_memory,
                }
            ]  # fmt: skip
        if step in {"train", "evaluate"} and profile.cluster.gpu is not None:
            gpu = profile.cluster.gpu
            assert resources["accelerator"] == {
                "resourceType": gpu.resource, "resourceCount": str(gpu.count),
                "type": gpu.resource, "count": str(gpu.count),
            }  # fmt: skip
            assert settings["nodeSelector"]["labels"] == gpu.node_selector
            assert settings["tolerations"] == [
                toleration.model_dump(exclude_none=True) for toleration in gpu.tolerations
            ]
        else:
            assert "accelerator" not in resources
            assert "nodeSelector" not in settings and "tolerations" not in settings


def test_each_task_gets_the_addresses_and_secrets_that_it_needs_and_no_more(
    package: tuple[str, Profile, Package],
) -> None:
    _, profile, compiled = package
    everywhere = {
        "BRAINTUMOR_PIPELINE_RUN": "field",
        "MLFLOW_TRACKING_URI": "configMapAsEnv",
        "MLFLOW_TRACKING_USERNAME": "secretAsEnv?",
        "MLFLOW_TRACKING_PASSWORD": "secretAsEnv?",
    }
    with_images = {
        "BRAINTUMOR_DATA_REMOTE": "configMapAsEnv",
        "BRAINTUMOR_CHECKPOINTS": "configMapAsEnv",
        "BRAINTUMOR_CACHE": "configMapAsEnv",
        "AWS_ENDPOINT_URL": "configMapAsEnv?",
        "AWS_DEFAULT_REGION": "configMapAsEnv?",
        "BRAINTUMOR_CACHE_DAYS": "configMapAsEnv?",
        "BRAINTUMOR_CACHE_GB": "configMapAsEnv?",
        "AWS_ACCESS_KEY_ID": "secretAsEnv?",
        "AWS_SECRET_ACCESS_KEY": "secretAsEnv?",
    }
    for step in TASKS:
        reads_images = step in {"resolve", "validate", "split", "train", "evaluate"}
        expected = everywhere | (with_images if reads_images else {})
        if step == "report":
            expected = expected | {"BRAINTUMOR_WEBHOOK": "secretAsEnv?"}
        assert compiled.environment(step) == expected, step
        claims = [mount["pvcNameParameter"]["runtimeValue"]["constant"] for mount in
                  compiled.kubernetes(step).get("pvcMount", [])]  # fmt: skip
        assert claims == ([profile.cluster.cache_claim] if reads_images else [])


def test_compiling_again_gives_the_same_bytes() -> None:
    program = (
        "import sys; from pathlib import Path; from braintumor.params import load_profile;"
        "from pipelines.compiled import compile_pipeline;"
        f"sys.stdout.write(compile_pipeline(load_profile('production', Path({str(ROOT / 'params')!r})), {IMAGE!r}))"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True,
            cwd=ROOT,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0].decode() == compile_pipeline(load_profile("production", ROOT / "params"), IMAGE)


@pytest.mark.parametrize(
    "image",
    ["braintumor", "host:5000/braintumor", "", "braintumor:", "braintumor@sha256:abc", "a b:1", "braintumor@latest"],
)
def test_image_without_tag_or_digest_is_refused(image: str) -> None:
    with pytest.raises(UserError, match="neither a tag nor a digest"):
        compile_pipeline(load_profile("sample", ROOT / "params"), image)


def test_one_document_alone_is_refused() -> None:
    text = compile_pipeline(load_profile("production", ROOT / "params"), IMAGE)
    first, _, second = text.partition("\n---\n")
    for part in (first, second, "", "a: [", f"{second}\n---\n{first}"):
        with pytest.raises(UserError, match="pipeline compile"):
            refuse_incomplete(part)
    refuse_incomplete(text)


def test_every_profile_was_looked_at() -> None:
    assert set(list_profiles(ROOT / "params")) == set(PROFILES) >= ON_GPU
