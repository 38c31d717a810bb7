"""The component `split`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def split(
    dataset: str,
    validation: Input[Artifact],
    validation_digest: str,
    params: str,
    splits: Output[Artifact],
    figures: Output[Metrics],
):
    """Divide the images into train, val, calibration and test; copies stay on one side.

    `validation_digest` is there for Kubeflow's cache, which does not look into artifacts.
    """
    from pathlib import Path

    from braintumor.params import parse_params
    from braintumor.progress import shown
    from braintumor.registry.attempts import step_of_the_attempt
    from braintumor.steps.split import split
    from components.views import log_split

    with step_of_the_attempt("split"), shown() as progress:
        split(Path(dataset), Path(validation.path), Path(splits.path), parse_params(params).split, progress)
        log_split(Path(splits.path), figures)
