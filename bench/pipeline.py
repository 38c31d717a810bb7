"""How long the pipeline takes without its training, step by step, each as the command that a person types.

    python bench/pipeline.py --dataset data --build build --params params.yaml

`--build` holds a model that was trained on this data, and its split: validate and split are run, and timed; where they
come to another split than the model's, the model is evaluated on its own. All is done in a folder of its own, with a
registry of its own, and a gate that any model passes, so that the registration is timed, too. Memory is that of the
largest process of a step.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from braintumor import artifacts
from braintumor.data.split_artifact import load_split

STEPS = ("resolve", "validate", "split", "evaluate", "gate", "register")
RUN = "import sys; from braintumor.cli import main; sys.argv[0] = 'braintumor'; main()"


def main() -> None:
    """Run the steps, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    options = parser.parse_args()
    dataset, given = options.dataset.resolve(), options.build.resolve()
    content = yaml.safe_load(options.params.read_text(encoding="utf-8"))
    content["gate"]["min_accuracy"]["value"] = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        shutil.copytree(given / "model", work / "build/model")
        total, total_cpu, peak = 0.0, 0.0, 0.0
        print("| step | s | CPU s | peak MiB |\n| --- | --- | --- | --- |")
        for step in STEPS:
            seconds, cpu, mib = timed(step, dataset, work)
            total, total_cpu, peak = total + seconds, total_cpu + cpu, max(peak, mib)
            print(f"| {step} | {seconds:.1f} | {cpu:.1f} | {mib:.0f} |", flush=True)
            if step == "split" and load_split(work / "build/split").sha256 != load_split(given / "split").sha256:
                for name in ("split", "validation"):
                    shutil.rmtree(work / "build" / name)
                    shutil.copytree(given / name, work / "build" / name)
                print("The split is another than the model's; from here on it is the model's.")
        print(f"| all | {total:.1f} | {total_cpu:.1f} | {peak:.0f} |")
        summary = artifacts.read_json(work / "build/resolve" / artifacts.CONTEXT, "braintumor resolve")
        print(f"{summary['n_images']} images, {len(os.sched_getaffinity(0))} cores")


def timed(step: str, dataset: Path, work: Path) -> tuple[float, float, float]:
    """Seconds, seconds of the CPU and MiB of one step; ends the benchmark where the step fails."""
    command = [sys.executable, "-c", RUN, step]
    if step in {"resolve", "validate", "split", "evaluate"}:
        command += ["--dataset", str(dataset)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    log = work / f"{step}.log"
    started = time.monotonic()
    with log.open("wb") as out:
        # Not waited for by subprocess, whose answer has no memory in it.
        child = subprocess.Popen(command, cwd=work, env=environment, stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"{step} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
