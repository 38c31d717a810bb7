"""What worker processes on this machine cost and bring: images a second at the same global batch, and the all-reduce.

    python bench/workers.py --workers 2

All processes share the machine's processors evenly, so that the ratio to one process, which has them all, is what the
all-reduce, the padding and the waiting for each other leave. Nothing is gained here: that takes nodes of their own.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size-px", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="after two that are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns")
    parser.add_argument("--in-worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_worker:
        Path(options.in_worker).write_text(json.dumps(measure(options)), encoding="utf-8")
        return
    cores = len(os.sched_getaffinity(0))
    ratios = []
    for _ in range(options.rounds):
        [one] = run(1, cores, options)
        several = run(options.workers, max(1, cores // options.workers), options)
        slowest = max(several, key=lambda worker: float(worker["step_s"]))
        # The same batch in both.
        ratios.append(one["step_s"] / slowest["step_s"])
        print(
            f"1 process, {cores} threads: {options.batch_size / one['step_s']:.2f} images/s; {options.workers} workers "
            f"of {max(1, cores // options.workers)}: {options.batch_size / slowest['step_s']:.2f} images/s, ratio "
            f"{ratios[-1]:.2f}; all-reduce of {slowest['parameters'] / 1e6:.1f} M numbers {slowest['reduce_s']:.3f} s, "
            f"{slowest['reduce_s'] / slowest['step_s']:.1%} of a step",
            flush=True,
        )
    print(f"ratio, median of {len(ratios)}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def run(workers: int, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each of so many processes measured."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(workers)]
        processes = []
        for rank, result in enumerate(results):
            environ = os.environ | {"OMP_NUM_THREADS": str(threads), "TF_NUM_INTRAOP_THREADS": str(threads)}
            if workers > 1:
                cluster = {"worker": addresses}
                environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}})
            command = [sys.executable, __file__, *sys.argv[1:], "--in-worker", str(result)]
            processes.append(subprocess.Popen(command, env=environ))
        # A worker that is left alone would wait for the others.
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.1)
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
                process.wait()
            sys.exit("Error: a worker failed; what it said stands above")
        return [json.loads(result.read_text(encoding="utf-8")) for result in results]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a training step of DenseNet201, and of a sum of its gradients over the workers."""
    from braintumor.model import training
    from braintumor.model.batches import batches
    from braintumor.model.densenet import build_classifier, import_keras
    from braintumor.model.distribution import end_together, make_strategy, placement, sum_over_workers
    from braintumor.params import load_profile

    import_keras()
    distribution = "multi_worker" if "TF_CONFIG" in os.environ else "one_device"
    place = placement(distribution, os.environ)
    strategy = make_strategy(place, distribution)
    changes = {"image_size_px": options.size_px, "batch_size": options.batch_size, "distribution": distribution}
    params = load_profile("sample").train.model_copy(update=changes)
    training.make_reproducible(params.seed)
    n = options.batch_size * (options.steps + 2)
    images = np.random.default_rng(0).integers(0, 256, (n, options.size_px, options.size_px, 1), np.uint8)
    labels = np.arange(n) % 4
    engine = training.make_engine(build_classifier(params), params, n, strategy, place)
    fed = batches(images, labels, np.ones(n, np.float32), params, 1, 0, place.rank, place.workers)
    steps = []
    for batch in fed:
        started = time.monotonic()
        engine.train(batch, options.batch_size)
        # A device works on after it was asked.
        assert engine.sums.images > 0
        steps.append(time.monotonic() - started)
    gradients = np.zeros(sum(len(engine.state()[name]) for name in ("decayed", "undecayed")), np.float32)
    reductions = []
    for _ in range(6 if place.workers > 1 else 0):
        started = time.monotonic()
        sum_over_workers(strategy, gradients)
        reductions.append(time.monotonic() - started)
    end_together(strategy, place)
    return {
        "step_s": statistics.median(steps[2:]),
        "reduce_s": statistics.median(reductions[1:]) if reductions else 0.0,
        "parameters": len(gradients),
    }


if __name__ == "__main__":
    main()
