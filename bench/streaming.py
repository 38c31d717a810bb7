"""Training on more images than memory holds: what it takes, and how fast the images come.

    python bench/streaming.py --images 100000 --size-px 224 --in-memory 20000 --output build/bench
    python bench/streaming.py --input-pipeline

The first decodes a data set to disk and runs the batches of 200 steps, with and without augmentation, beside as many
images as fit in memory; each part is a process of its own, whose peak of resident memory is told. With --train the
steps train DenseNet201. The second tells how fast images come at 64 and 224 px, from files, from memory and from disk.

Without --dataset, 2,000 pictures are drawn, and each stands under many names, as hard links: every name is decoded, but
the files are in the page cache. All of it is in a scratch folder that is deleted at the end.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter

from braintumor.artifacts import sha256_of_file, write_json
from braintumor.labels import CLASS_NAMES, IMAGE_SUFFIXES
from braintumor.model.batches import Batch, batches
from braintumor.model.image_store import Images, open_images
from braintumor.model.images import load_images
from braintumor.params import TrainParams, load_params

N_PICTURES = 2000
ROWS = "rows.csv"
PIPELINE_SIZES_PX = (64, 224)
# Of the free memory, where all images stand in memory.
MEMORY_SHARE = 0.4

Figures = dict[str, float]


def main() -> None:
    """Measure what is asked for, and leave the figures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="a folder of class folders; by default pictures are drawn")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--picture-px", type=int, default=512, help="of drawn pictures")
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--in-memory", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="run the steps through DenseNet201, too")
    parser.add_argument("--input-pipeline", action="store_true", help="only how fast images come")
    parser.add_argument("--scratch", type=Path, help="where the scratch folder is made")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="braintumor-streaming-", dir=options.scratch) as name:
        folder = Path(name)
        if options.input_pipeline:
            options.images = min(options.images, N_PICTURES)
        dataset, rows = options.dataset, folder / ROWS
        if dataset is None:
            dataset = folder / "images"
            draw(dataset, options.images, options.picture_px)
        list_images(dataset, options.images).to_csv(rows, index=False)
        measure, name = (input_pipeline, "input_pipeline") if options.input_pipeline else (streaming, "streaming")
        figures = measure(dataset, rows, folder / "decoded", options)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / f"{name}.json", {"cores": os.cpu_count(), **figures})


def streaming(dataset: Path, rows: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Decoding, opening again, and the steps, each in a process of its own."""
    params = recipe(options.size_px, options)
    some = min(len(pd.read_csv(rows)), int(available_memory() * MEMORY_SHARE / options.size_px**2))
    parts: list[tuple[str, Callable[..., Figures], tuple[Any, ...]]] = [
        ("decoding to disk", time_opening, (params,)),
        ("opening again", time_opening, (params,)),
        ("from disk, cold", time_batches, (params, options.steps, False, True)),
        ("from disk", time_batches, (params, options.steps)),
        ("from disk, augmented", time_batches, (params, options.steps, True)),
        (f"{some} decoded to memory", time_decoding, (params, some)),
        (f"from memory ({some})", time_batches, (in_memory(params, some), options.steps, False, False, some)),
        (f"from memory ({some}), augmented", time_batches, (in_memory(params, some), options.steps, True, False, some)),
    ]
    if options.train:
        parts.append(("training, from disk", train_steps, (params, options.steps)))
    figures = {}
    for part, function, arguments in parts:
        figures[part] = in_own_process(function, dataset, rows, folder, *arguments)
        print(f"{part:40}" + "  ".join(f"{key} {value:,.1f}" for key, value in figures[part].items()), flush=True)
    return {"images": options.images, "size_px": options.size_px, "in_memory": options.in_memory, **figures}


def input_pipeline(dataset: Path, rows: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second by way and size, with their spread over some rounds."""
    found: dict[str, list[float]] = {}
    n = len(pd.read_csv(rows))
    for _ in range(options.rounds):
        for size_px in PIPELINE_SIZES_PX:
            params = recipe(size_px, options)
            on_disk, ram = in_memory(params, n - 1), in_memory(params, n)
            parts: list[tuple[str, Callable[..., Figures], tuple[Any, ...]]] = [
                ("decoded and resized", time_decoding, (params, n)),
                ("from memory", time_batches, (ram, options.steps)),
                ("from memory, augmented", time_batches, (ram, options.steps, True)),
                ("from disk", time_batches, (on_disk, options.steps)),
                ("from disk, augmented", time_batches, (on_disk, options.steps, True)),
                ("decoded each time, augmented", time_decoding, (params, n, True)),
            ]
            for part, function, arguments in parts:
                figures = in_own_process(function, dataset, rows, folder, *arguments)
                found.setdefault(f"{size_px} px, {part}", []).append(figures["images_per_s"])
    result = {name: spread(values) for name, values in found.items()}
    for name, values in result.items():
        print(f"{name:40} {values['median']:10,.0f} images/s ({values['minimum']:,.0f} to {values['maximum']:,.0f})")
    return {"images": n, "batch_size": options.batch_size, **result}


def recipe(size_px: int, options: argparse.Namespace) -> TrainParams:
    """The recipe of params.yaml at another size."""
    changes = {"image_size_px": size_px, "batch_size": options.batch_size, "images_in_memory": options.in_memory}
    return load_params(Path("params.yaml")).train.model_copy(update=changes)


def in_memory(params: TrainParams, n: int) -> TrainParams:
    """The recipe with so many images in memory."""
    return params.model_copy(update={"images_in_memory": n})


def draw(folder: Path, n: int, size_px: int) -> None:
    """`n` JPEG files of N_PICTURES smooth pictures, each of which stands under as many names as it takes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1 : 1 : size_px * 1j, -1 : 1 : size_px * 1j]
    texture = 300 * gaussian_filter(rng.normal(size=(size_px, size_px)).astype(np.float32), 2, mode="wrap")
    for number in range(n):
        path = folder / CLASS_NAMES[number % len(CLASS_NAMES)] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number >= N_PICTURES:
            first = number % N_PICTURES
            path.hardlink_to(folder / CLASS_NAMES[first % len(CLASS_NAMES)] / f"{first:06d}.jpg")
            continue
        head = (rows / rng.uniform(0.6, 0.9)) ** 2 + (columns / rng.uniform(0.5, 0.8)) ** 2 < 1
        shifted = np.roll(texture, rng.integers(0, size_px, 2), (0, 1))
        grey = np.clip((120 + shifted) * head, 0, 255)
        Image.fromarray(grey.astype(np.uint8)).save(path, quality=90)


def list_images(dataset: Path, n: int) -> pd.DataFrame:
    """Path, label and SHA-256 of the first n images, class by class."""
    paths = [path for path in sorted(dataset.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = [path for path in paths if path.parent.name in CLASS_NAMES][:n]
    started = time.monotonic()
    digests = [sha256_of_file(path) for path in paths]
    size = sum(path.stat().st_size for path in paths[:N_PICTURES]) / len(paths[:N_PICTURES])
    print(f"{len(paths)} files of {size / 1e3:.0f} kB on average; digests took {time.monotonic() - started:.1f} s")
    return pd.DataFrame(
        {
            "path": [str(path.relative_to(dataset)) for path in paths],
            "label": [path.parent.name for path in paths],
            "sha256": digests,
        }
    )


def in_own_process(function: Callable[..., Figures], *arguments: Any) -> Figures:
    """What the function measures in a fresh process, and the peak of that process's resident memory in MB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(with_peak, function, *arguments).result()


def with_peak(function: Callable[..., Figures], *arguments: Any) -> Figures:
    """What the function measures, and what memory the process took before and at most."""
    before = resident("VmRSS")
    figures = function(*arguments)
    return figures | {"before_MB": before, "peak_MB": resident("VmHWM")}


def resident(field: str) -> float:
    """Resident memory of this process in MB: VmRSS now, VmHWM at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1e3


def available_memory() -> float:
    """Bytes that this machine could give."""
    return float(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024


def opened(dataset: Path, rows: Path, folder: Path, params: TrainParams, n: int | None = None) -> tuple[Images, Any]:
    """The first n images, and their labels."""
    table = pd.read_csv(rows, dtype=str)[:n]
    images = open_images(dataset, table, params.image_size_px, params.images_in_memory, folder)
    return images, table["label"].map(CLASS_NAMES.index).to_numpy(np.int64)


def time_opening(dataset: Path, rows: Path, folder: Path, params: TrainParams) -> Figures:
    """How long it takes until the images can be read."""
    started = time.monotonic()
    images, _ = opened(dataset, rows, folder, params)
    seconds = time.monotonic() - started
    n_bytes = np.prod(images.shape)
    return {"images_per_s": len(images) / seconds, "seconds": seconds, "MB_per_s": float(n_bytes) / 1e6 / seconds}


def time_decoding(
    dataset: Path, rows: Path, folder: Path, params: TrainParams, n: int, is_augmented: bool = False
) -> Figures:
    """How fast files become pixels in memory, batch by batch where they are augmented."""
    paths = list(pd.read_csv(rows)["path"][:n])
    if is_augmented:
        vary, size = augmentation(params), params.batch_size
        vary(np.zeros((size, params.image_size_px, params.image_size_px, 1), np.uint8), np.zeros((size, 6), np.float32))
        draws = np.random.default_rng(0).random((size, 6), np.float32)
        paths = paths[: n // size * size]
        started = time.monotonic()
        for start in range(0, len(paths), size):
            vary(load_images(dataset, paths[start : start + size], params.image_size_px), draws)
    else:
        started = time.monotonic()
        load_images(dataset, paths, params.image_size_px)
    seconds = time.monotonic() - started
    return {"images_per_s": len(paths) / seconds, "seconds": seconds}


def time_batches(
    dataset: Path,
    rows: Path,
    folder: Path,
    params: TrainParams,
    steps: int,
    is_augmented: bool = False,
    is_cold: bool = False,
    n: int | None = None,
) -> Figures:
    """How fast the batches of so many steps come, once the images are open."""
    images, labels = opened(dataset, rows, folder, params, n)
    vary = augmentation(params) if is_augmented else lambda images, draws: None
    fed = epochs(images, labels, params)
    first = next(fed)
    vary(first.images, first.draws)
    if is_cold:
        forget(folder)
    started = time.monotonic()
    n_images = 0
    for batch in islice(fed, steps):
        vary(batch.images, batch.draws)
        n_images += len(batch.images)
    seconds = time.monotonic() - started
    fed.close()
    return {"images_per_s": n_images / seconds, "seconds": seconds}


def epochs(images: Images, labels: Any, params: TrainParams) -> Generator[Batch, None, None]:
    """The batches of one epoch after the other."""
    weights = np.ones(len(labels), np.float32)
    epoch = 0
    while True:
        epoch += 1
        yield from batches(images, labels, weights, params, epoch)


def augmentation(params: TrainParams) -> Callable[[Any, Any], None]:
    """`augment` as a compiled function of a batch, which has been computed when it returns."""
    import tensorflow as tf

    from braintumor.model.augmentation import augment

    compiled = tf.function(lambda images, draws: augment(tf.cast(images, tf.float32), draws, params.augmentation))
    return lambda images, draws: compiled(tf.constant(images), tf.constant(draws)).numpy()


def forget(folder: Path) -> None:
    """The kernel keeps nothing of the folder's files in memory."""
    os.sync()
    for file in folder.rglob("*.pixels"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def train_steps(dataset: Path, rows: Path, folder: Path, params: TrainParams, steps: int) -> Figures:
    """How fast DenseNet201 trains on the images, without its first step, which compiles; random weights."""
    from braintumor.model import training
    from braintumor.model.densenet import build_classifier

    params = params.model_copy(update={"weights": "none", "head_epochs": 0})
    training.make_reproducible(params.seed)
    images, labels = opened(dataset, rows, folder, params)
    engine = training.make_engine(build_classifier(params), params, len(labels))
    engine.begin_epoch()
    fed = epochs(images, labels, params)
    started = time.monotonic()
    first = next(fed)
    engine.train(first, len(first.weights))
    assert engine.sums.images == len(first.weights)
    compiled = time.monotonic()
    n_images = 0
    for batch in islice(fed, steps - 1):
        engine.train(batch, len(batch.weights))
        n_images += len(batch.weights)
    # Waits for the last step.
    loss = engine.sums.loss / engine.sums.images
    seconds = time.monotonic() - compiled
    fed.close()
    return {
        "images_per_s": n_images / seconds, "seconds": seconds, "first_step_s": compiled - started, "mean_loss": loss,
    }  # fmt: skip


def spread(values: list[float]) -> Figures:
    """The median and the ends."""
    return {
        "median": round(statistics.median(values), 1),
        "minimum": round(min(values), 1),
        "maximum": round(max(values), 1),
    }


if __name__ == "__main__":
    main()
