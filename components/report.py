"""The component `report`, which runs at the end of every run, however that ends."""

from kfp import dsl
from kfp.dsl import Markdown, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def report(status: dsl.PipelineTaskFinalStatus, ending: Output[Markdown]):
    """Tell MLflow and the webhook how the run ended: registered, gate not passed, nothing new, or failed in a step."""
    from pathlib import Path

    from braintumor.attempt_report import report_attempt
    from braintumor.registry.attempts import without_traceback
    from components.views import write_ending

    with without_traceback():
        told = report_attempt(state=status.state, error=status.error_message or "")
    write_ending(told, Path(ending.path))
    print(f"report: {told.headline}. {told.message}")
