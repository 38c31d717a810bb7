"""Everything side by side: this project's training, the same recipe in plain Keras, and PyTorch's DenseNet201.

    python bench/run.py --dataset data --output build/bench            (make bench)
    python bench/run.py --full --torch-python ~/torch/bin/python

Each measurement is a process of its own, so that compilation and memory are its own; rivals take turns (A, B, A, B), so
that what else the machine does meets both. Writes samples.json after every measurement, and from it table.md and plots;
`--table-only` draws them anew. Nothing here is a test: a figure is what it is on the machine named above the table.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from trial import CLASSES

from braintumor.artifacts import write_text

HERE = Path(__file__).parent
SAMPLES = "samples.json"
WEIGHTS = Path("weights/densenet201-phantoms.weights.h5")
LIBRARIES = ("tensorflow", "keras", "numpy", "pillow", "scipy")
GROUPS = ("input", "head", "step", "accuracy", "levers", "torch")
TINY = [1, 1, 1, 1]
# Weak enough for scans of either kind; brightness in plain Keras, contrast here.
AUGMENTATION = {
    "rotation_degrees": 10, "shift_fraction": 0.05, "zoom_fraction": 0.08, "contrast_fraction": 0.1,
    "flip_horizontal": True,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One measurement; `repeats` of None are as many as --repeats, `estimate_s` is on two idle cores."""

    group: str
    name: str
    told: str
    peer: str
    spec: dict[str, Any]
    estimate_s: float
    repeats: int | None = None


@dataclass
class Samples:
    """All that was measured, and where."""

    machine: dict[str, Any]
    options: dict[str, Any]
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)  # group/name -> what is told of it
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def main() -> None:
    """Measure what was asked for, and write table and plots."""
    options = parsed()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / SAMPLES
    if not options.table_only:
        measure(options, file)
    import tables

    samples = json.loads(file.read_text(encoding="utf-8"))
    table = tables.table_of(samples)
    write_text(options.output / "table.md", table)
    tables.draw(samples, options.output)
    print(table)
    if tables.failures(samples):
        sys.exit("Error: some measurements failed; the last lines of the table name them")


def parsed() -> argparse.Namespace:
    """The options, with defaults that depend on others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"), help="class folders within train or Training")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--full", action="store_true", help="more images and repeats; hours on two cores")
    parser.add_argument("--repeats", type=int, help="of each measurement; default 2, with --full 5")
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--target", type=float, help="validation accuracy that is raced to; default: plain Keras' best")
    parser.add_argument(
        "--budget", type=float, help="seconds that each recipe of the race has; default 600, --full 3600"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[20], help="of the race")
    parser.add_argument("--torch-python", type=Path, help="a Python with torch, torchvision and timm; none: left out")
    parser.add_argument("--tiny", action="store_true", help="a network of few layers: tries the benchmark itself")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.torch_python and not options.torch_python.is_file():
        parser.error(f"--torch-python: there is no {options.torch_python}")
    if options.only == ["torch"] and not options.torch_python:
        parser.error("--only torch needs --torch-python")
    if options.table_only and not (options.output / SAMPLES).is_file():
        parser.error(f"--table-only: there is no {options.output / SAMPLES}")
    options.repeats = options.repeats or (5 if options.full else 1 if options.tiny else 2)
    options.budget = options.budget or (3600 if options.full else 60 if options.tiny else 600)
    return options


def measure(options: argparse.Namespace, file: Path) -> None:
    """All trials of the groups, repeated in turns."""
    images = options.output / "images.csv"
    n_train, n_val = list_images(options, images)
    samples = Samples(machine_facts(), {name: str(value) for name, value in vars(options).items()})
    samples.options |= {"train_images": n_train, "val_images": n_val}
    groups = {
        group: [trial for trial in trials_of(options, images.resolve()) if trial.group == group]
        for group in options.only
    }
    total = sum(
        trial.estimate_s
        * (len(options.seeds) if trial.group == "accuracy" else min(options.repeats, trial.repeats or options.repeats))
        for group in groups.values()
        for trial in group
    )
    print(f"About {total / 60:.0f} minutes on two idle cores of 2.5 GHz", flush=True)
    for group, trials in groups.items():
        if group == "accuracy":
            race(options, trials, samples, file)
            continue
        for repeat in range(options.repeats):
            for trial in trials:
                if repeat < (trial.repeats or options.repeats):
                    take(options, trial, samples, file)


def race(options: argparse.Namespace, trials: list[Trial], samples: Samples, file: Path) -> None:
    """All recipes in turn for each seed, each with the same seconds: none is tuned to a target that it knows."""
    for seed in options.seeds:
        for trial in trials:
            take(options, trial, samples, file, {"seed": seed})


def take(
    options: argparse.Namespace, trial: Trial, samples: Samples, file: Path, more: dict[str, Any] | None = None
) -> None:
    """One measurement in a new process, kept in `file`; a failure is kept as its message."""
    key = f"{trial.group}/{trial.name}"
    print(f"{time.strftime('%H:%M:%S')}  {key} ...", end=" ", flush=True)
    python = str(options.torch_python) if trial.peer == "plain_torch" else sys.executable
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        result_file = Path(scratch) / "result.json"
        spec = trial.spec | (more or {}) | {"started": time.monotonic()}
        run = subprocess.run(
            [python, str(HERE / f"{trial.peer}.py"), json.dumps(spec), str(result_file)],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if run.returncode or not result_file.is_file():
            last = (run.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            result = {"failed": f"exit code {run.returncode}: {last[:300]}"}
        else:
            result = json.loads(result_file.read_text(encoding="utf-8"))
    result |= {"load_before": round(load, 1), **(more or {})}
    samples.trials[key] = asdict(trial)
    samples.results.setdefault(key, []).append(result)
    write_text(file, json.dumps(asdict(samples), indent=1))
    print(result.get("failed") or f"{result['seconds_in_all']:.0f} s, {result['peak_mib']:.0f} MiB", flush=True)


def trials_of(options: argparse.Namespace, images: Path) -> list[Trial]:
    """What is measured, in this order; rivals of a group take turns."""
    blocks = {"layers": TINY} if options.tiny else {}
    weights = None if options.tiny else str(WEIGHTS.resolve())
    base = {
        "images": str(images), "size_px": options.size_px, "batch_size": options.batch_size, "seed": 20,
        "dropout": 0.2, "augmentation": AUGMENTATION, "weights": weights, **blocks,
    }  # fmt: skip
    if options.tiny:
        # Without weights there would be no head phase, and BatchNorm would train.
        base["weights"] = str(tiny_weights(options))
    n = 96 if options.tiny else 2000 if options.full else 320
    n_head = 96 if options.tiny else 2000
    n_step = n if options.full or options.tiny else 640
    once = None if options.full else 1
    few = 64 if options.tiny else 640 if options.full else 128
    px = (options.size_px / 64) ** 2
    forward, step = 0.016 * n_head * px, 0.026 * n_step * px

    def spec(**more: Any) -> dict[str, Any]:
        return base | {"n_train": n, "n_val": 64} | more

    head = {"what": "head", "epochs": 10, "n_train": n_head}
    fine = {"what": "fine_tune", "epochs": 4, "learning_rate": 1e-5, "n_train": n_step}
    ours_fine = fine | {"changes": {"optimizer": "adam", "learning_rate": 1e-5, "weight_decay": 0}}
    found = [
        Trial("input", "ours", "batches of this project", "ours", spec(what="pipeline", epochs=20, n_train=2 * n), 9),
        Trial("input", "plain", "ImageDataGenerator", "plain_keras", spec(what="pipeline", epochs=2), 9),
        Trial("head", "ours", "features once, one view", "ours", spec(**head, head_epochs=10), 18 + forward),
        Trial("head", "plain", "plain Keras: frozen `fit`, every epoch through the backbone", "plain_keras",
              spec(**head), 20 + 10 * forward),
        Trial("head", "ours-4", "features once, four views", "ours",
              spec(**head, head_epochs=10, changes={"head_views": 4}), 20 + 4 * forward, once),
        Trial("step", "ours", "this project, Adam", "ours", spec(**ours_fine), 22 + 4 * step),
        Trial("step", "plain", "plain Keras, Adam", "plain_keras", spec(**fine), 60 + 6 * step),
        Trial("step", "plain-frozen", "plain Keras, Adam, BatchNorm frozen", "plain_keras",
              spec(**fine, batch_norm="frozen"), 25 + 4 * step),
        Trial("step", "plain-sgd", "plain Keras, SGD", "plain_keras",
              spec(**fine, optimizer="sgd"), 30 + 6 * step, once),
    ]  # fmt: skip
    if options.full or options.tiny:
        told = "plain Keras, Adam, BatchNorm learns"
        found += [
            Trial("step", "plain-bn", told, "plain_keras", spec(**fine, batch_norm="train"), 120 + 7 * step),
            Trial("step", "plain-xla", "plain Keras, Adam, XLA", "plain_keras", spec(**fine, jit=True), 263 + 6 * step),
        ]
    found += race_trials(options, base)
    found += lever_trials(options, base | {"n_train": few, "n_val": 64}, few * 0.026 * px)
    if options.torch_python:
        found += torch_trials(options, base, 12 * options.batch_size * 0.03 * px)
    return found


def race_trials(options: argparse.Namespace, base: dict[str, Any]) -> list[Trial]:
    """Accuracy over time: ours, plain as the reference has it, and plain with our learning rate."""
    n = {"n_train": 96, "n_val": 64} if options.tiny else {} if options.full else {"n_train": 1000, "n_val": 600}
    race = base | n | {"what": "race", "budget_s": options.budget, "epochs": 25}
    plain = race | {"head_epochs": 5}
    own = {"optimizer": "adamw", "learning_rate": 3e-4, "weight_decay": 1e-4, "head_learning_rate": 0.003}
    return [
        Trial("accuracy", "ours", "this project: head on features, AdamW 3e-4 with cosine", "ours",
              race | {"head_epochs": 20, "changes": own}, options.budget),
        Trial("accuracy", "plain", "plain Keras, Adam 1e-5", "plain_keras",
              plain, options.budget),
        Trial("accuracy", "plain-our-rate", "plain Keras, Adam 3e-4, held constant", "plain_keras",
              plain | {"learning_rate": 3e-4}, options.budget),
    ]  # fmt: skip


def lever_trials(options: argparse.Namespace, base: dict[str, Any], epoch_s: float) -> list[Trial]:
    """This project's step, with one thing changed in each."""
    adamw = {"optimizer": "adamw", "learning_rate": 1e-5}

    def lever(name: str, told: str, changes: dict[str, Any], more: dict[str, Any], estimate_s: float) -> Trial:
        spec = base | {"what": "fine_tune", "epochs": 6, "changes": adamw | changes} | more
        return Trial("levers", name, told, "ours", spec, estimate_s, None if options.full else 1)

    usual = 22 + 6 * epoch_s
    found = [
        lever("base", "flat AdamW, 32 bits, BatchNorm at rest, deterministic", {}, {}, usual),
        lever("sgd", "SGD instead of AdamW", {"optimizer": "sgd"}, {}, usual),
        lever("bfloat16", "mixed precision, bfloat16", {"precision": "mixed_bfloat16"}, {}, usual * 1.4),
        lever("bn-train", "BatchNorm learns", {"batch_norm": "train"}, {}, usual * 1.3),
        lever("free", "operations need not be deterministic", {}, {"is_deterministic": False}, usual),
        lever("one-thread", "one thread within an operation", {}, {"threads": 1}, usual * 1.6),
    ]
    if options.full or options.tiny:
        found += [
            lever("xla", "XLA", {"xla": True}, {}, 150 + 6 * epoch_s),
            lever("no-onednn", "without oneDNN", {}, {"environment": {"TF_ENABLE_ONEDNN_OPTS": "0"}}, usual * 1.3),
            lever("batch-half", "half the batch size", {}, {"batch_size": options.batch_size // 2}, usual),
            lever("batch-double", "twice the batch size", {}, {"batch_size": options.batch_size * 2}, usual),
        ]
    return found


def torch_trials(options: argparse.Namespace, base: dict[str, Any], seconds: float) -> list[Trial]:
    """PyTorch's networks, and our step with the same optimiser."""
    spec = base | {"what": "fine_tune", "steps": 12}
    ours = base | {"n_train": 6 * options.batch_size, "n_val": 64, "what": "fine_tune", "epochs": 3}
    ours |= {"changes": {"optimizer": "adamw", "learning_rate": 1e-5}}
    last = spec | {"library": "torchvision", "channels_last": True}
    found = [
        Trial("torch", "ours", "this project", "ours", ours, 25 + 1.5 * seconds),
        Trial("torch", "torchvision", "torchvision", "plain_torch", spec | {"library": "torchvision"}, 8 + seconds),
        Trial("torch", "torchvision-last", "torchvision, channels last", "plain_torch", last, 8 + seconds),
        Trial("torch", "timm", "timm", "plain_torch", spec | {"library": "timm"}, 8 + seconds),
    ]
    if options.full or options.tiny:
        told = "torchvision, channels last, torch.compile"
        found.append(
            Trial("torch", "torchvision-compiled", told, "plain_torch", last | {"compile": True}, 130 + seconds)
        )
    return found


def tiny_weights(options: argparse.Namespace) -> Path:
    """Weights of the network of few layers, drawn by chance."""
    file = options.output.resolve() / "tiny.weights.h5"
    if not file.is_file():
        from plain_keras import build

        network, _ = build({"size_px": options.size_px, "seed": 20, "dropout": 0.2, "layers": TINY})
        network.save_weights(file)
    return file


def list_images(options: argparse.Namespace, file: Path) -> tuple[int, int]:
    """Training images in `file`, shuffled: a fifth of them, 'val', to validate by; (n_train, n_val).

    Copies are not told apart: both sides of a race have the same images, and the accuracy is no claim about a model.
    """
    folder = next((options.dataset / name for name in ("train", "Training") if (options.dataset / name).is_dir()), None)
    if folder is None:
        sys.exit(f"Error: {options.dataset} has no folder train or Training; name another --dataset")
    if absent := [label for label in CLASSES if not (folder / label).is_dir()]:
        sys.exit(f"Error: {folder} has no folder {', '.join(absent)}; name another --dataset")
    rows = [
        {"path": str(path.resolve()), "label": label}
        for label in CLASSES
        for path in sorted((folder / label).iterdir())
        if path.suffix.lower() in {".jpg", ".jpeg", ".png"}
    ]
    order = np.random.default_rng(20).permutation(len(rows))
    n_val = len(rows) // 5
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, ["path", "label", "part"])
        writer.writeheader()
        for place, index in enumerate(order):
            writer.writerow(rows[index] | {"part": "val" if place < n_val else "train"})
    return len(rows) - n_val, n_val


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": described.stdout.strip(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
