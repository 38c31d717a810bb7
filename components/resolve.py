"""The component `resolve`."""

from kfp import dsl
from kfp.dsl import Artifact, Output, OutputPath


@dsl.component(base_image="braintumor", install_kfp_package=False)
def resolve(
    dataset: str,
    params: str,
    image: str,
    force: bool,
    context: Output[Artifact],
    data: OutputPath(str),
    context_digest: OutputPath(str),
    run_id: OutputPath(str),
) -> bool:
    """Find the data version, the champion, and whether anything is new, which it returns; open the attempt's run.

    `data` is what the other tasks take as their data set, `context_digest` what keys the cache of validate,
    `run_id` the attempt's run in MLflow.
    """
    from pathlib import Path

    from braintumor.params import parse_params
    from braintumor.registry.attempts import step_of_the_attempt
    from braintumor.steps.resolve import resolve_attempt

    with step_of_the_attempt("resolve"):
        found = resolve_attempt(Path(dataset), Path(context.path), parse_params(params), image, is_forced=force)
        Path(data).write_text(found.dataset)
        Path(context_digest).write_text(found.context_digest)
        Path(run_id).write_text(found.run_id)
    print(f"resolve: {'new' if found.is_new else 'nothing new'}: {found.reason}")
    return found.is_new
