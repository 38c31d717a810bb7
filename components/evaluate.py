"""The component `evaluate`."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, ClassificationMetrics, Input, Metrics, Model, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def evaluate(
    dataset: str,
    validation: Input[Artifact],
    splits: Input[Artifact],
    model: Input[Model],
    context: Input[Artifact],
    params: str,
    run_id: str,
    evaluation: Output[Artifact],
    figures: Output[Metrics],
    confusion_matrix: Output[ClassificationMetrics],
    roc_glioma: Output[ClassificationMetrics],
    roc_meningioma: Output[ClassificationMetrics],
    roc_notumor: Output[ClassificationMetrics],
    roc_pituitary: Output[ClassificationMetrics],
    report: Output[HTML],
):
    """Score the model on the test images of its split, and gather the evidence."""
    from pathlib import Path

    from braintumor.params import parse_params
    from braintumor.progress import shown
    from braintumor.registry.attempts import step_of_the_attempt
    from braintumor.steps.evaluate import evaluate
    from components.views import log_confusion_matrix, log_evaluation, log_roc_curves, write_evaluation_report

    output = Path(evaluation.path)
    with step_of_the_attempt("evaluate", run_id), shown() as progress:
        evaluate(
            Path(dataset),
            Path(validation.path),
            Path(splits.path),
            Path(model.path),
            Path(context.path),
            output,
            parse_params(params),
            progress,
        )
        log_evaluation(output, figures)
        log_confusion_matrix(output, confusion_matrix)
        log_roc_curves(output, [roc_glioma, roc_meningioma, roc_notumor, roc_pituitary])
        write_evaluation_report(output, Path(report.path))
