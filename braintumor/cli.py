"""The command line: options in, a step's function called, its findings shown; no logic of its own."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from braintumor.errors import UserError

app = typer.Typer(
    name="braintumor",
    help="Retrain a brain-tumour MRI classifier: from versioned images to a gated model version.\n\n"
    "A research tool, not a diagnostic device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make or import a data set.", no_args_is_help=True)
model_app = typer.Typer(help="Make a backbone.", no_args_is_help=True)
params_app = typer.Typer(help="List and choose parameter profiles.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
app.add_typer(params_app, name="params")

Dataset = Annotated[Path, typer.Option(help="Folder of images: {train,test}/<class>/.")]
Output = Annotated[Path, typer.Option(help="Folder to make; an earlier one is replaced at the end.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="Parameters file.")]
Context = Annotated[Path, typer.Option(help="Folder that 'resolve' made.")]
Validation = Annotated[Path, typer.Option(help="Folder that 'validate' made.")]
Splits = Annotated[Path, typer.Option(help="Folder that 'split' made.")]
Model = Annotated[Path, typer.Option(help="Folder that 'train' made.")]
Evaluation = Annotated[Path, typer.Option(help="Folder that 'evaluate' made.")]
DecisionFolder = Annotated[Path, typer.Option("--decision", help="Folder that 'gate' made.")]

DATA, BUILD, PARAMS = Path("data"), Path("build"), Path("params.yaml")


def main() -> None:
    """Run the command; a person's mistake ends in one message and the error's exit code, not in a traceback."""
    # Kubernetes and `docker stop` send SIGTERM: leave as after an error, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"Error: {error}; check the path, its permissions and the free space", file=sys.stderr)
        sys.exit(UserError.exit_code)


@app.command(rich_help_panel="Steps")
def resolve(dataset: Dataset = DATA, output: Output = BUILD / "resolve", params_file: ParamsFile = PARAMS) -> None:
    """Write down the data version and the current champion."""
    from braintumor.params import load_params
    from braintumor.steps.resolve import resolve

    context = resolve(dataset, output, load_params(params_file).registration)
    champion = f"version {context.champion['version']}" if context.champion else "none"
    print(f"resolve: data {context.data_md5}, {context.n_images} images, champion: {champion}")


@app.command(rich_help_panel="Steps")
def validate(dataset: Dataset = DATA, output: Output = BUILD / "validation", params_file: ParamsFile = PARAMS) -> None:
    """Check the images, group their copies, write the manifest and the Data Docs."""
    from braintumor.params import load_params
    from braintumor.progress import shown, warn
    from braintumor.steps.validate import validate

    params = load_params(params_file).validation
    with shown() as progress:
        summary = validate(dataset, output, params, progress)
    for warning in summary.warnings:
        warn(warning)
    print(f"validate: {summary.n_images} images, {summary.n_groups} without copies, {summary.n_warnings} warnings")


@app.command(rich_help_panel="Steps")
def split(
    dataset: Dataset = DATA,
    validation: Validation = BUILD / "validation",
    output: Output = BUILD / "split",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Divide the images into train, val, calibration and test; copies stay on one side."""
    from braintumor.params import load_params
    from braintumor.progress import shown, warn
    from braintumor.steps.split import split

    params = load_params(params_file).split
    with shown() as progress:
        summary = split(dataset, validation, output, params, progress)
    for warning in summary.warnings:
        warn(warning)
    sizes = ", ".join(f"{size} {name}" for name, size in summary.sizes.items())
    print(f"split: {sizes}; 1-nearest-neighbour floor {summary.nearest_neighbour_accuracy:.1%}")


@app.command(rich_help_panel="Steps")
def train(
    dataset: Dataset = DATA,
    splits: Splits = BUILD / "split",
    output: Output = BUILD / "model",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Fine-tune DenseNet201 and keep the best epoch."""
    from braintumor.params import load_params
    from braintumor.progress import shown
    from braintumor.steps.train import train

    params = load_params(params_file)
    with shown() as progress:
        summary = train(dataset, splits, output, params, progress)
    print(
        f"train: {summary.epochs_run} epochs in {summary.seconds:.0f} s, kept epoch {summary.best_epoch} "
        f"(val accuracy {summary.best_val_accuracy:.1%}), temperature {summary.temperature:.2f}"
    )


@app.command(rich_help_panel="Steps")
def evaluate(
    dataset: Dataset = DATA,
    splits: Splits = BUILD / "split",
    model: Model = BUILD / "model",
    output: Output = BUILD / "evaluation",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Score the model on the test images of its split."""
    from braintumor.params import load_params
    from braintumor.progress import shown
    from braintumor.steps.evaluate import evaluate

    params = load_params(params_file)
    with shown() as progress:
        metrics = evaluate(dataset, splits, model, output, params, progress)
    low, high = metrics["accuracy_interval"]
    print(f"evaluate: accuracy {metrics['accuracy']:.2%} ({low:.1%} to {high:.1%}) on {metrics['n_test']} images")


@app.command(rich_help_panel="Steps")
def gate(
    evaluation: Evaluation = BUILD / "evaluation",
    context: Context = BUILD / "resolve",
    output: Output = BUILD / "gate",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Judge the evaluation; exit code 4 if the model may not be registered."""
    from braintumor.params import load_params
    from braintumor.progress import warn
    from braintumor.steps.gate import gate

    decision = gate(evaluation, context, output, load_params(params_file).gate)
    for warning in decision.warnings:
        warn(warning)
    print(f"gate: passed, {len(decision.checks)} checks")


@app.command(rich_help_panel="Steps")
def register(
    model: Model = BUILD / "model",
    splits: Splits = BUILD / "split",
    evaluation: Evaluation = BUILD / "evaluation",
    decision: DecisionFolder = BUILD / "gate",
    context: Context = BUILD / "resolve",
    output: Output = BUILD / "registration",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Register the model in MLflow as challenger, after checking every digest again."""
    from braintumor.params import load_params
    from braintumor.steps.register import register

    registration = register(model, splits, evaluation, decision, context, output, load_params(params_file))
    alias = registration.alias or "left on a newer version"
    print(f"register: {registration.model_name} version {registration.version}, alias {alias}")


@app.command(rich_help_panel="Use")
def predict(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    model: Annotated[Path | None, typer.Option(help="A model.keras file, instead of the registry.")] = None,
    alias: Annotated[str, typer.Option(help="Alias or number of the version in the registry.")] = "champion",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Class and probabilities of images, by a model of the registry or a file."""
    from braintumor.predict import model_file, predict_files, show

    with model_file(model, params_file, alias) as file:
        predictions, unreadable = predict_files(file, paths)
    show(predictions, as_json)
    if unreadable:
        raise UserError("\n".join(unreadable))


@app.command(rich_help_panel="Use")
def summary(build: Annotated[Path, typer.Option(help="Folder of the steps' outputs.")] = BUILD) -> None:
    """Show what the last run did, in one table."""
    from braintumor.summary import show_summary

    show_summary(build)


@data_app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="Folder or .zip: Training/Testing x classes, or flat classes.")],
    output: Annotated[Path, typer.Option(help="Data set to replace.")] = DATA,
) -> None:
    """Replace the data set by the images of SOURCE."""
    from braintumor.data.intake import import_dataset
    from braintumor.progress import shown

    with shown() as progress:
        print(import_dataset(source, output, progress))


@data_app.command("sample")
def data_sample(
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other patients.")] = 0,
    train_patients: Annotated[int, typer.Option(min=1, help="Patients of each class for training.")] = 100,
    test_patients: Annotated[int, typer.Option(min=1, help="Patients of each class for testing.")] = 33,
    size_px: Annotated[int, typer.Option(min=32, max=512, help="Side of the images.")] = 128,
    with_masks: Annotated[bool, typer.Option("--with-masks", help="Write lesion masks to OUTPUT-masks.")] = False,
) -> None:
    """Draw phantoms of four classes on the MNI152 template."""
    from braintumor.data.sample import draw_sample
    from braintumor.progress import shown

    patients = {"train": train_patients, "test": test_patients}
    with shown() as progress:
        drawn = draw_sample(output, patients, seed=seed, size_px=size_px, with_masks=with_masks, progress=progress)
    print(f"sample: {drawn.images} images of {drawn.patients} patients, {drawn.bytes / 1e6:.1f} MB in {drawn.output}")


@model_app.command("backbone")
def model_backbone(
    model: Annotated[Path, typer.Argument(help="A model.keras file.")],
    output: Annotated[Path, typer.Argument(help="The .weights.h5 file to make.")],
) -> None:
    """Write the backbone of a trained model, kernels in 16 bits, to fine-tune from."""
    from braintumor.model.densenet import save_backbone

    size = save_backbone(model, output)
    print(f"{output}: {size / 1e6:.1f} MB")


@model_app.command("pretrain-sample")
def model_pretrain_sample(
    output: Annotated[Path, typer.Argument(help="The .weights.h5 file to make.")],
    params_file: ParamsFile = Path("params/pretrain-sample.yaml"),
) -> None:
    """Pre-train the sample's backbone on phantoms of other seeds."""
    from braintumor.model.pretrain import pretrain_sample
    from braintumor.params import load_params
    from braintumor.progress import shown

    params = load_params(params_file).train
    with shown() as progress:
        kept = pretrain_sample(output, params, progress)
    print(f"{output}: epoch {kept.epoch} of the last round, val accuracy {kept.val_accuracy:.1%}")


@params_app.command("list")
def params_list() -> None:
    """List the profiles in params/."""
    from braintumor.params import list_profiles

    for name, purpose in list_profiles().items():
        print(f"{name:20} {purpose}")


@params_app.command("use")
def params_use(name: Annotated[str, typer.Argument(help="A profile, as 'braintumor params list' names it.")]) -> None:
    """Make a profile the params.yaml in use."""
    from braintumor.params import use_profile

    print(f"params.yaml is now a copy of {use_profile(name)}")
