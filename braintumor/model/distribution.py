"""Who trains together: the place of this process among the workers, and the strategy that joins them.

A worker is a process with all the devices of its node. Every worker runs the same program on its share of each batch;
rank 0 alone reads and writes checkpoints and the model.
"""

import hashlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

TF_CONFIG = "TF_CONFIG"
# What Kubeflow Trainer 2 sets in every pod of a TrainJob whose runtime has the policy `torch`.
NODES, NODE_RANK = "PET_NNODES", "PET_NODE_RANK"
FIRST_HOST, FIRST_PORT = "PET_MASTER_ADDR", "PET_MASTER_PORT"
# What Kubernetes sets in every pod of an indexed Job, and what k8s/training/jobset adds to it.
JOB_INDEX = "JOB_COMPLETION_INDEX"
WORKERS, JOBSET, REPLICATED_JOB = "BRAINTUMOR_WORKERS", "BRAINTUMOR_JOBSET", "BRAINTUMOR_REPLICATED_JOB"
PORT = 29500
# The first pod of the first job of a JobSet: <set>-<job>-<number of the job>-<number of the pod>.<subdomain>.
FIRST_OF_A_JOBSET = re.compile(r"([a-z0-9](?:[-a-z0-9]*[a-z0-9])?-[0-9]+)-0\.([a-z0-9.-]*[a-z0-9])")
PEER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")

# A pod may wait for its image, or for a volume, while the others stand ready.
START_TIMEOUT_S = 1800
# The leader takes a worker for lost that was silent for so long, and tells all others.
HEARTBEAT_TIMEOUT_S = 30
# Between two all-reduces rank 0 may write a checkpoint, or a worker read its images, for minutes.
STEP_TIMEOUT_S = 1800
CHUNK_BYTES = 1 << 26


class WorkerLost(UserError):
    """Another worker of this training is gone: nobody's mistake, so that all are started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; k8s/training restarts after it, and not after a mistake


@dataclass(frozen=True)
class Placement:
    """This process is worker `rank` of `workers`; `peers` are all their addresses in the order of rank, if several."""

    rank: int = 0
    workers: int = 1
    peers: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that reads and writes for all."""
        return self.rank == 0


def placement(distribution: str, environ: Mapping[str, str]) -> Placement:
    """The place of this process by `train.distribution` and the environment that its orchestrator gave it.

    Raises UserError, naming the variable, where pieces are missing or contradict each other or the parameter.
    """
    given = {name: environ.get(name, "").strip() for name in (TF_CONFIG, NODES, WORKERS)}
    if distribution != "multi_worker":
        _refuse_others(given, distribution)
        return Placement()
    if given[TF_CONFIG]:
        place = _of_tf_config(given[TF_CONFIG])
        if given[NODES] and _of_trainer(environ) != place:
            raise UserError(f"{TF_CONFIG} and {NODES} tell of different workers; unset one of them")
        return place
    if given[NODES]:
        return _of_trainer(environ)
    if given[WORKERS]:
        return _of_jobset(environ)
    raise UserError(
        f"train.distribution is 'multi_worker', but none of {TF_CONFIG}, {NODES} and {WORKERS} tells who the workers "
        "are; run the pipeline with cluster.training_nodes above 1, apply k8s/training/jobset, or take 'one_device' "
        "or 'mirrored'"
    )


def make_strategy(place: Placement, distribution: str) -> "tf.distribute.Strategy":
    """The strategy of this parameter; of several workers, all are there when it returns.

    To be called before TensorFlow does anything else: a context that has computed can't join a cluster. Raises
    UserError, with their names, for workers that did not come.
    """
    import tensorflow as tf

    if place.workers == 1:
        if distribution == "one_device":
            return tf.distribute.get_strategy()
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if place.is_first:
        # TensorFlow's leader would wait without an end, and say for whom nowhere.
        _await_peers(place.peers[1:], START_TIMEOUT_S)
    _configure_heartbeat(place.workers)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(place.peers)}), task_type="worker", task_id=place.rank, rpc_layer="grpc"
    )
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        timeout_seconds=float(STEP_TIMEOUT_S),
        implementation=kinds.NCCL if tf.config.list_physical_devices("GPU") else kinds.RING,
    )
    try:
        with _own_sigterm():
            return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
    except tf.errors.OpError as error:
        raise UserError(
            f"worker {place.rank} at {place.peers[place.rank]} did not come together with {place.peers[0]}: "
            f"{str(error).splitlines()[0]}; look at the log of worker 0, and whether the pods may reach each other"
        ) from error


@contextmanager
def lost_workers_as_message(place: Placement) -> Iterator[None]:
    """The loss of another worker in the block is a WorkerLost that says so, within about a minute of the loss."""
    import tensorflow as tf

    lost = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
    )
    try:
        yield
    except lost as error:
        if place.workers == 1:
            raise
        named = re.search(r"/job:worker/(?:replica:0/)?task:([0-9]+)", str(error))
        who = f"worker {named[1]} at {place.peers[int(named[1])]}" if named else "a worker"
        raise WorkerLost(
            f"{who} of this training was lost, or is out of reach; start all workers again: they go on after the last "
            "checkpoint"
        ) from error


def sum_over_workers(strategy: "tf.distribute.Strategy", numbers: NDArray[Any]) -> NDArray[Any]:
    """The sum of the workers' float32, float64 or int64 arrays of the same shape, the same on all of them."""
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return numbers.copy()
    flat = np.ascontiguousarray(numbers).reshape(-1)
    size = max(1, CHUNK_BYTES // flat.itemsize)
    add = _adder(strategy, flat.dtype)
    parts = [add(flat[start : start + size]) for start in range(0, len(flat), size)]
    return np.concatenate(parts).reshape(numbers.shape) if parts else numbers.copy()


def broadcast(
    strategy: "tf.distribute.Strategy", place: Placement, arrays: Mapping[str, NDArray[Any]] | None
) -> dict[str, NDArray[Any]] | None:
    """Rank 0's arrays, or None, on every worker, to the last bit; what the others give is not looked at."""
    if place.workers == 1:
        return None if arrays is None else {name: np.array(value) for name, value in arrays.items()}
    values = {name: np.asarray(value) for name, value in (arrays or {}).items()} if place.is_first else {}
    heading = {"arrays": None if arrays is None else [[name, v.dtype.str, v.shape] for name, v in values.items()]}
    text = _broadcast_bytes(strategy, place, json.dumps(heading).encode())
    expected = json.loads(text)["arrays"]
    if expected is None:
        return None
    found = {}
    for name, dtype, shape in expected:
        content = values[name].tobytes() if place.is_first else b""
        received = _broadcast_bytes(strategy, place, content)
        found[name] = np.frombuffer(received, np.dtype(dtype)).reshape(shape).copy()
    return found


def agree(strategy: "tf.distribute.Strategy", place: Placement, facts: Mapping[str, str]) -> None:
    """All workers have the same facts. Raises UserError on all of them, naming the facts in which they differ."""
    if place.workers == 1:
        return
    digests = [hashlib.sha256(f"{name}={value}".encode()).digest() for name, value in facts.items()]
    told = np.zeros((place.workers, len(digests), 4), np.int64)
    told[place.rank] = np.frombuffer(b"".join(digests), np.int64).reshape(-1, 4)
    told = sum_over_workers(strategy, told)
    for index, name in enumerate(facts):
        others = [rank for rank in range(1, place.workers) if (told[rank, index] != told[0, index]).any()]
        if others:
            numbers = ", ".join(map(str, others))
            raise UserError(
                f"{name} of worker {numbers} differs from that of worker 0; give all workers the same image, "
                "parameters and data"
            )


def end_together(strategy: "tf.distribute.Strategy", place: Placement) -> None:
    """All workers have come here, however long the first one had yet to do; that, then, ends well in any case.

    An orchestrator starts all workers again where one fails, but can't where some have ended well; and the first would
    find that those who left are lost.
    """
    import tensorflow as tf

    if place.workers == 1:
        return
    # Heartbeats tell of who is lost meanwhile.
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=None)

    @tf.function(autograph=False)
    def meet() -> Any:
        def on_a_replica() -> Any:
            return tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(1), options)

        return strategy.run(on_a_replica)

    try:
        strategy.experimental_local_results(meet())[0].numpy()
    except tf.errors.OpError:
        # Its work is done, and there is nobody left to tell.
        if not place.is_first:
            raise


def _refuse_others(given: Mapping[str, str], distribution: str) -> None:
    # Each of them would train the same for itself, and write it to the same place.
    for name in (NODES, WORKERS):
        if given[name] not in ("", "1"):
            raise UserError(
                f"{name} says {given[name]!r}, but train.distribution is {distribution!r}, which is for one process; "
                f"set it to 'multi_worker', or start one process"
            )
    if given[TF_CONFIG] and (workers := _of_tf_config(given[TF_CONFIG]).workers) > 1:
        raise UserError(
            f"{TF_CONFIG} names {workers} workers, but train.distribution is {distribution!r}; set it to "
            f"'multi_worker', or unset {TF_CONFIG}"
        )


def _of_tf_config(text: str) -> Placement:
    try:
        content = json.loads(text)
        cluster, task = content["cluster"], content["task"]
        roles = {role: list(cluster[role]) for role in cluster}
        role, index = task["type"], task["index"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{TF_CONFIG} is not of the form {{"cluster": {{"worker": ["HOST:PORT", ...]}}, "task": {{"type": '
            f'"worker", "index": 0}}}} ({type(error).__name__}: {error}); mend or unset it'
        ) from error
    if unknown := sorted(set(roles) - {"chief", "worker"}):
        raise UserError(f"{TF_CONFIG} names the role {unknown[0]!r}; training knows 'worker' and 'chief' alone")
    if len(roles.get("chief", [])) > 1:
        raise UserError(f"{TF_CONFIG} names {len(roles['chief'])} chiefs; there is one, or none")
    if (
        role not in list(roles)
        or isinstance(index, bool)
        or not isinstance(index, int)
        or not 0 <= index < len(roles[role])
    ):
        raise UserError(f"{TF_CONFIG} says that this is {role!r} number {index!r}, whom its cluster does not name")
    peers = _checked([*roles.get("chief", []), *roles.get("worker", [])], TF_CONFIG)
    return Placement(index + (len(roles.get("chief", [])) if role == "worker" else 0), len(peers), peers)


def _of_trainer(environ: Mapping[str, str]) -> Placement:
    workers = _number(environ, NODES, 1)
    rank = _number(environ, NODE_RANK, 0)
    _refuse_beyond(rank, workers, NODE_RANK, NODES)
    if environ.get(JOB_INDEX, "").strip() and _number(environ, JOB_INDEX, 0) != rank:
        raise UserError(
            f"{NODE_RANK} is {rank}, but {JOB_INDEX} is {environ[JOB_INDEX]}; unset what is not of this pod"
        )
    host, port = _text(environ, FIRST_HOST), _number(environ, FIRST_PORT, 1)
    if workers == 1:
        return Placement(0, 1, _checked([f"{host}:{port}"], FIRST_HOST))
    pattern = FIRST_OF_A_JOBSET.fullmatch(host)
    if pattern is None:
        raise UserError(
            f"{FIRST_HOST} is {host!r}, from which the other workers can't be told: it is not that of a TrainJob's "
            f"first pod, JOB-node-0-0.JOB; name all workers in {TF_CONFIG}"
        )
    peers = [f"{pattern[1]}-{number}.{pattern[2]}:{port}" for number in range(workers)]
    return Placement(rank, workers, _checked(peers, FIRST_HOST))


def _of_jobset(environ: Mapping[str, str]) -> Placement:
    workers = _number(environ, WORKERS, 1)
    rank = _number(environ, JOB_INDEX, 0)
    _refuse_beyond(rank, workers, JOB_INDEX, WORKERS)
    jobset, job = _text(environ, JOBSET), _text(environ, REPLICATED_JOB)
    peers = [f"{jobset}-{job}-0-{number}.{jobset}:{PORT}" for number in range(workers)]
    return Placement(rank, workers, _checked(peers, f"{JOBSET} or {REPLICATED_JOB}"))


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise UserError(
            f"{name} is not set, which tells who the workers are; start them by the objects in k8s/training, or name "
            f"them in {TF_CONFIG}"
        )
    return value


def _number(environ: Mapping[str, str], name: str, least: int) -> int:
    value = _text(environ, name)
    if not re.fullmatch(r"[0-9]{1,6}", value) or int(value) < least:
        raise UserError(f"{name} is {value!r}; a whole number from {least} on is needed")
    return int(value)


def _refuse_beyond(rank: int, workers: int, name: str, total: str) -> None:
    if rank >= workers:
        raise UserError(f"{name} is {rank}, but {total} is {workers}: ranks go from 0 to {workers - 1}")


def _checked(peers: Sequence[object], name: str) -> tuple[str, ...]:
    for peer in peers:
        match = PEER.fullmatch(peer) if isinstance(peer, str) else None
        if match is None or not 1 <= int(match[2]) <= 65535:
            raise UserError(f"{name} gives the worker {peer!r}, which is no HOST:PORT")
    if len(set(peers)) < len(peers):
        raise UserError(f"{name} names a worker twice: {', '.join(map(str, peers))}")
    return tuple(map(str, peers))


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """SIGTERM does afterwards what it did before: TensorFlow's cluster takes it, and a pod could not be evicted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _await_peers(peers: Sequence[str], timeout_s: float) -> None:
    """Every peer's port is open: its server starts before it looks for the first worker."""
    missing, end = list(peers), time.monotonic() + timeout_s
    while True:
        missing = [peer for peer in missing if not _is_open(peer)]
        if not missing:
            return
        if time.monotonic() > end:
            raise UserError(
                f"{len(missing)} of {len(peers) + 1} workers did not come within {timeout_s / 60:.0f} minutes: "
                f"{', '.join(missing)}; look whether their pods run, and whether this one may reach them"
            )
        time.sleep(0.2)


def _is_open(peer: str) -> bool:
    host, _, port = peer.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    # Until its pod is there, a name is unknown.
    except OSError:
        return False


def _configure_heartbeat(workers: int) -> None:
    # No public call sets it, and MultiWorkerMirroredStrategy keeps what it finds.
    from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
    from tensorflow.python.eager import context

    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=START_TIMEOUT_S * 1000,
        heartbeat_timeout_in_ms=HEARTBEAT_TIMEOUT_S * 1000,
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=workers)],
    )


@lru_cache
def _adder(strategy: "tf.distribute.Strategy", dtype: np.dtype[Any]) -> Any:
    import tensorflow as tf

    n_local = len(strategy.extended.worker_devices)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.as_dtype(dtype))], autograph=False)
    def add(chunk: Any) -> Any:
        def on_a_replica(values: Any) -> Any:
            context = tf.distribute.get_replica_context()
            # A worker has a share for each of its devices, and one thing to say.
            is_speaker = tf.equal(tf.math.floormod(context.replica_id_in_sync_group, n_local), 0)
            return context.all_reduce("SUM", tf.where(is_speaker, values, tf.zeros_like(values)))

        return strategy.experimental_local_results(strategy.run(on_a_replica, args=(chunk,)))[0]

    return lambda values: add(values).numpy()


def _broadcast_bytes(strategy: "tf.distribute.Strategy", place: Placement, content: bytes) -> bytes:
    """Rank 0's bytes on all workers, as whole numbers: a sum of floats with zeros would lose the sign of zero."""
    length = int(sum_over_workers(strategy, np.array([len(content) if place.is_first else 0], np.int64))[0])
    words = np.zeros(-(-length // 8), np.int64)
    if place.is_first:
        words.view(np.uint8)[:length] = np.frombuffer(content, np.uint8)
    return sum_over_workers(strategy, words).tobytes()[:length]
