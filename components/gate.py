"""The component `gate`."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def gate(
    evaluation: Input[Artifact],
    context: Input[Artifact],
    validation: Input[Artifact],
    params: str,
    run_id: str,
    decision: Output[Artifact],
    report: Output[HTML],
) -> bool:
    """Judge the evaluation; returns whether the model may be registered. A closed gate is a result, not a failure."""
    from pathlib import Path

    from braintumor.params import parse_params
    from braintumor.registry.attempts import step_of_the_attempt
    from braintumor.steps.gate import gate
    from components.views import write_decision_report

    inputs = (Path(evaluation.path), Path(context.path), Path(validation.path))
    with step_of_the_attempt("gate", run_id):
        verdict = gate(*inputs, Path(decision.path), parse_params(params).gate)
        write_decision_report(Path(decision.path), Path(report.path))
    print("\n".join([f"gate: {'passed' if verdict.passed else 'not passed'}", *verdict.failures]))
    return verdict.passed
