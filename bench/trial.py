"""One measurement in a process of its own: a specification in, its numbers out. Standard library alone.

    python bench/PEER.py '{"what": "fine_tune", "images": "build/bench/images.csv", ...}' RESULT.json

Every peer (ours.py, plain_keras.py, plain_torch.py) is such a program. Times are `time.monotonic()`, which on Linux is
one clock for all processes, so that a peer can tell how long ago it was started.
"""

import csv
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
Spec = dict[str, Any]
Result = dict[str, Any]


def main(measurements: dict[str, Callable[[Spec], Result]]) -> None:
    """Do what the specification asks for, and write the numbers."""
    spec = json.loads(sys.argv[1])
    # Before any library that reads them is loaded.
    if spec.get("threads"):
        os.environ |= {"OMP_NUM_THREADS": str(spec["threads"]), "TF_NUM_INTRAOP_THREADS": str(spec["threads"])}
    os.environ |= spec.get("environment", {})
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    cpu = time.process_time()
    result = measurements[spec["what"]](spec)
    result |= {
        "seconds_in_all": time.monotonic() - spec["started"],
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def since_start(spec: Spec) -> float:
    """Seconds since the process was started: Python, its libraries and all."""
    return time.monotonic() - float(spec["started"])


def rows_of(spec: Spec, part: str) -> tuple[list[str], list[int]]:
    """Paths and labels (indices into CLASSES) of the images of a part, 'train' or 'val'."""
    with Path(spec["images"]).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == part]
    if limit := spec.get(f"n_{part}"):
        rows = rows[:limit]
    return [row["path"] for row in rows], [CLASSES.index(row["label"]) for row in rows]
