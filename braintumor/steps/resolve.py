"""The step `resolve`."""

from dataclasses import asdict, dataclass
from pathlib import Path

from braintumor import artifacts
from braintumor.artifacts import digest_of_files, replacing_directory, write_json
from braintumor.data.profile import Accepted, write_accepted
from braintumor.data.versions import find_version
from braintumor.errors import UserError
from braintumor.params import Params, RegisterParams
from braintumor.registry.attempts import open_attempt, open_run_for_a_failure
from braintumor.registry.versions import champion, last_accepted


@dataclass(frozen=True)
class Context:
    """What a run starts from; `champion` holds version, model_digest and data_md5."""

    data_md5: str
    n_images: int
    model_name: str
    champion: dict[str, str | None] | None
    accepted: dict[str, str | bool] | None  # the last accepted data version: version, data_md5, has_profile


@dataclass(frozen=True)
class Resolution:
    """What the other tasks of a pipeline go by; `dataset` is a folder or an md5.

    `context_digest` keys their cache, and `run_id` is the attempt's run in MLflow.
    """

    dataset: str
    context_digest: str
    run_id: str
    is_new: bool
    reason: str


def resolve(dataset: Path, output: Path, params: RegisterParams) -> Context:
    """The data version, the champion and the last accepted data version stand in `output`.

    `dataset` is a folder, an md5, or 'latest', the published version. The bytes of context.json and accepted.parquet
    change only when these facts do. Raises RegistryUnreachable if MLflow does not answer, UserError if what it keeps of
    the accepted data is damaged or there is no such data; `output` is as it was then.
    """
    version = find_version(dataset)
    accepted = last_accepted(params.model_name, version.md5)
    context = Context(
        data_md5=version.md5,
        n_images=version.n_images,
        model_name=params.model_name,
        champion=champion(params.model_name),
        accepted=_facts(accepted),
    )
    with replacing_directory(output) as folder:
        write_json(folder / artifacts.CONTEXT, asdict(context))
        write_accepted(accepted, version.md5, folder / artifacts.ACCEPTED)
    return context


def resolve_attempt(dataset: Path, output: Path, params: Params, image: str, *, is_forced: bool) -> Resolution:
    """As `resolve`, and whether there is anything new to train, compared with the last completed attempt.

    If there is, MLflow has a run for it, which the later steps join. Raises UserError outside a pipeline, too.
    """
    try:
        context = resolve(dataset, output, params.registration)
    except UserError:
        open_run_for_a_failure(params)
        raise
    attempt = open_attempt(params, context.data_md5, image, is_forced=is_forced)
    return Resolution(
        dataset=str(dataset) if dataset.is_dir() else context.data_md5,
        # A new champion is no reason to validate the same data again.
        context_digest=digest_of_files(output, [output / artifacts.ACCEPTED]),
        run_id=attempt.run_id,
        is_new=attempt.is_new,
        reason=attempt.reason,
    )


def _facts(accepted: Accepted | None) -> dict[str, str | bool] | None:
    if accepted is None:
        return None
    has_profile = accepted.images is not None
    return {"version": accepted.version, "data_md5": accepted.data_md5, "has_profile": has_profile}
