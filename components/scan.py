"""The component `scan`."""

from kfp import dsl
from kfp.dsl import Artifact, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def scan(dataset: str, params: str, share: int, shares: int, scanned: Output[Artifact]) -> str:
    """Read a share of the images; returns the digest of what was found."""
    from pathlib import Path

    from braintumor.data.shards import Share, seal_digest
    from braintumor.params import parse_params
    from braintumor.progress import shown
    from braintumor.registry.attempt_parts import part_of_the_step
    from braintumor.steps.scan import scan

    part = Share(share, shares)
    with part_of_the_step("validate", f"scan, {part}"), shown() as progress:
        scan(Path(dataset), part, Path(scanned.path), parse_params(params).validation, progress)
    return seal_digest(Path(scanned.path))
