"""The names of all files that travel between steps, how they are written, and their digests.

An artifact is a directory. It appears whole or not at all: `replacing_directory` fills a hidden sibling, and the two
change places at the end. Where the file system can't do that in one step, the last good output of a killed step is
there again when the step is, at the latest.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from braintumor.errors import UserError, name_some

GROUPS_FILE = "groups.csv"  # optional, in the data set's root: path,patient[,origin][,plane]

CONTEXT = "context.json"
ACCEPTED = "accepted.parquet"

MANIFEST = "manifest.parquet"
LEAKAGE = "leakage.json"
FINDINGS = "findings.json"
DIFFERENCE = "difference.json"
PROFILE = "profile.parquet"  # of the manifest: what of it may leave the data set
ODD_IMAGES = "odd_images.csv"
DATA_DOCS = "data_docs"

SPLITS = "splits.csv"
DROPPED = "dropped.csv"
FLOORS = "floors.csv"  # what nearest neighbour and statistics say of each test image
SPLIT_SUMMARY = "split.json"
JOINED_GROUPS = "joined_groups.json"

MODEL = "model.keras"
LABELS = "labels.json"
HISTORY = "history.csv"
LEARNING_CURVE = "learning_curve.png"
SEEN_IMAGES = "seen_images.csv"
TRAINING = "training.json"
CALIBRATION = "calibration.csv"  # predictions of the rows that temperature and thresholds were fitted on

METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
OOD_SCORES = "ood_scores.csv"
EVIDENCE = "evidence.json"
REPORT = "report.html"
LABEL_ERRORS = "label_errors.csv"
CURVES = "curves"
CONFUSION_MATRIX = "confusion_matrix.png"
ROC_CURVES = "roc_curves.png"
PER_CLASS = "per_class.png"
# All of an evaluation that is judged or shown to others; their digests stand in metrics.json, as <name>_sha256.
JUDGED_FILES = (PREDICTIONS, OOD_SCORES, EVIDENCE, REPORT, CONFUSION_MATRIX, ROC_CURVES, PER_CLASS)

DECISION = "decision.json"
TEST_USES = "test_uses.json"

REGISTRATION = "registration.json"
MODEL_CARD = "card/model_card.json"  # among the artifacts of a run in MLflow

# All that a step may find in its output folder, and replace.
STEP_FILES = frozenset(
    {
        *(CONTEXT, ACCEPTED, MANIFEST, LEAKAGE, FINDINGS, DIFFERENCE, PROFILE, ODD_IMAGES, DATA_DOCS),
        *(SPLITS, DROPPED, FLOORS, SPLIT_SUMMARY, JOINED_GROUPS, TEST_USES),
        *(MODEL, LABELS, HISTORY, LEARNING_CURVE, SEEN_IMAGES, TRAINING, CALIBRATION),
        *(METRICS, PREDICTIONS, OOD_SCORES, EVIDENCE, REPORT, LABEL_ERRORS, CURVES),
        *(CONFUSION_MATRIX, ROC_CURVES, PER_CLASS, DECISION, REGISTRATION),
        ".gitignore",  # DVC's
    }
)

# What the kernel says of a full disk, a quota that is used up and a file that may grow no more.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(root: Path, files: Iterable[Path]) -> str:
    """Hex SHA-256 over the files' places below `root` and their bytes, in any order."""
    digests = {file.relative_to(root).as_posix(): sha256_of_file(file) for file in files}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def source_digest() -> str:
    """Hex SHA-256 over the code of this installation: the same for the same code, wherever it is installed."""
    root = Path(__file__).parents[1]
    packages = (root / name for name in ("braintumor", "components", "pipelines"))
    return digest_of_files(root, (file for package in packages for file in package.rglob("*.py")))


def sha256_key(name: str) -> str:
    """The key of metrics.json that holds the digest of one of JUDGED_FILES."""
    return f"{Path(name).stem}_sha256"


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """The JSON object in `path`; `made_by` is the command that a person runs if it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run '{made_by}' first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); run '{made_by}' again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; run '{made_by}' again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with sorted keys; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


@contextmanager
def replacing_directory(output: Path, may_hold: frozenset[str] | None = STEP_FILES) -> Iterator[Path]:
    """A folder to fill; at the end it replaces `output`, after an error it is removed and `output` is as before.

    Raises UserError on a full disk, and if `output` holds anything but `may_hold` (None: whatever it holds): a mistyped
    folder is not ours to delete. What a killed process left beside `output` is put back or removed first.
    """
    output = output.absolute()
    if output.is_file():
        raise UserError(f"{output} is a file; give a folder as --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    recover_interrupted(output)
    found = [path.name for path in output.iterdir()] if output.exists() else []
    foreign = sorted(set(found) - may_hold) if may_hold is not None else []
    if foreign:
        raise UserError(f"{output} holds {name_some(foreign)}, which no step made; give another folder as --output")
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    partial.chmod(0o755)
    try:
        with ExitStack() as holds:
            holds.enter_context(_held(partial))
            yield partial
            previous = partial.with_name(partial.name.replace(".partial-", ".previous-"))
            if output.exists():
                holds.enter_context(_held(output))
            if not output.exists() or not _exchange(partial, output):
                try:
                    if output.exists():
                        output.replace(previous)
                    partial.replace(output)
                finally:
                    if not output.exists() and previous.exists():
                        previous.replace(output)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"{output} could not be written ({os.strerror(error.errno)}) and is as before; make room and try again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_directory(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, removed at the end; after a kill it goes when `output` is next replaced."""
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Whether the two folders have changed places, in one step; not every platform and file system can."""
    import ctypes

    libc = ctypes.CDLL(None)
    paths = os.fsencode(first), os.fsencode(second)
    if hasattr(libc, "renameat2"):  # Linux; see rename(2)
        here, exchange = -100, 2
        return bool(libc.renameat2(here, paths[0], here, paths[1], exchange) == 0)
    if hasattr(libc, "renamex_np"):  # macOS
        swap = 2
        return bool(libc.renamex_np(*paths, swap) == 0)
    return False


def recover_interrupted(output: Path) -> None:
    """Put back what a killed process had moved aside, and remove what else it left."""
    name = glob.escape(output.name)
    previous = sorted(path for path in output.parent.glob(f".{name}.previous-*") if not _is_held(path))
    if not output.exists() and len(previous) > 1:
        raise UserError(
            f"{output} is missing, and several earlier versions of it stand beside it: "
            f"{name_some([str(path) for path in previous])}; rename the right one to {output.name}, remove the others"
        )
    if not output.exists() and previous:
        previous.pop().replace(output)
    partial = [path for path in output.parent.glob(f".{name}.partial-*") if not _is_held(path)]
    for leftover in [*previous, *partial]:
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on the folder, under whatever name; the kernel drops it with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems can't lock a folder.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_held(folder: Path) -> bool:
    """Whether somebody is still filling or moving the folder, be it in another container."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    # Without locks nobody knows, except that an output is missing.
    except OSError:
        return ".partial-" in folder.name
    finally:
        os.close(descriptor)
    return False
