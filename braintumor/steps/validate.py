"""The step `validate`: may this data set be trained on, and what stands in it?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braintumor.artifacts import DATA_DOCS, FINDINGS, LEAKAGE, MANIFEST, replacing_directory, write_json
from braintumor.data.data_docs import make_self_contained
from braintumor.data.duplicates import measure_leakage
from braintumor.data.expectations import Finding, check_expectations
from braintumor.data.manifest import list_contents, survey, write_manifest
from braintumor.errors import CriticalFinding
from braintumor.params import ValidateParams
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


def validate(dataset: Path, output: Path, params: ValidateParams, progress: Progress = silent) -> ValidationSummary:
    """Leave manifest, leakage, findings and Data Docs of `dataset` in `output`.

    A critical finding leaves findings and Data Docs alone, so that no later step can start, and raises CriticalFinding.
    """
    contents = list_contents(dataset)
    advance = progress("validate: reading images", len(contents.images))
    surveyed = survey(dataset, params.workers, params.copy_correlation, advance, contents)
    leakage = measure_leakage(surveyed.images)
    with replacing_directory(output) as folder:
        findings = check_expectations(surveyed, leakage, params, folder / DATA_DOCS)
        make_self_contained(folder / DATA_DOCS, surveyed.data_md5, len(surveyed.images), findings)
        write_json(folder / FINDINGS, _findings_record(surveyed.data_md5, len(surveyed.images), findings))
        critical = [finding for finding in findings if finding.severity == "critical"]
        if not critical:
            write_manifest(surveyed.images, surveyed.data_md5, folder / MANIFEST)
            write_json(folder / LEAKAGE, {"data_md5": surveyed.data_md5, **leakage})
    if critical:
        raise CriticalFinding(_explain(dataset, output, critical))
    return ValidationSummary(
        output=output,
        data_md5=surveyed.data_md5,
        n_images=leakage["n_images"],
        n_groups=leakage["n_groups"],
        leaked_share=leakage["leaked_share"],
        n_unknown_patients=leakage["patients"]["unknown"],
        warnings=[str(finding) for finding in findings],
    )


def _findings_record(data_md5: str, n_images: int, findings: Sequence[Finding]) -> dict[str, Any]:
    return {"data_md5": data_md5, "n_images": n_images, "findings": [finding.as_dict() for finding in findings]}


def _explain(dataset: Path, output: Path, critical: Sequence[Finding]) -> str:
    lines = [f"  {finding}" for finding in critical]
    counted = "1 critical finding" if len(critical) == 1 else f"{len(critical)} critical findings"
    return "\n".join(
        [f"{dataset} can't be trained on, {counted}:", *lines, f"Data Docs: {output / DATA_DOCS / 'index.html'}"]
    )
