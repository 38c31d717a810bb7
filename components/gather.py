"""The component `gather`."""

from typing import List  # noqa: UP035 -- kfp knows a list of artifacts by this name alone

from kfp import dsl
from kfp.dsl import Artifact, Input, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def gather(
    scans: Input[List[Artifact]],  # noqa: UP006
    scan_digests: list,
    survey: Output[Artifact],
    search: Output[Artifact],
) -> str:
    """Put all scans together, after checking that they are all there and of one data version.

    Returns the digest of the survey, whose seal names the search that the matches have to be of.
    """
    from pathlib import Path

    from braintumor.data.shards import seal_digest
    from braintumor.registry.attempt_parts import part_of_the_step
    from braintumor.steps.gather import gather

    with part_of_the_step("validate", "gather"):
        gather([Path(scan.path) for scan in scans], Path(survey.path), Path(search.path), scan_digests)
    return seal_digest(Path(survey.path))
