"""The component `train` of profiles with several nodes: its own pod only starts a TrainJob and waits for it."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Model, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def train(
    dataset: str,
    splits: Input[Artifact],
    params: str,
    image: str,
    run_id: str,
    nodes: str,
    model: Output[Model],
    figures: Output[Metrics],
):
    """Fine-tune DenseNet201 on several nodes and keep the best epoch."""
    from pathlib import Path

    from braintumor.registry.attempts import step_of_the_attempt
    from components.training_job import run_training_job
    from components.views import log_training

    with step_of_the_attempt("train", run_id):
        run_training_job(
            dataset, Path(splits.path), Path(model.path), params=params, nodes=nodes, image=image, run_id=run_id
        )
        log_training(Path(model.path), figures)
