"""Training by several nodes: the objects are valid and safe, and named as pipeline and workers name them."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor
from packaging.version import Version

from braintumor.errors import UserError
from braintumor.model import distribution
from braintumor.model.distribution import WorkerLost
from braintumor.params import Profile, load_profile
from components import training_job
from pipelines import retraining
from pipelines.compiled import compile_pipeline

ROOT = Path(__file__).parents[2]
KUBECTL = Path(sys.prefix) / "security/bin/kubectl"
SCHEMA = jsonschema.Draft202012Validator(json.loads((Path(__file__).parent / "training_schemas.json").read_text()))
RELEASES = sorted({major_minor(version) for version in all_versions()}, key=Version)[-3:]
IMAGE = "example.test/braintumor@sha256:" + "a" * 64
OWN_KINDS = {"TrainingRuntime", "JobSet"}
BY = {"overlays/training": "TrainingRuntime", "training/jobset": "JobSet"}

both = pytest.mark.parametrize("folder", BY)


@cache
def parsed(folder: str) -> list[dict[str, Any]]:
    assert KUBECTL.is_file(), f"{KUBECTL} is missing; run 'make security'"
    done = subprocess.run(
        [KUBECTL, "kustomize", ROOT / "k8s" / folder], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def the(folder: str, kind: str, name: str | None = None) -> dict[str, Any]:
    found = [one for one in parsed(folder) if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    assert len(found) == 1
    return deepcopy(found[0])


def jobset_of(folder: str) -> dict[str, Any]:
    spec: dict[str, Any] = the(folder, BY[folder])["spec"]
    return spec["template"]["spec"] if "template" in spec else spec


def job_of(folder: str) -> dict[str, Any]:
    (replicated,) = jobset_of(folder)["replicatedJobs"]
    template: dict[str, Any] = replicated["template"]
    return template


def pod_of(folder: str) -> dict[str, Any]:
    pod: dict[str, Any] = job_of(folder)["spec"]["template"]["spec"]
    return pod


def on_nodes(nodes: int) -> Profile:
    profile = load_profile("production", ROOT / "params")
    train = profile.train.model_copy(update={"distribution": "multi_worker"})
    cluster = profile.cluster.model_copy(update={"training_nodes": nodes})
    return profile.model_copy(update={"train": train, "cluster": cluster})


@both
@pytest.mark.parametrize("release", RELEASES)
def test_every_object_is_valid_and_so_are_the_jobs_within(folder: str, release: str) -> None:
    for one in parsed(folder):
        if one["kind"] in OWN_KINDS:
            SCHEMA.validate(one)
        else:
            assert kubernetes_validate.validate(one, release, strict=True) == release
    template = job_of(folder)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"} | template.get("metadata", {})}
    assert kubernetes_validate.validate(job | {"spec": template["spec"]}, release, strict=True) == release


@both
def test_a_misspelt_field_would_be_found(folder: str) -> None:
    for path in (["metadata"], ["spec"], ["spec", "failurePolicy"], ["spec", "replicatedJobs", 0]):
        one = the(folder, BY[folder])
        place: Any = one
        for step in path if folder == "training/jobset" else ([*path[:1], "template", *path] if path[1:] else path):
            place = place[step]
        place["mispelt"] = 1
        with pytest.raises(jsonschema.ValidationError):
            SCHEMA.validate(one)


def test_the_job_that_a_run_makes_is_valid_and_takes_its_runtime_image_and_resources(tmp_path: Path) -> None:
    profile = on_nodes(4)
    nodes = json.loads(training_job.nodes_request(profile.cluster))
    spec = training_job._spec(nodes, IMAGE, "run", tmp_path)
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u"}
    job = training_job.train_job("braintumor-0123456789ab", spec, "c" * 64, [owner])
    SCHEMA.validate(job)
    assert (spec["trainer"]["numNodes"], spec["trainer"]["image"]) == (4, IMAGE)
    assert spec["trainer"]["resourcesPerNode"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}
    runtime = the("overlays/training", "TrainingRuntime")
    assert spec["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"],
                                  "name": runtime["metadata"]["name"]}  # fmt: skip
    # A host's name has 63 characters at most: <job>-node-0-<number>, and Kubernetes adds six to a pod's.
    assert len(f"{job['metadata']['name']}-node-0-999-abcde") <= 63
    assert (ROOT / f"{spec['trainer']['command'][2].replace('.', '/')}.py").is_file()


def test_kubeflow_trainer_finds_what_it_fills_in() -> None:
    runtime = the("overlays/training", "TrainingRuntime")["spec"]
    # This policy brings PET_*; the label, the job's name and the container's are those it looks for.
    assert set(runtime["mlPolicy"]) == {"numNodes", "torch"}
    (replicated,) = jobset_of("overlays/training")["replicatedJobs"]
    assert (replicated["name"], replicated["replicas"]) == ("node", 1)
    assert job_of("overlays/training")["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    assert [container["name"] for container in pod_of("overlays/training")["containers"]] == ["node"]


def test_a_jobset_by_hand_tells_its_workers_who_they_are() -> None:
    jobset, template = the("training/jobset", "JobSet"), job_of("training/jobset")
    (container,) = pod_of("training/jobset")["containers"]
    workers = template["spec"]["completions"]
    assert template["spec"]["parallelism"] == workers
    environ = {one["name"]: one.get("value") for one in container["env"]}
    assert environ["BRAINTUMOR_WORKERS"] == str(workers)
    paths = {
        one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"]
        for one in container["env"]
        if "fieldRef" in one.get("valueFrom", {})
    }
    assert paths == {
        distribution.JOBSET: "metadata.labels['jobset.sigs.k8s.io/jobset-name']",
        distribution.REPLICATED_JOB: "metadata.labels['jobset.sigs.k8s.io/replicatedjob-name']",
    }
    (replicated,) = jobset["spec"]["replicatedJobs"]
    given = {
        distribution.WORKERS: environ["BRAINTUMOR_WORKERS"], distribution.JOBSET: jobset["metadata"]["name"],
        distribution.REPLICATED_JOB: replicated["name"], distribution.JOB_INDEX: "1",
    }  # fmt: skip
    place = distribution.placement("multi_worker", given)
    assert place.peers[1] == "braintumor-by-hand-node-0-1.braintumor-by-hand:29500"
    assert "subdomain" not in jobset["spec"]["network"]


def test_both_kinds_run_the_same_pods() -> None:
    trainer, jobset = pod_of("overlays/training"), pod_of("training/jobset")
    for pod in (trainer, jobset):
        (container,) = pod["containers"]
        for name in ("command", "args"):
            container.pop(name, None)
        container["env"] = [one for one in container["env"] if one["name"] not in (
            distribution.WORKERS, distribution.JOBSET, distribution.REPLICATED_JOB)]  # fmt: skip
    assert trainer == jobset
    policies = [jobset_of(folder)["failurePolicy"] for folder in BY]
    assert policies[0] == policies[1]


@both
def test_a_worker_has_no_token_no_root_and_time_to_write_a_checkpoint(folder: str) -> None:
    pod = pod_of(folder)
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] >= 120
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, 10001, 10001)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert container["image"] != "braintumor"
    for volume in pod["volumes"]:
        assert set(volume) <= {"name", "persistentVolumeClaim", "emptyDir"}
        assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


@both
def test_whoever_is_lost_all_start_again_but_not_after_a_mistake(folder: str) -> None:
    policy = jobset_of(folder)["failurePolicy"]
    assert 1 <= policy["maxRestarts"] <= 10
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = job_of(folder)["spec"]
    assert (job["backoffLimit"], job["completionMode"], job["podReplacementPolicy"]) == (0, "Indexed", "Failed")
    (of_pods,) = job["podFailurePolicy"]["rules"]
    assert of_pods == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "node", "operator": "In", "values": [UserError.exit_code]},
    }
    assert WorkerLost.exit_code not in of_pods["onExitCodes"]["values"]
    profiles = [load_profile(path.stem, ROOT / "params") for path in (ROOT / "params").glob("*.yaml")]
    assert job["activeDeadlineSeconds"] == 60 * max(one.cluster.train.timeout_minutes for one in profiles)


@both
def test_a_worker_gets_what_the_task_would_get(folder: str) -> None:
    cluster = load_profile("production", ROOT / "params").cluster
    pod = pod_of(folder)
    (container,) = pod["containers"]
    found = {
        one["name"]: next(iter(one["valueFrom"].values()))
        for one in container["env"]
        if {"configMapKeyRef", "secretKeyRef"} & set(one.get("valueFrom", {}))
    }
    needed = {*retraining.MLFLOW_ADDRESSES, *retraining.DATA_ADDRESSES}
    keys = {*retraining.MLFLOW_KEYS, *retraining.S3_KEYS}
    assert set(found) == needed | keys | set(retraining.OPTIONAL_SETTINGS)
    for name, source in found.items():
        assert source["key"] == name
        assert source["name"] == (cluster.credentials if name in keys else cluster.addresses)
        assert source.get("optional", False) == (name not in needed)
    claims = [one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "persistentVolumeClaim" in one]
    assert claims == [cluster.cache_claim]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts == {"cache": retraining.CACHE, "shared-memory": "/dev/shm", "tmp": "/tmp"}
    assert pod["serviceAccountName"] == cluster.service_account
    assert pod["securityContext"]["runAsUser"] == cluster.run_as_user
    assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": cluster.shared_memory}
    assert cluster.gpu
    assert pod["nodeSelector"] == cluster.gpu.node_selector
    assert pod["tolerations"] == [one.model_dump(exclude_none=True) for one in cluster.gpu.tolerations]
    resources = json.loads(training_job.nodes_request(cluster))["resources"]
    assert container["resources"] == {"requests": resources, "limits": resources}


@both
def test_workers_reach_each_other_and_nobody_else_reaches_them(folder: str) -> None:
    policy = the(folder, "NetworkPolicy", "training-workers")["spec"]
    (label,) = policy["podSelector"]["matchLabels"].items()
    assert label in job_of(folder)["spec"]["template"]["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    peer = [{"podSelector": policy["podSelector"]}]
    assert policy["ingress"] == [{"from": peer}]
    assert policy["egress"] == [{"to": peer}]


def test_the_task_may_make_read_and_remove_train_jobs_and_no_more() -> None:
    role = the("overlays/training", "Role", "braintumor-training")
    assert role["rules"] == [
        {"apiGroups": [training_job.GROUP], "resources": [training_job.PLURAL], "verbs": ["create", "get", "delete"]}
    ]
    binding = the("overlays/training", "RoleBinding", "braintumor-training")
    cluster = load_profile("production", ROOT / "params").cluster
    assert [(one["kind"], one["name"]) for one in binding["subjects"]] == [("ServiceAccount", cluster.service_account)]
    # Beside the service account's own rights, it looks at its own pod.
    (pods,) = [rule for rule in the("overlays/training", "Role", "braintumor-pipeline")["rules"]
               if rule["resources"] == ["pods"]]  # fmt: skip
    assert "get" in pods["verbs"]


def test_everything_is_in_one_namespace_whose_quota_has_room_for_four_nodes() -> None:
    for one in parsed("overlays/training"):
        if one["kind"] not in ("Namespace", "PriorityClass"):
            assert one["metadata"]["namespace"] == "braintumor", one["kind"]
    hard = the("overlays/training", "ResourceQuota")["spec"]["hard"]
    cluster = load_profile("production", ROOT / "params").cluster
    assert cluster.gpu
    assert int(hard[f"requests.{cluster.gpu.resource}"]) == 4 * cluster.gpu.count
    assert int(hard["requests.cpu"]) > 4 * int(cluster.train.cpu)
    assert int(hard["requests.memory"].removesuffix("Gi")) > 4 * int(cluster.train.memory.removesuffix("Gi"))


def test_the_quota_that_trainer_brings_has_room_for_the_jobset_by_hand_and_that_of_production_has_none() -> None:
    (replicated,) = jobset_of("training/jobset")["replicatedJobs"]
    nodes = replicated["template"]["spec"]["parallelism"]
    (container,) = pod_of("training/jobset")["containers"]
    gpus = nodes * int(container["resources"]["requests"]["nvidia.com/gpu"])
    # docs/scale.md has it patched by hand.
    patch = {
        one["path"].rpartition("/")[2]: one["value"]
        for one in yaml.safe_load((ROOT / "k8s/training/trainer/quota.yaml").read_text())
    }
    assert int(patch["requests.nvidia.com~1gpu"]) >= gpus
    assert int(the("overlays/production", "ResourceQuota")["spec"]["hard"]["requests.nvidia.com/gpu"]) < gpus


def test_the_task_of_several_nodes_has_no_gpu_of_its_own_and_all_the_time_of_the_training() -> None:
    profile = on_nodes(4)
    graph, platform = (one for one in yaml.safe_load_all(compile_pipeline(profile, IMAGE)) if one)
    container = graph["deploymentSpec"]["executors"]["exec-train"]["container"]
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    assert "accelerator" not in container["resources"]
    assert container["resources"]["resourceMemoryLimit"] == profile.cluster.steps.memory
    assert int(settings["activeDeadlineSeconds"]) == profile.cluster.train.timeout_minutes * 60
    assert not {"nodeSelector", "tolerations", "emptyDirMounts"} & set(settings)
    assert [one["mountPath"] for one in settings["pvcMount"]] == [retraining.CACHE]
    (task,) = re.findall(r'"nodes": \d+', json.dumps(json.loads(training_job.nodes_request(profile.cluster))))
    assert task == '"nodes": 4'
    assert "run_training_job" in json.dumps(container)
    alone = compile_pipeline(load_profile("production", ROOT / "params"), IMAGE)
    assert "run_training_job" not in alone
