"""A training by several nodes: the TrainJob of Kubeflow Trainer that the task `train` starts, follows and clears up.

The only module that speaks to the Kubernetes API. Split and model travel through the cache, which all pods see, in
`jobs/<name of the job>`. The name follows from the pipeline's run, so that a retried task finds the job of its first
try and joins it, or takes over what it left.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from braintumor import artifacts
from braintumor.data.split_artifact import MadeSplit, load_split
from braintumor.errors import UserError
from braintumor.model.saved import model_digest
from braintumor.params import ClusterParams
from braintumor.progress import note, warn
from braintumor.registry.attempts import PIPELINE_RUN_VARIABLE

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
RUNTIME = "braintumor-training"  # of k8s/training/trainer
WORKER = "components.training_worker"
CONTENT = "braintumor/content-sha256"
CACHE = "BRAINTUMOR_CACHE"
JOBS = "jobs"
REQUEST, SPLIT, MODEL, FAILURES = "request.json", "split", "model", "failures"
NAME = re.compile(r"braintumor-[0-9a-f]{12}")
# Of folders that no task came back for.
MAX_AGE_S = 14 * 86_400
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_S = 10.0
# The API may be away while a control plane is upgraded; the training goes on meanwhile.
PATIENCE_S = 900.0
GONE_WITHIN_S = 600.0
TIMEOUT_S = (5, 30)

Item = dict[str, Any]


def nodes_request(cluster: ClusterParams) -> str:
    """What a TrainJob asks of the cluster by this profile, as the text that travels to the task."""
    resources = {"cpu": cluster.train.cpu, "memory": cluster.train.memory}
    if cluster.gpu is not None:
        resources[cluster.gpu.resource] = str(cluster.gpu.count)
    return json.dumps({"nodes": cluster.training_nodes, "resources": resources}, sort_keys=True)


def run_training_job(
    dataset: str, splits: Path, model: Path, *, params: str, nodes: str, image: str, run_id: str
) -> None:
    """`model` is what a TrainJob of so many nodes trained on this split, by these parameters, in this image.

    A job of the same content that is under way is joined, one that failed is started again. Terminated, the task takes
    its job with it, and the workers write their checkpoint. Raises UserError with the workers' own reason.
    """
    made = load_split(splits)
    name = _job_name()
    folder = _shared_folder(name)
    request = {"dataset": dataset, "params": params, "image": image, "run_id": run_id, "splits_sha256": made.sha256}
    spec = _spec(json.loads(nodes), image, run_id, folder)
    content = hashlib.sha256(json.dumps([request, spec], sort_keys=True).encode()).hexdigest()
    request["content"] = content
    jobs = TrainJobs()
    found = jobs.get(name)
    if found is not None and (found["metadata"].get("annotations") or {}).get(CONTENT) != content:
        raise UserError(
            f"the TrainJob {name} is of another training; is it of another user? look at it, and "
            f"'kubectl delete trainjob {name}', then start the run again"
        )
    if found is not None and (_ended(found) == "Failed" or "deletionTimestamp" in found["metadata"]):
        jobs.delete(name)
        jobs.await_end(name)
        found = None
    is_under_way = found is not None and _ended(found) is None
    is_trained = _asked(folder) == content and (folder / MODEL / artifacts.TRAINING).is_file()
    if not is_under_way and not is_trained:
        # A job that is complete, and whose model is gone, is of no use.
        jobs.delete(name)
        jobs.await_end(name)
        _fill(folder, splits, request)
    if is_under_way or not is_trained:
        _train(jobs, name, content, spec, folder)
    _take(folder / MODEL, model, made)
    jobs.delete(name)


def train_job(name: str, spec: Item, content: str, owners: list[Item]) -> Item:
    """The object; `owners` take it with them when they are deleted."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "braintumor", "app.kubernetes.io/component": "train"},
            "annotations": {CONTENT: content},
            "ownerReferences": owners,
        },
        "spec": spec,
    }


class TrainJobs:
    """The TrainJobs of this pod's namespace, with the rights of its service account.

    What may pass is waited for; anything else is a UserError.
    """

    def __init__(self, account: Path | None = None, environ: Mapping[str, str] = os.environ) -> None:
        """Raises UserError outside a pod, or in one without a token."""
        from kubernetes import client
        from kubernetes.config.config_exception import ConfigException
        from kubernetes.config.incluster_config import InClusterConfigLoader

        account = account or ACCOUNT
        settings = client.Configuration()
        try:
            InClusterConfigLoader(
                token_filename=str(account / "token"), cert_filename=str(account / "ca.crt"), environ=environ
            ).load_and_set(settings)
            self.namespace = (account / "namespace").read_text(encoding="utf-8").strip()
        except (ConfigException, OSError) as error:
            raise UserError(
                f"no access to the Kubernetes API ({error}): cluster.training_nodes above 1 need a pod with the token "
                "of its service account; set it to 1 to train elsewhere"
            ) from error
        settings.retries = False
        api = client.ApiClient(settings)
        self._objects, self._pods = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def get(self, name: str) -> Item | None:
        """The job, or None."""
        found: Item | None = self._asked(self._objects.get_namespaced_custom_object, name)
        return found

    def create(self, job: Item) -> None:
        """The job is there. One of its name that came in between is left, and the caller finds out whose it is."""
        self._asked(self._objects.create_namespaced_custom_object, job)

    def delete(self, name: str, patience_s: float | None = None) -> None:
        """The job and its pods are going, if there were any."""
        self._asked(
            self._objects.delete_namespaced_custom_object, name, patience_s=patience_s, propagation_policy="Background"
        )

    def await_end(self, name: str) -> None:
        """There is no job of this name any more."""
        end = time.monotonic() + GONE_WITHIN_S
        while self.get(name) is not None:
            if time.monotonic() > end:
                raise UserError(f"the TrainJob {name} was deleted and does not go; look at its finalizers and its pods")
            time.sleep(min(POLL_S, 2))

    def owners(self) -> list[Item]:
        """The Argo workflow that this pod belongs to: whoever deletes it deletes the job."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            pod = self._pods.read_namespaced_pod(
                os.environ.get("HOSTNAME", ""), self.namespace, _request_timeout=TIMEOUT_S
            )
        except (ApiException, HTTPError, ValueError) as error:
            warn(f"this pod can't be looked at ({type(error).__name__}): the TrainJob is not deleted with the run")
            return []
        return [
            {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid}
            for owner in pod.metadata.owner_references or []
            if owner.kind == "Workflow"
        ]

    def _asked(self, call: Callable[..., Any], subject: Any, patience_s: float | None = None, **more: str) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        end = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        pause = min(1.0, POLL_S)
        while True:
            try:
                return call(GROUP, VERSION, self.namespace, PLURAL, subject, _request_timeout=TIMEOUT_S, **more)
            except ApiException as error:
                if _is_answer(error):
                    return None
                if error.status not in (429, 500, 502, 503, 504):
                    raise _in_words(error, self.namespace) from error
                reason = f"{error.status} {error.reason}"
            except HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
            if time.monotonic() + pause > end:
                raise UserError(f"the Kubernetes API does not answer: {reason}; the task can be run again")
            time.sleep(pause)
            pause = min(2 * pause, POLL_S)


def _train(jobs: TrainJobs, name: str, content: str, spec: Item, folder: Path) -> None:
    try:
        job = jobs.get(name)
        if job is None:
            jobs.create(train_job(name, spec, content, jobs.owners()))
            note(f"train: TrainJob {name} of {spec['trainer']['numNodes']} nodes is started")
        else:
            note(f"train: TrainJob {name} of an earlier try is under way; this one waits for it")
        _follow(jobs, name, content, folder)
    except (SystemExit, KeyboardInterrupt):
        # Nobody may come back for it: its GPUs must not stay taken. The next try goes on after its checkpoint.
        with suppress(UserError):
            jobs.delete(name, patience_s=10)
        raise


def _follow(jobs: TrainJobs, name: str, content: str, folder: Path) -> None:
    """The job is complete; on the way, what changes is told."""
    told = ""
    while True:
        job = jobs.get(name)
        if job is None:
            raise UserError(
                f"the TrainJob {name} was deleted by somebody; start the run again: it goes on where it was"
            )
        if (job["metadata"].get("annotations") or {}).get(CONTENT) != content:
            raise UserError(f"the TrainJob {name} was replaced by that of another training; start the run again")
        state = _ended(job)
        if state == "Complete":
            return
        if state == "Failed":
            raise UserError(_failure(job, name, folder))
        now = _state(job)
        if now != told:
            note(f"train: TrainJob {name}: {now}")
            told = now
        time.sleep(POLL_S)


def _ended(job: Item) -> str | None:
    """'Complete' or 'Failed', where it is either."""
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


def _state(job: Item) -> str:
    status = job.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "Suspended" and condition["status"] == "True":
            return "is suspended: its queue has no room for it, or somebody suspended it"
    counts = {one["name"]: one for one in status.get("jobsStatus") or []}.get("node")
    if counts is None:
        return "waits for its pods"
    return "all nodes are up" if counts.get("ready") else "nodes are starting, or starting again"


def _failure(job: Item, name: str, folder: Path) -> str:
    conditions = {one["type"]: one for one in job["status"]["conditions"]}
    told = []
    for file in sorted((folder / FAILURES).glob("*.json")):
        with suppress(UserError):
            told.append(artifacts.read_json(file, "the training"))
    # Whoever lost another worker only says that there was a reason.
    told.sort(key=lambda one: bool(one.get("is_loss")))
    own = (
        f"{told[0]['worker']} says: {told[0]['message']}" if told else conditions["Failed"].get("message", "no reason")
    )
    return f"the TrainJob {name} failed: {own}; 'kubectl describe jobset {name}' and the logs of its pods tell more"


def _spec(nodes: Item, image: str, run_id: str, folder: Path) -> Item:
    resources = nodes["resources"]
    return {
        "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": RUNTIME},
        "trainer": {
            "image": image,
            "command": ["python3", "-m", WORKER, str(folder)],
            "env": [{"name": "MLFLOW_RUN_ID", "value": run_id}],
            "numNodes": nodes["nodes"],
            "resourcesPerNode": {"requests": resources, "limits": resources},
        },
    }


def _job_name() -> str:
    run = os.environ.get(PIPELINE_RUN_VARIABLE, "").strip()
    if not run:
        raise UserError(f"{PIPELINE_RUN_VARIABLE} is not set: this is no pod of the pipeline; run 'braintumor train'")
    return f"braintumor-{hashlib.sha256(run.encode()).hexdigest()[:12]}"


def _shared_folder(name: str) -> Path:
    """The job's folder in the cache; those that nobody came back for are gone."""
    cache = os.environ.get(CACHE, "").strip()
    if not cache:
        raise UserError(f"{CACHE} is not set, which names the volume that all nodes share; set it in addresses.env")
    root = Path(cache) / JOBS
    for other in root.iterdir() if root.is_dir() else []:
        with suppress(OSError):
            if NAME.fullmatch(other.name) and other.name != name and time.time() - other.stat().st_mtime > MAX_AGE_S:
                shutil.rmtree(other)
    return root / name


def _asked(folder: Path) -> str | None:
    """Of which content the folder is."""
    try:
        return str(artifacts.read_json(folder / REQUEST, "the task train").get("content"))
    except UserError:
        return None


def _fill(folder: Path, splits: Path, request: Item) -> None:
    """The folder holds what the workers start from, and nothing of an earlier job."""
    for name in (MODEL, FAILURES):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.replacing_directory(folder / SPLIT) as copy:
        shutil.copytree(splits, copy, dirs_exist_ok=True)
    # Last: whoever finds it finds all.
    artifacts.write_json(folder / REQUEST, request)


def _take(trained: Path, model: Path, made: MadeSplit) -> None:
    """`model` is a copy of what the workers left, and its digests are those that it names."""
    if not (trained / artifacts.TRAINING).is_file():
        raise UserError(
            f"the training left no model at {trained}; is the volume of its nodes the one of this task? compare "
            f"cluster.cache_claim with the TrainingRuntime {RUNTIME}"
        )
    with artifacts.replacing_directory(model) as copy:
        shutil.copytree(trained, copy, dirs_exist_ok=True)
        told = artifacts.read_json(copy / artifacts.TRAINING, "the training")
        facts = {
            "data_md5": made.data_md5,
            "splits_sha256": made.sha256,
            "model_digest": model_digest(copy / artifacts.MODEL),
            "seen_images_sha256": artifacts.sha256_of_file(copy / artifacts.SEEN_IMAGES),
            "calibration_sha256": artifacts.sha256_of_file(copy / artifacts.CALIBRATION),
        }
        if wrong := [name for name, value in facts.items() if told.get(name) != value]:
            raise UserError(
                f"the model at {trained} is not what its training left ({', '.join(wrong)}); delete that folder and "
                "start the run again"
            )


def _is_answer(error: Any) -> bool:
    """Whether 'not found' is about the object, and 'conflict' about one that is there: both are answers."""
    try:
        reason = json.loads(error.body or "")["reason"]
    except (ValueError, KeyError, TypeError):
        return False
    return (error.status, reason) in ((404, "NotFound"), (409, "AlreadyExists"))


def _in_words(error: Any, namespace: str) -> UserError:
    try:
        message = str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        message = str(error.body or error.reason).strip()[:300]
    if error.status in (401, 403):
        return UserError(
            f"the Kubernetes API refuses TrainJobs in {namespace}: {message}; apply k8s/overlays/training, which gives "
            "the right"
        )
    if error.status == 404:
        return UserError(
            "the cluster knows no TrainJobs: install Kubeflow Trainer 2, or set cluster.training_nodes to 1 and "
            "compile again"
        )
    return UserError(f"the Kubernetes API does not take the TrainJob ({error.status}): {message}")
