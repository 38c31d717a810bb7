"""The step `resolve`."""

from dataclasses import asdict, dataclass
from pathlib import Path

from braintumor import artifacts
from braintumor.artifacts import replacing_directory, write_json
from braintumor.data.manifest import file_md5s, list_contents, version_md5
from braintumor.data.profile import Accepted, write_accepted
from braintumor.params import RegisterParams
from braintumor.registry.versions import champion, last_accepted


@dataclass(frozen=True)
class Context:
    """What a run starts from; `champion` holds version, model_digest and data_md5."""

    data_md5: str
    n_images: int
    model_name: str
    champion: dict[str, str | None] | None
    accepted: dict[str, str | bool] | None  # the last accepted data version: version, data_md5, has_profile


def resolve(dataset: Path, output: Path, params: RegisterParams) -> Context:
    """The data version, the champion and the last accepted data version stand in `output`.

    The bytes of context.json and accepted.parquet change only when these facts do. Raises RegistryUnreachable if MLflow
    does not answer, UserError if what it keeps of the accepted data is damaged; `output` is as it was then.
    """
    contents = list_contents(dataset)
    data_md5 = version_md5(file_md5s(dataset, contents.versioned))
    accepted = last_accepted(params.model_name, data_md5)
    context = Context(
        data_md5=data_md5,
        n_images=len(contents.images),
        model_name=params.model_name,
        champion=champion(params.model_name),
        accepted=_facts(accepted),
    )
    with replacing_directory(output) as folder:
        write_json(folder / artifacts.CONTEXT, asdict(context))
        write_accepted(accepted, data_md5, folder / artifacts.ACCEPTED)
    return context


def _facts(accepted: Accepted | None) -> dict[str, str | bool] | None:
    if accepted is None:
        return None
    has_profile = accepted.images is not None
    return {"version": accepted.version, "data_md5": accepted.data_md5, "has_profile": has_profile}
