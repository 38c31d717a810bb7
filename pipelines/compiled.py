"""The compiled pipeline: two YAML documents, the graph and what Kubernetes needs beside it."""

import re
import tempfile
from pathlib import Path

import yaml

from braintumor.errors import UserError
from braintumor.params import Profile

DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
TAG = re.compile(r"[^@:\s]+:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
PLATFORM = "kubernetes"


def compile_pipeline(profile: Profile, image: str) -> str:
    """Both documents as text, the same bytes for the same profile and image.

    Raises UserError for an image that names neither a tag nor a digest.
    """
    _refuse_vague_image(image)
    from kfp import compiler

    from pipelines.retraining import retraining_pipeline

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(retraining_pipeline(profile, image), str(file))
        text = file.read_text(encoding="utf-8")
    refuse_incomplete(text)
    return text


def refuse_incomplete(text: str) -> None:
    """Raise UserError unless both documents are there: without the second no task gets a GPU, a secret or a cache."""
    try:
        documents = [document for document in yaml.safe_load_all(text) if document]
    except yaml.YAMLError as error:
        raise UserError(f"the package is not valid YAML: {error}; run 'braintumor pipeline compile' again") from error
    is_complete = (
        len(documents) == 2
        and all(isinstance(document, dict) for document in documents)
        and PLATFORM in (documents[1].get("platforms") or {})
    )
    if not is_complete:
        raise UserError(
            f"the package holds {len(documents)} YAML documents, and needs two, the second with platforms.{PLATFORM}; "
            "run 'braintumor pipeline compile' again, and keep both"
        )


def _refuse_vague_image(image: str) -> None:
    # The part before the last slash may hold a port.
    if DIGEST.fullmatch(image) or TAG.fullmatch(image.rpartition("/")[2]):
        return
    raise UserError(
        f"the image {image!r} has neither a tag nor a digest, so nobody could tell which code ran; "
        "write NAME@sha256:... (best: results can be cached) or NAME:TAG"
    )
