"""The component `match`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def match(
    search: Input[Artifact], dataset: str, params: str, share: int, shares: int, matched: Output[Artifact]
) -> str:
    """Find the copies of a share of the images among all; returns the digest of what was found.

    `dataset` is there for Kubeflow's cache, which does not look into artifacts.
    """
    from pathlib import Path

    from braintumor.data.shards import Share, seal_digest
    from braintumor.params import parse_params
    from braintumor.progress import shown
    from braintumor.registry.attempt_parts import part_of_the_step
    from braintumor.steps.match import match

    part = Share(share, shares)
    with part_of_the_step("validate", f"match, {part}"), shown() as progress:
        match(Path(search.path), part, Path(matched.path), parse_params(params).validation, progress)
    return seal_digest(Path(matched.path))
