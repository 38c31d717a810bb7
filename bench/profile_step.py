"""Where the time of a training step goes, by operations: plain Keras and this project, by TensorFlow's profiler.

    python bench/profile_step.py --images build/bench/images.csv

Writes a Markdown table of the share of each kind of operation, as summed over both cores' threads. XLA is off.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run import AUGMENTATION, TINY, WEIGHTS

STEPS = 5
# The first that matches names the kind.
KINDS = {
    "convolution, backward": r"Conv2DBackprop|ConvBackprop",
    "convolution, forward": r"Conv2D",
    "BatchNorm": r"BatchNorm|Rsqrt",
    "ReLU": r"Relu",
    "concatenation, and its gradient": r"Concat|Slice|Split|StridedSlice|^Pad",
    "pooling": r"Pool",
    "optimiser": r"ResourceApply|ApplyAdam|Assign|Sqrt|Pow",
    "augmentation": r"ImageProjective|Stateless",
    "sums of gradients": r"^AddN$|^Sum$|^BroadcastTo$",
    "other arithmetic": r"^(Mul|AddV?2?|Sub|RealDiv|Square|Neg|Maximum|Minimum|BiasAdd.*|MatMul|Softmax.*|Cast|Mean)$",
}
# They hold other operations, which are counted themselves.
CALLS = r"Call|^If$|^While$|^StatelessIf$|Function"


def main() -> None:
    """Profile each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("build/bench/images.csv"), help="that bench/run.py listed")
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a network of few layers")
    parser.add_argument("--of", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.images.is_file():
        parser.error(f"--images: there is no {options.images}; make bench writes it")
    if options.of:
        print(json.dumps(profile(options)))
        return
    found = {}
    for whose in ("plain", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--of", whose]
        found[whose] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    sums = {whose: sum(kinds.values()) for whose, (kinds, _) in found.items()}
    print("| operations | plain Keras, ms a step | share | ours, ms a step | share |\n|---|---|---|---|---|")
    for kind in [*KINDS, "other"]:
        cells = [
            f"{found[whose][0].get(kind, 0):.0f} | {found[whose][0].get(kind, 0) / sums[whose]:.1%}" for whose in found
        ]
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"| all | {sums['plain']:.0f} | | {sums['ours']:.0f} | |")
    print(f"| a step, wall clock | {found['plain'][1]:.0f} | | {found['ours'][1]:.0f} | |")


def profile(options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """(ms a step of each kind of operation, ms a step by the clock)."""
    import tensorflow as tf

    step = {"plain": plain_step, "ours": our_step}[options.of](options)
    for _ in range(3):
        step()
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        started = time.monotonic()
        for _ in range(STEPS):
            step()
        wall = time.monotonic() - started
        tf.profiler.experimental.stop()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        kinds = kinds_of(trace)
    return {kind: ms / STEPS for kind, ms in kinds.items()}, 1000 * wall / STEPS


def kinds_of(trace: Path) -> Counter[str]:
    """Milliseconds of the operations in a trace, by their kind."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(trace.read_bytes())
    found: Counter[str] = Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                # 'name/of/the/node:Operation'; other events are the runtime's own, and hold operations.
                name, colon, operation = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if (
                    colon
                    and name
                    and not name.endswith(":")
                    and re.fullmatch(r"_?[A-Z]\w+", operation)
                    and not re.search(CALLS, operation)
                ):
                    kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, operation)), "other")
                    found[kind] += event.duration_ps / 1e9
    return found


def spec_of(options: argparse.Namespace) -> dict[str, Any]:
    """What both peers are built by."""
    return {
        "images": str(options.images), "size_px": options.size_px, "batch_size": options.batch_size, "seed": 20,
        "dropout": 0.2, "augmentation": AUGMENTATION, "weights": None if options.tiny else str(WEIGHTS), "jit": False,
        "n_train": options.batch_size, "n_val": 8, "epochs": 1, "started": 0.0,
        **({"layers": TINY} if options.tiny else {}),
    }  # fmt: skip


def plain_step(options: argparse.Namespace) -> Callable[[], Any]:
    """A step of plain Keras on images that are decoded already."""
    import plain_keras

    spec = spec_of(options)
    train, _ = plain_keras.generators(spec)
    _, model = plain_keras.build(spec)
    plain_keras.compile_model(model, spec, 1e-5)
    images, labels = train[0]
    return lambda: model.train_on_batch(images, labels)


def our_step(options: argparse.Namespace) -> Callable[[], Any]:
    """A step of this project, with its augmentation."""
    import ours

    from braintumor.model.batches import batches
    from braintumor.model.training import sample_weights

    bench = ours.Bench(spec_of(options) | {"changes": {"optimizer": "adam", "weight_decay": 0}})
    data, params = bench.train, bench.params
    (batch,) = batches(data.images, data.labels, sample_weights(data.labels, params), params, 1)

    def step() -> None:
        bench.engine.train(batch, len(batch.weights))
        bench.wait()

    return step


if __name__ == "__main__":
    main()
