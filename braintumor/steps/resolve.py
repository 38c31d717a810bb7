"""The step `resolve`."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from braintumor import artifacts
from braintumor.artifacts import digest_of_files, read_json, replacing_directory, write_json
from braintumor.errors import UserError
from braintumor.params import Params, RegisterParams
from braintumor.registry.settled import keep, registry_state, write_again

if TYPE_CHECKING:
    from braintumor.data.profile import Accepted
    from braintumor.data.versions import DataVersion


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
    from braintumor.data.versions import find_version

    version = find_version(dataset)
    inputs = _inputs(version, params)
    # Where the registry has not changed since the last time, neither has the answer: MLflow need not be loaded.
    state = registry_state()
    if write_again(output, state, inputs):
        return Context(**read_json(output / artifacts.CONTEXT, "braintumor resolve"))
    with replacing_directory(output) as folder:
        context = _ask(version, params, folder)
    if state is not None and registry_state() == state:
        keep(output, state, inputs)
    return context


def confirm(context: Path, params: RegisterParams) -> None:
    """What `resolve` left in `context` is kept for its next run, if it is what MLflow answers now."""
    from braintumor.data.versions import DataVersion

    state = registry_state()
    files = (artifacts.CONTEXT, artifacts.ACCEPTED)
    if state is None or not all((context / name).is_file() for name in files):
        return
    facts = read_json(context / artifacts.CONTEXT, "braintumor resolve")
    version = DataVersion(facts["data_md5"], facts["n_images"])
    with tempfile.TemporaryDirectory() as scratch:
        _ask(version, params, Path(scratch))
        now, then = (digest_of_files(root, [root / name for name in files]) for root in (Path(scratch), context))
    if now == then and registry_state() == state:
        keep(context, state, _inputs(version, params))


def _inputs(version: "DataVersion", params: RegisterParams) -> dict[str, object]:
    return {"version": asdict(version), "model_name": params.model_name}


def _ask(version: "DataVersion", params: RegisterParams, folder: Path) -> Context:
    """What MLflow says of this data version, written into `folder`."""
    from braintumor.data.profile import write_accepted
    from braintumor.registry.versions import champion, last_accepted

    accepted = last_accepted(params.model_name, version.md5)
    context = Context(
        data_md5=version.md5,
        n_images=version.n_images,
        model_name=params.model_name,
        champion=champion(params.model_name),
        accepted=_facts(accepted),
    )
    write_json(folder / artifacts.CONTEXT, asdict(context))
    write_accepted(accepted, version.md5, folder / artifacts.ACCEPTED)
    return context


def resolve_attempt(dataset: Path, output: Path, params: Params, image: str, *, is_forced: bool) -> Resolution:
    """As `resolve`, and whether there is anything new to train, compared with the last completed attempt.

    If there is, MLflow has a run for it, which the later steps join. Raises UserError outside a pipeline, too.
    """
    from braintumor.registry.attempts import open_attempt, open_run_for_a_failure

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


def _facts(accepted: "Accepted | None") -> dict[str, str | bool] | None:
    if accepted is None:
        return None
    has_profile = accepted.images is not None
    return {"version": accepted.version, "data_md5": accepted.data_md5, "has_profile": has_profile}
