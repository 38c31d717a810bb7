"""The same recipe under every split protocol: how much of an accuracy is copies, how much is training images.

    python bench/protocols.py --dataset data --validation build/validation --params params.yaml --output build/protocols

`official` drops the copies of test images, `control` has as many training images without dropping copies, `declared`
keeps everything, `grouped` draws another test set. Same seed, same epochs. A protocol whose evaluation is there
already is not trained again, so that a run that was killed goes on.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

PROTOCOLS = ("official", "control", "declared", "grouped")
FIGURES = ("accuracy", "macro_f1", "tumour_sensitivity", "tumour_specificity")


def main() -> None:
    """Train and score under each protocol, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--validation", type=Path, default=Path("build/validation"))
    parser.add_argument("--context", type=Path, default=Path("build/resolve"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--output", type=Path, default=Path("build/protocols"))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    options = parser.parse_args()
    for protocol in options.protocols:
        run(protocol, options)
    made = [protocol for protocol in PROTOCOLS if (options.output / protocol / "evaluation").is_dir()]
    table = "\n\n".join([figures_table(options.output, made), class_table(options.output, made)])
    (options.output / "table.md").write_text(table + "\n")
    print(table)


def run(protocol: str, options: argparse.Namespace) -> None:
    """The split, the model and the evaluation of a protocol lie in its folder."""
    folder = options.output / protocol
    folder.mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load(options.params.read_text())
    params["split"]["protocol"] = protocol
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    data = ["--dataset", options.dataset]
    split, model, evaluation = (folder / name for name in ("split", "model", "evaluation"))
    if evaluation.is_dir():
        return
    call("split", *data, "--validation", options.validation, "--output", split, "--params", file)
    call("train", *data, "--splits", split, "--output", model, "--params", file)
    made = ["--validation", options.validation, "--splits", split, "--model", model, "--context", options.context]
    call("evaluate", *data, *made, "--output", evaluation, "--params", file)


def call(*words: object) -> None:
    """Run a command of the package; its failure is ours."""
    subprocess.run(["braintumor", *map(str, words)], check=True)


def read(folder: Path, file: str) -> dict[str, Any]:
    """A step's JSON."""
    content: dict[str, Any] = json.loads((folder / file).read_text())
    return content


def figures_table(output: Path, protocols: list[str]) -> str:
    """Size of each protocol, its floors and its figures."""
    head = ["protocol", "train images (groups)", "test", "leaked", "1-NN", "statistics", "epoch", *FIGURES]
    lines = [head, ["---"] * len(head)]
    for protocol in protocols:
        split = read(output / protocol, "split/split.json")
        metrics = read(output / protocol, "evaluation/metrics.json")
        training = read(output / protocol, "model/training.json")
        lines.append(
            [
                f"`{protocol}`",
                f"{split['sizes']['train']} ({split['groups']['train']})",
                f"{split['sizes']['test']} ({split['groups']['test']})",
                *(percent(split[name]) for name in ("leaked_share", "nearest_neighbour_accuracy")),
                percent(split["statistics_accuracy"]),
                f"{training['best_epoch']} of {training['epochs_run']}",
                *(with_interval(metrics, name) for name in FIGURES),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def class_table(output: Path, protocols: list[str]) -> str:
    """Sensitivity and precision of each class under each protocol."""
    metrics = {protocol: read(output / protocol, "evaluation/metrics.json")["per_class"] for protocol in protocols}
    lines = [["class", *(f"`{protocol}`" for protocol in protocols)], ["---"] * (1 + len(protocols))]
    for label in next(iter(metrics.values()), {}):
        cells = [metrics[protocol][label] for protocol in protocols]
        lines.append([label, *(f"{percent(cell['recall'])} / {percent(cell['precision'])}" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(metrics: dict[str, Any], name: str) -> str:
    """A figure and its interval by group bootstrap."""
    low, high = metrics[f"{name}_interval"]
    return f"{percent(metrics[name])} ({100 * low:.1f} to {100 * high:.1f})"


def percent(share: float) -> str:
    """A share as people read it."""
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
