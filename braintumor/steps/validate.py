"""The step `validate`: may this data set be trained on, and what stands in it?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braintumor.artifacts import (
    DATA_DOCS,
    DIFFERENCE,
    FINDINGS,
    LEAKAGE,
    MANIFEST,
    ODD_IMAGES,
    PROFILE,
    replacing_directory,
    write_json,
)
from braintumor.data.contents import file_md5s, list_contents, version_md5
from braintumor.data.data_docs import write_data_docs
from braintumor.data.difference import as_json, compare
from braintumor.data.duplicates import measure_leakage
from braintumor.data.dvc_remote import open_dataset
from braintumor.data.expectations import Finding, check_expectations
from braintumor.data.manifest import survey, write_manifest
from braintumor.data.oddities import odd_kinds, write_odd_images
from braintumor.data.profile import load_accepted, make_profile, write_profile
from braintumor.data.shards import Shards, assemble
from braintumor.errors import CriticalFinding, UserError
from braintumor.params import Params
from braintumor.progress import Progress, silent


@dataclass(frozen=True)
class ValidationSummary:
    """What the validation found; no critical finding, or there would be no summary."""

    output: Path
    data_md5: str
    n_images: int
    n_groups: int
    leaked_share: float | None  # of the declared test images; None without such images
    n_unknown_patients: int
    warnings: list[str]

    @property
    def n_warnings(self) -> int:
        """How many expectations failed with the severity 'warning'."""
        return len(self.warnings)


def validate(
    dataset: Path,
    context: Path,
    output: Path,
    params: Params,
    progress: Progress = silent,
    shards: Shards | None = None,
) -> ValidationSummary:
    """Leave manifest, profile, leakage, difference, findings and Data Docs of `dataset` in `output`.

    The images are compared with the last accepted data version, which `context` holds. A critical finding leaves
    findings and Data Docs alone, so that no later step can start, and raises CriticalFinding. Raises UserError for a
    context of other data, and for `shards`, what other tasks have read and compared, that are not all of this data.
    """
    dataset = open_dataset(dataset, progress)
    contents = list_contents(dataset)
    accepted, resolved_md5 = load_accepted(context)
    checks = params.validation
    if shards is None:
        # Before the images are read, which may take minutes.
        _refuse_other_data(dataset, context, resolved_md5, version_md5(file_md5s(dataset, contents.versioned)))
        advance = progress("validate: reading images", len(contents.images))
        surveyed = survey(dataset, checks.workers, checks.copy_correlation, advance, contents)
    else:
        surveyed = assemble(dataset, contents, shards, resolved_md5, checks.copy_correlation)
    _refuse_other_data(dataset, context, resolved_md5, surveyed.data_md5)
    data_md5, images = surveyed.data_md5, surveyed.images
    leakage = measure_leakage(images)
    difference = None
    if accepted is not None and accepted.images is not None:
        difference = compare(images, accepted.images)
    record = as_json(difference, accepted, data_md5)
    kinds = odd_kinds(images, checks)
    with replacing_directory(output) as folder:
        findings = check_expectations(surveyed, leakage, accepted, difference, params, folder / DATA_DOCS)
        write_data_docs(folder / DATA_DOCS, dataset, surveyed, leakage, findings, kinds, record, params)
        write_json(folder / FINDINGS, _findings_record(data_md5, len(images), findings))
        critical = [finding for finding in findings if finding.severity == "critical"]
        if not critical:
            write_manifest(images, data_md5, folder / MANIFEST)
            write_profile(make_profile(images, params.privacy), data_md5, folder / PROFILE)
            write_json(folder / LEAKAGE, {"data_md5": data_md5, **leakage})
            write_json(folder / DIFFERENCE, record)
            write_odd_images(images, kinds, folder / ODD_IMAGES)
    if critical:
        raise CriticalFinding(_explain(dataset, output, critical))
    return ValidationSummary(
        output=output,
        data_md5=data_md5,
        n_images=leakage["n_images"],
        n_groups=leakage["n_groups"],
        leaked_share=leakage["leaked_share"],
        n_unknown_patients=leakage["patients"]["unknown"],
        warnings=[str(finding) for finding in findings],
    )


def _refuse_other_data(dataset: Path, context: Path, resolved_md5: str, found_md5: str) -> None:
    if found_md5 != resolved_md5:
        raise UserError(
            f"{context} is of data {resolved_md5}, {dataset} is now {found_md5}; run 'braintumor resolve' again"
        )


def _findings_record(data_md5: str, n_images: int, findings: Sequence[Finding]) -> dict[str, Any]:
    return {"data_md5": data_md5, "n_images": n_images, "findings": [finding.as_dict() for finding in findings]}


def _explain(dataset: Path, output: Path, critical: Sequence[Finding]) -> str:
    lines = [f"  {finding}" for finding in critical]
    counted = "1 critical finding" if len(critical) == 1 else f"{len(critical)} critical findings"
    return "\n".join(
        [f"{dataset} can't be trained on, {counted}:", *lines, f"Data Docs: {output / DATA_DOCS / 'index.html'}"]
    )
