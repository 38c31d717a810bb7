"""The component `train`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def train(
    dataset: str,
    splits: Input[Artifact],
    params: str,
    image: str,
    run_id: str,
    model: Output[Model],
    figures: Output[Metrics],
):
    """Fine-tune DenseNet201 and keep the best epoch."""
    from pathlib import Path

    from braintumor.params import parse_params
    from braintumor.progress import shown
    from braintumor.registry.attempts import step_of_the_attempt
    from braintumor.steps.train import train
    from components.views import log_training

    with step_of_the_attempt("train", run_id), shown() as progress:
        train(Path(dataset), Path(splits.path), Path(model.path), parse_params(params), progress, image=image)
        log_training(Path(model.path), figures)
