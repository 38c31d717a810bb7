"""The component `register`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def register(
    model: Input[Model],
    splits: Input[Artifact],
    evaluation: Input[Artifact],
    decision: Input[Artifact],
    context: Input[Artifact],
    validation: Input[Artifact],
    params: str,
    run_id: str,
    registration: Output[Artifact],
) -> str:
    """Register the model in MLflow as challenger, after checking every digest again; returns its version."""
    from pathlib import Path

    from braintumor.params import parse_params
    from braintumor.registry.attempts import step_of_the_attempt
    from braintumor.steps.register import register

    with step_of_the_attempt("register", run_id):
        registered = register(
            model=Path(model.path),
            splits=Path(splits.path),
            evaluation=Path(evaluation.path),
            decision=Path(decision.path),
            context=Path(context.path),
            validation=Path(validation.path),
            output=Path(registration.path),
            params=parse_params(params),
        )
    print(f"register: {registered.model_name} version {registered.version}")
    return registered.version
