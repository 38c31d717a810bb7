"""The component `validate`, where tasks before it have read and compared the images."""

from typing import List  # noqa: UP035 -- kfp knows a list of artifacts by this name alone

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Output


@dsl.component(base_image="braintumor", install_kfp_package=False)
def validate(
    dataset: str,
    context: Input[Artifact],
    context_digest: str,
    survey: Input[Artifact],
    survey_digest: str,
    matches: Input[List[Artifact]],  # noqa: UP006
    match_digests: list,
    params: str,
    validation: Output[Artifact],
    report: Output[HTML],
) -> str:
    """Check the images and group their copies; returns the digest of what split reads.

    `context_digest` is there for Kubeflow's cache, which does not look into artifacts.
    """
    from pathlib import Path

    from braintumor.artifacts import DATA_DOCS, DIFFERENCE, MANIFEST, digest_of_files
    from braintumor.data.shards import Shards
    from braintumor.params import parse_params
    from braintumor.progress import shown
    from braintumor.registry.attempts import step_of_the_attempt
    from braintumor.steps.validate import validate
    from components.views import write_validation_report

    output = Path(validation.path)
    shards = Shards(Path(survey.path), [Path(match.path) for match in matches], survey_digest, match_digests)
    with step_of_the_attempt("validate", evidence=output / DATA_DOCS), shown() as progress:
        validate(Path(dataset), Path(context.path), output, parse_params(params), progress, shards)
        write_validation_report(output, Path(report.path))
    return digest_of_files(output, [output / MANIFEST, output / DIFFERENCE])
