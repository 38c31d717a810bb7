"""The step `resolve`."""

from dataclasses import asdict, dataclass
from pathlib import Path

from braintumor import artifacts
from braintumor.artifacts import replacing_directory, write_json
from braintumor.data.manifest import file_md5s, list_contents, version_md5
from braintumor.params import RegisterParams
from braintumor.registry.versions import champion


@dataclass(frozen=True)
class Context:
    """What a run starts from; `champion` holds version, model_digest and data_md5."""

    data_md5: str
    n_images: int
    model_name: str
    champion: dict[str, str | None] | None


def resolve(dataset: Path, output: Path, params: RegisterParams) -> Context:
    """The data set's version and the present champion stand in context.json; its bytes change only when they do.

    Raises RegistryUnreachable if MLflow does not answer, and leaves `output` as it was.
    """
    contents = list_contents(dataset)
    context = Context(
        data_md5=version_md5(file_md5s(dataset, contents.versioned)),
        n_images=len(contents.images),
        model_name=params.model_name,
        champion=champion(params.model_name),
    )
    with replacing_directory(output) as folder:
        write_json(folder / artifacts.CONTEXT, asdict(context))
    return context
