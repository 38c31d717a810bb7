"""The graph: resolve -> (anything new) -> validate -> split -> train -> evaluate -> gate -> (passed) -> register."""

from collections.abc import Callable

from kfp import dsl, kubernetes
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_channel import PipelineChannel
from kfp.dsl.pipeline_task import PipelineTask

from braintumor.params import ClusterParams, Profile
from components.evaluate import evaluate
from components.gate import gate
from components.gather import gather
from components.match import match
from components.register import register
from components.report import report
from components.resolve import resolve
from components.scan import scan
from components.split import split
from components.train import train
from components.train_on_nodes import train as train_on_nodes
from components.training_job import nodes_request
from components.validate import validate
from components.validate_shards import validate as validate_shards

NAME = "brain-tumor-retraining"
DESCRIPTION = "From a version of the images to a gated version of the classifier. Research, not a diagnostic device."

# Steps without effects: their results may be used again. What owns an MLflow run or registers must run.
PURE = frozenset({"scan", "gather", "match", "validate", "split"})
# Never validate: a critical finding is the same at the second try. Its downloads are tried again within the step.
# Nor report, which would tell its message again.
RETRIES = {
    "resolve": 3,
    "scan": 2,
    "gather": 2,
    "match": 2,
    "split": 2,
    "train": 2,
    "evaluate": 2,
    "gate": 3,
    "register": 3,
}
PAUSE_S, PAUSE_FACTOR = 60, 2
READS_IMAGES = frozenset({"resolve", "scan", "validate", "split", "train", "evaluate"})
ON_GPU = frozenset({"train", "evaluate"})
CACHE = "/cache"

Place = Callable[[PipelineTask, str], PipelineTask]

MLFLOW_ADDRESSES = ("MLFLOW_TRACKING_URI",)
DATA_ADDRESSES = ("BRAINTUMOR_DATA_REMOTE", "BRAINTUMOR_CHECKPOINTS", "BRAINTUMOR_CACHE")
OPTIONAL_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "BRAINTUMOR_CACHE_DAYS", "BRAINTUMOR_CACHE_GB")
MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
WEBHOOK = ("BRAINTUMOR_WEBHOOK",)


def retraining_pipeline(profile: Profile, image: str) -> GraphComponent:
    """The graph for this profile, all its tasks in `image`.

    Its parameters are `dataset` ('latest', the published version, or an md5), `params` (JSON text, the profile's unless
    given) and `force` (train though nothing is new).
    """
    is_pinned = "@sha256:" in image

    def placed(task: PipelineTask, step: str) -> PipelineTask:
        task.set_container_image(image)
        # A tag can move to other code, and Kubeflow's cache sees the image's name alone.
        task.set_caching_options(step in PURE and is_pinned)
        _ask_for_resources(task, step, profile.cluster)
        _pass_environment(task, step, profile.cluster)
        return task

    @dsl.pipeline(name=NAME, description=DESCRIPTION)
    def retraining(dataset: str = "latest", params: str = profile.as_json(), force: bool = False):  # type: ignore[no-untyped-def]
        with dsl.ExitHandler(placed(report(), "report"), name="attempt"):
            resolved = placed(resolve(dataset=dataset, params=params, image=image, force=force), "resolve")
            context, data, run_id = (resolved.outputs[name] for name in ("context", "data", "run_id"))
            with dsl.If(resolved.outputs["Output"] == True, name="anything-new"):  # noqa: E712 -- builds a condition
                validated = _validated(resolved, params, profile.cluster.validation_shards, placed)
                validation = validated.outputs["validation"]
                task = split(
                    dataset=data, validation=validation, validation_digest=validated.outputs["Output"], params=params
                )
                splits = placed(task, "split").outputs["splits"]
                task = _train(profile.cluster, dataset=data, splits=splits, params=params, image=image, run_id=run_id)
                model = placed(task, "train").outputs["model"]
                task = evaluate(
                    dataset=data,
                    validation=validation,
                    splits=splits,
                    model=model,
                    context=context,
                    params=params,
                    run_id=run_id,
                )
                evaluation = placed(task, "evaluate").outputs["evaluation"]
                task = gate(evaluation=evaluation, context=context, validation=validation, params=params, run_id=run_id)
                judged = placed(task, "gate")
                with dsl.If(judged.outputs["Output"] == True, name="passed"):  # noqa: E712 -- builds a condition
                    task = register(
                        model=model,
                        splits=splits,
                        evaluation=evaluation,
                        decision=judged.outputs["decision"],
                        context=context,
                        validation=validation,
                        params=params,
                        run_id=run_id,
                    )
                    placed(task, "register")

    return retraining


def _train(cluster: ClusterParams, **inputs: object) -> PipelineTask:
    """The training in a pod of its own, or, by several nodes, in a TrainJob that the task starts and waits for."""
    if _is_launcher("train", cluster):
        return train_on_nodes(**inputs, nodes=nodes_request(cluster))
    return train(**inputs)


def _is_launcher(step: str, cluster: ClusterParams) -> bool:
    return step == "train" and cluster.training_nodes > 1


def _validated(resolved: PipelineTask, params: PipelineChannel, shards: int, placed: Place) -> PipelineTask:
    """The task `validate`; with several `shards`, after tasks that share its work: scan, gather and match."""
    data = resolved.outputs["data"]
    checked = {"dataset": data, "context": resolved.outputs["context"], "params": params}
    checked["context_digest"] = resolved.outputs["context_digest"]
    if shards == 1:
        return placed(validate(**checked), "validate")
    with dsl.ParallelFor(list(range(shards)), name="scans") as share:
        scanned = placed(scan(dataset=data, params=params, share=share, shares=shards), "scan")
    # What the loop collects can't go into the next loop as it is: kfp has no list of artifacts there.
    gathered = gather(
        scans=dsl.Collected(scanned.outputs["scanned"]), scan_digests=dsl.Collected(scanned.outputs["Output"])
    )
    found = placed(gathered, "gather").outputs
    with dsl.ParallelFor(list(range(shards)), name="matches") as share:
        # Of another task's outputs only artifacts: kfp's runner on one machine puts the loop's item for a parameter.
        task = match(search=found["search"], dataset=data, params=params, share=share, shares=shards)
        matched = placed(task, "match")
    task = validate_shards(
        **checked,
        survey=found["survey"],
        survey_digest=found["Output"],
        matches=dsl.Collected(matched.outputs["matched"]),
        match_digests=dsl.Collected(matched.outputs["Output"]),
    )
    return placed(task, "validate")


def _ask_for_resources(task: PipelineTask, step: str, cluster: ClusterParams) -> None:
    resources = {"train": cluster.train, "evaluate": cluster.evaluate}.get(step, cluster.steps)
    if _is_launcher(step, cluster):
        resources = cluster.steps.model_copy(update={"timeout_minutes": cluster.train.timeout_minutes})
    task.set_cpu_request(resources.cpu).set_cpu_limit(resources.cpu)
    task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    kubernetes.set_timeout(task, resources.timeout_minutes * 60)
    if step in RETRIES:
        # Argo's limit is on all tries and pauses together, and ends the try that is under way.
        pauses = sum(PAUSE_S * PAUSE_FACTOR**number for number in range(RETRIES[step]))
        longest = (RETRIES[step] + 1) * resources.timeout_minutes * 60 + pauses
        task.set_retry(
            RETRIES[step],
            backoff_duration=f"{PAUSE_S}s",
            backoff_factor=float(PAUSE_FACTOR),
            backoff_max_duration=f"{longest}s",
        )
    user = cluster.run_as_user
    kubernetes.set_security_context(task, run_as_user=user, run_as_group=user, run_as_non_root=True)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.add_pod_label(task, "app.kubernetes.io/name", "braintumor")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", step)
    if step not in ON_GPU or _is_launcher(step, cluster):
        return
    # The default of 64 MB is too little for what processes share.
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=cluster.shared_memory)
    if cluster.gpu is not None:
        task.set_accelerator_type(cluster.gpu.resource).set_accelerator_limit(cluster.gpu.count)
        for key, value in sorted(cluster.gpu.node_selector.items()):
            kubernetes.add_node_selector(task, key, value)
        for taint in cluster.gpu.tolerations:
            kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)


def _pass_environment(task: PipelineTask, step: str, cluster: ClusterParams) -> None:
    # Kubeflow's label on every pod of a run. Not an input: it would keep every cached result from being used.
    kubernetes.use_field_path_as_env(task, "BRAINTUMOR_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    kubernetes.use_config_map_as_env(task, cluster.addresses, _as_named(MLFLOW_ADDRESSES))
    keys: tuple[str, ...] = MLFLOW_KEYS
    if step in READS_IMAGES:
        kubernetes.use_config_map_as_env(task, cluster.addresses, _as_named(DATA_ADDRESSES))
        kubernetes.use_config_map_as_env(task, cluster.addresses, _as_named(OPTIONAL_SETTINGS), optional=True)
        kubernetes.mount_pvc(task, cluster.cache_claim, CACHE)
        keys += S3_KEYS
    if step == "report":
        keys += WEBHOOK
    # Optional: pods may have a cloud's own identity instead of keys, and MLflow may ask for no password.
    kubernetes.use_secret_as_env(task, cluster.credentials, _as_named(keys), optional=True)


def _as_named(names: tuple[str, ...]) -> dict[str, str]:
    return {name: name for name in names}
