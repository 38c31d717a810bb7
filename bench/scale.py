"""Images, epochs and GPUs to hours, money and bytes: a small model over measured numbers.

    python bench/scale.py --price 2.5 --images 10000 1000000 10000000 --gpus 1 4 16

Numbers and where each is from stand in scale.json; what was assumed is listed below the table, and `--set NAME=VALUE`
replaces it by what was measured. The price is of one GPU for an hour, in whatever currency it is given.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NUMBERS = Path(__file__).parent / "scale.json"
IMAGES = (10_000, 100_000, 1_000_000, 10_000_000)
GPUS = (1, 4, 16)


@dataclass(frozen=True)
class Cost:
    """Of one retraining: hours of each part, the share of a step that workers wait for each other, and gigabytes."""

    fetch_hours: float
    validate_hours: float
    start_hours: float
    decode_hours: float
    head_hours: float
    train_hours: float
    evaluate_hours: float
    wait_share: float
    source_gb: float
    decoded_gb: float
    fingerprints_gb: float

    @property
    def gpu_hours_each(self) -> float:
        """While a GPU is held."""
        return self.start_hours + self.decode_hours + self.head_hours + self.train_hours

    @property
    def hours(self) -> float:
        """From the start of the run to the evaluation."""
        return self.fetch_hours + self.validate_hours + self.gpu_hours_each + self.evaluate_hours


def cost(images: int, gpus: int, numbers: Mapping[str, float], shards: int = 1) -> Cost:
    """What so many images cost on so many nodes of one GPU; validation is spread over `shards` tasks."""
    n_train, n_val, n_test = (images * numbers[f"{name}_share"] for name in ("train", "val", "test"))
    batch = numbers["batch_per_gpu"]
    step_s = batch / min(numbers["train_images_per_s"], numbers["input_images_per_s"])
    # A ring: each worker sends and takes 2 (n - 1) / n of the gradients; not overlapped with the step.
    exchange_s = 2 * (gpus - 1) / gpus * numbers["gradient_megabytes"] * 8e-3 / numbers["network_gigabits_per_s"]
    steps = math.ceil(n_train / (batch * gpus)) * numbers["epochs"]
    answers_s = numbers["epochs"] * n_val / (numbers["forward_images_per_s"] * gpus)
    head_images = min(n_train, numbers["head_images"]) + n_val if numbers["head_epochs"] else 0
    features_s = head_images / (numbers["forward_images_per_s"] * gpus)
    cores = numbers["cores_per_node"]
    return Cost(
        fetch_hours=images * numbers["source_kilobytes"] / 1e3 / numbers["fetch_megabytes_per_s"] / 3600,
        validate_hours=images / (numbers["fingerprints_per_s_core"] * cores * shards) / 3600
        + images / 1e6 * numbers["neighbour_minutes_per_million"] / 60 / shards,
        start_hours=numbers["start_minutes"] / 60 * numbers["attempts"],
        # Each node decodes all: its share is other images in every epoch.
        decode_hours=images * (1 - numbers["test_share"]) / (numbers["decode_images_per_s_core"] * cores) / 3600,
        head_hours=features_s / 3600,
        train_hours=(steps * (step_s + exchange_s) + answers_s) / 3600,
        # On one GPU; the champion answers too.
        evaluate_hours=2 * n_test / numbers["forward_images_per_s"] / 3600,
        wait_share=exchange_s / (step_s + exchange_s),
        source_gb=images * numbers["source_kilobytes"] / 1e6,
        decoded_gb=images * (1 - numbers["test_share"]) * numbers["image_size_px"] ** 2 / 1e9,
        fingerprints_gb=images * numbers["fingerprint_kilobytes"] / 1e6,
    )


def table(images: list[int], gpus: list[int], numbers: Mapping[str, float], price: float, shards: int) -> str:
    """A Markdown table, one row for each number of images and of GPUs."""
    lines = [
        "| images | GPUs | hours | of them training | waiting for others | GPU hours | price "
        "| source | decoded, a node | fingerprints |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for n in images:
        for k in gpus:
            found = cost(n, k, numbers, shards)
            held = found.gpu_hours_each * k + found.evaluate_hours
            cells = [
                f"{n:,}", str(k), f"{found.hours:.1f}", f"{found.train_hours:.1f}", f"{found.wait_share:.0%}",
                f"{held:.1f}", f"{held * price:,.0f}", *(f"{size:,.1f} GB" for size in (
                    found.source_gb, found.decoded_gb, found.fingerprints_gb)),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and what of it was assumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=Path, default=NUMBERS)
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES))
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--shards", type=int, default=1, help="tasks of validation (cluster.validation_shards)")
    parser.add_argument("--price", type=float, required=True, help="of one GPU with its node, an hour")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a number of your own")
    options = parser.parse_args()
    given = json.loads(options.numbers.read_text(encoding="utf-8"))
    for one in options.set:
        name, _, value = one.partition("=")
        if name not in given:
            parser.error(f"{name} is none of {', '.join(given)}")
        given[name] = {"value": float(value), "source": "given with --set"}
    numbers = {name: float(entry["value"]) for name, entry in given.items()}
    print(table(options.images, options.gpus, numbers, options.price, options.shards))
    print("\nAssumed, and yours to replace:")
    for name, entry in given.items():
        if "assumed" in entry["source"]:
            print(f"- {name} = {entry['value']}: {entry['source']}")


if __name__ == "__main__":
    main()
