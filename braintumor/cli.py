"""The command line: options in, a step's function called, its findings shown; no logic of its own."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from braintumor.errors import GateNotPassed, UserError

if TYPE_CHECKING:
    from braintumor.data.next_version import Change
    from braintumor.params import Profile

app = typer.Typer(
    name="braintumor",
    help="Retrain a brain-tumour MRI classifier: from versioned images to a gated model version.\n\n"
    "A research tool, not a diagnostic device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make, import or correct a data set.", no_args_is_help=True)
model_app = typer.Typer(help="Make a backbone.", no_args_is_help=True)
params_app = typer.Typer(help="List and choose parameter profiles.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
app.add_typer(params_app, name="params")
pipeline_app = typer.Typer(help="The same steps on Kubeflow Pipelines.", no_args_is_help=True)
app.add_typer(pipeline_app, name="pipeline")
registry_app = typer.Typer(help="Make MLflow's server ready for a team.", no_args_is_help=True)
app.add_typer(registry_app, name="registry")

Dataset = Annotated[Path, typer.Option(help="Folder of images: {train,test}/<class>/.")]
Output = Annotated[Path, typer.Option(help="Folder to make; an earlier one is replaced at the end.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="Parameters file.")]
Context = Annotated[Path, typer.Option(help="Folder that 'resolve' made.")]
Validation = Annotated[Path, typer.Option(help="Folder that 'validate' made.")]
Splits = Annotated[Path, typer.Option(help="Folder that 'split' made.")]
Model = Annotated[Path, typer.Option(help="Folder that 'train' made.")]
Evaluation = Annotated[Path, typer.Option(help="Folder that 'evaluate' made.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what would be done; write nothing.")]
DecisionFolder = Annotated[Path, typer.Option("--decision", help="Folder that 'gate' made.")]
ClusterProfile = Annotated[str | None, typer.Option("--profile", help="A profile of params/, instead of --params.")]
Image = Annotated[str, typer.Option(help="The steps' image, with a tag or (better) its digest.")]
ClusterDataset = Annotated[str, typer.Option("--dataset", help="Md5 of a published data version, or 'latest'.")]
Force = Annotated[bool, typer.Option("--force", help="Train though nothing is new.")]
Namespace = Annotated[str | None, typer.Option(help="Namespace of the user, on a cluster with several users.")]
Experiment = Annotated[str, typer.Option(help="Group of runs in the UI; made if it is absent.")]
Reason = Annotated[str, typer.Option(help="Why; it stands in the ledger.")]
ScheduleName = Annotated[str, typer.Option("--name", help="Small letters, digits and '-'; one schedule a name.")]

WITH_ADD, OF_VOLUMES = "With --add", "DICOM series and NIfTI volumes"
DATA, BUILD, PARAMS = Path("data"), Path("build"), Path("params.yaml")
RETRAINING = "brain-tumor-retraining"  # schedule and experiment, unless named otherwise


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
    from braintumor.progress import warn
    from braintumor.steps.resolve import resolve

    context = resolve(dataset, output, load_params(params_file).registration)
    if context.accepted and not context.accepted["has_profile"]:
        warn(f"MLflow keeps no profile of the data of version {context.accepted['version']}: nothing to compare with")
    champion = f"version {context.champion['version']}" if context.champion else "none"
    accepted = f"version {context.accepted['version']}" if context.accepted else "none"
    print(
        f"resolve: data {context.data_md5}, {context.n_images} images, champion: {champion}, "
        f"last accepted other data: {accepted}"
    )


@app.command(rich_help_panel="Steps")
def validate(
    dataset: Dataset = DATA,
    context: Context = BUILD / "resolve",
    output: Output = BUILD / "validation",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Check the images, group their copies, write the manifest and the Data Docs."""
    from braintumor.params import load_params
    from braintumor.progress import shown, warn
    from braintumor.steps.validate import validate

    params = load_params(params_file)
    with shown() as progress:
        summary = validate(dataset, context, output, params, progress)
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
    print(
        f"split: {sizes}; floors {summary.nearest_neighbour_accuracy:.1%} by the nearest neighbour, "
        f"{summary.statistics_accuracy:.1%} by intensity statistics"
    )


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
    if summary is None:
        print("train: done; the first worker has the model")
        return
    print(
        f"train: {summary.epochs_run} epochs in {summary.seconds:.0f} s, kept epoch {summary.best_epoch} "
        f"(val accuracy {summary.best_val_accuracy:.1%}), temperature {summary.temperature:.2f}"
    )


@app.command(rich_help_panel="Steps")
def evaluate(
    dataset: Dataset = DATA,
    validation: Validation = BUILD / "validation",
    splits: Splits = BUILD / "split",
    model: Model = BUILD / "model",
    context: Context = BUILD / "resolve",
    output: Output = BUILD / "evaluation",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Score the model on the test images of its split, and gather the evidence: figures, pictures, a report."""
    from braintumor.artifacts import REPORT
    from braintumor.params import load_params
    from braintumor.progress import shown
    from braintumor.steps.evaluate import evaluate

    params = load_params(params_file)
    with shown() as progress:
        metrics = evaluate(dataset, validation, splits, model, context, output, params, progress)
    low, high = metrics["accuracy_interval"]
    print(f"evaluate: accuracy {metrics['accuracy']:.2%} ({low:.1%} to {high:.1%}) on {metrics['n_test']} images")
    print(f"evaluate: the report is {output / REPORT}")


@app.command(rich_help_panel="Steps")
def gate(
    evaluation: Evaluation = BUILD / "evaluation",
    context: Context = BUILD / "resolve",
    validation: Validation = BUILD / "validation",
    output: Output = BUILD / "gate",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Judge the evaluation; exit code 4 if the model may not be registered."""
    from braintumor.params import load_params
    from braintumor.progress import warn
    from braintumor.steps.gate import gate

    decision = gate(evaluation, context, validation, output, load_params(params_file).gate)
    for warning in decision.warnings:
        warn(warning)
    if not decision.passed:
        raise GateNotPassed("the gate is closed: " + "; ".join(decision.failures))
    print(f"gate: passed, {len(decision.checks)} checks")


@app.command(rich_help_panel="Steps")
def register(
    model: Model = BUILD / "model",
    splits: Splits = BUILD / "split",
    evaluation: Evaluation = BUILD / "evaluation",
    decision: DecisionFolder = BUILD / "gate",
    context: Context = BUILD / "resolve",
    validation: Validation = BUILD / "validation",
    output: Output = BUILD / "registration",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Register the model in MLflow as challenger, after checking every digest again."""
    from braintumor.params import load_params
    from braintumor.steps.register import register

    registration = register(model, splits, evaluation, decision, context, validation, output, load_params(params_file))
    alias = registration.alias or "left on a newer version"
    print(f"register: {registration.model_name} version {registration.version}, alias {alias}")


@app.command(rich_help_panel="Use")
def predict(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    model: Annotated[Path | None, typer.Option(help="A model.keras file, instead of the registry.")] = None,
    alias: Annotated[str, typer.Option(help="Alias or number of the version in the registry.")] = "champion",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    explain: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write each image with its heat map there, as PNG.")
    ] = None,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Class and probabilities of images, by a model of the registry or a file, and which are unlike the training's."""
    from braintumor.predict import model_file, predict_files, show

    with model_file(model, params_file, alias) as file:
        predictions, unreadable = predict_files(file, paths, explain)
    show(predictions, as_json)
    if explain is not None and predictions and not as_json:
        print(f"{len(predictions)} images with their heat maps are in {explain}")
    if unreadable:
        raise UserError("\n".join(unreadable))


@app.command(rich_help_panel="Promote")
def promote(
    version: Annotated[str, typer.Argument(help="Number of the version, as the model's page in MLflow shows it.")],
    reason: Reason,
    override: Annotated[
        str, typer.Option(help="Why all the same, where the version is worse, not comparable or too old.")
    ] = "",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Make a version the champion; exit code 4 if it may not be promoted.

    All evidence is read anew from MLflow and judged by the rules of --params.
    Setting the alias 'champion' on the version's page does the same.
    """
    from braintumor.params import load_params
    from braintumor.registry.promotions import promote

    params = load_params(params_file)
    print(f"promote: {promote(params.registration.model_name, version, reason, override, params)}")


@app.command(rich_help_panel="Promote")
def rollback(reason: Reason, params_file: ParamsFile = PARAMS) -> None:
    """Make the champion before the present one the champion again."""
    from braintumor.params import load_params
    from braintumor.registry.promotions import rollback

    params = load_params(params_file)
    print(f"rollback: {rollback(params.registration.model_name, reason, params)}")


@app.command(rich_help_panel="Promote")
def history(
    verify: Annotated[bool, typer.Option("--verify", help="Check every entry, and all that refers to it.")] = False,
    contains: Annotated[
        str, typer.Option(metavar="SHA256", help="Fail unless the ledger holds the entry of this hash.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Show the ledger: who promoted what, when and why."""
    from braintumor.params import load_params
    from braintumor.registry import history

    model_name = load_params(params_file).registration.model_name
    verified = history.verify_history(model_name) if verify else None
    entries = history.history(model_name)
    if contains:
        history.find_hash(entries, contains)
    if as_json:
        print(history.as_json(entries, model_name))
        return
    history.show_history(entries, model_name)
    if verified is not None and verified.head_sha256:
        print(f"history: the chain holds, {verified.n} entries; the hash of the last is {verified.head_sha256}")


@app.command(rich_help_panel="Promote")
def promoter(
    once: Annotated[bool, typer.Option("--once", help="Carry out what there is, and end.")] = False,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where /webhook and /health are served.")
    ] = "0.0.0.0:8080",
    params_file: ParamsFile = PARAMS,
) -> None:
    """Run the service that carries out what reviewers decide.

    Each change of the alias 'champion' gets its entry in the ledger, and
    BRAINTUMOR_DEPLOY_HOOK its call, signed with BRAINTUMOR_DEPLOY_SECRET; what
    may not be promoted is put back. MLflow's webhook, signed with
    BRAINTUMOR_WEBHOOK_SECRET, wakes it; what no webhook told it finds by itself.
    """
    from braintumor.params import load_params
    from braintumor.promoter import promote_once, serve

    params = load_params(params_file)
    if not once:
        serve(params, listen)
        return
    lines = promote_once(params)
    print("\n".join(lines) or "promoter: nothing to do")


@app.command(rich_help_panel="Use")
def summary(build: Annotated[Path, typer.Option(help="Folder of the steps' outputs.")] = BUILD) -> None:
    """Show what the last run did, in one table."""
    from braintumor.summary import show_summary

    show_summary(build)


@data_app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="Folder or .zip: Training/Testing x classes, or classes alone.")],
    output: Annotated[Path, typer.Option(help="The data set.")] = DATA,
    add: Annotated[bool, typer.Option("--add", help="Keep what is there, and add the images of SOURCE.")] = False,
    dry_run: DryRun = False,
    discard: Annotated[bool, typer.Option("--discard", help="Replace a data set that DVC does not hold, too.")] = False,
    copies: Annotated[
        Literal["skip", "add"],
        typer.Option(help="Images that are there already, perhaps mirrored or recompressed.", rich_help_panel=WITH_ADD),
    ] = "skip",
    patient_prefix: Annotated[
        str,
        typer.Option(
            help="Put before the patient numbers of SOURCE, where they mean other people than the same numbers there.",
            rich_help_panel=WITH_ADD,
        ),
    ] = "",
    report: Annotated[
        Path | None, typer.Option(help="CSV to write: what becomes of each image.", rich_help_panel=WITH_ADD)
    ] = None,
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters file: what is a copy.", rich_help_panel=WITH_ADD)
    ] = PARAMS,
    plane: Annotated[
        Literal["acquired", "axial"],
        typer.Option(help="Slices as they were scanned, or axial ones.", rich_help_panel=OF_VOLUMES),
    ] = "acquired",
    slices: Annotated[int, typer.Option(min=1, help="Slices of each volume.", rich_help_panel=OF_VOLUMES)] = 5,
    middle_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the volume they come from.", rich_help_panel=OF_VOLUMES)
    ] = 0.6,
) -> None:
    """Make the data set of the images of SOURCE; with --add, let it grow by them.

    SOURCE is a folder or a .zip with Training/ and Testing/, each with a folder
    a class (glioma or glioma_tumor, notumor or no_tumor, ...), or with class
    folders alone, which all go to train/. A groups.csv (path,patient) in it
    brings patient numbers. DICOM series and NIfTI volumes become slices.

    The data set changes all at once, at the end: whatever happens, the old or
    the new one is there. SOURCE stays as it is. Try --dry-run first.
    """
    from braintumor.data.growth import AddSummary, add_images
    from braintumor.data.intake import ImportSummary, import_dataset
    from braintumor.data.slices import SliceRule
    from braintumor.params import load_params
    from braintumor.progress import shown

    if add and discard:
        raise UserError("--add discards nothing; leave out --discard, or --add")
    if not add and (copies != "skip" or patient_prefix or report):
        raise UserError("--copies, --patient-prefix and --report go with --add; add it, or leave them out")
    rule = SliceRule(plane, slices, middle_share)
    with shown() as progress:
        if add:
            summary: AddSummary | ImportSummary = add_images(
                source, output, load_params(params_file).validation.copy_correlation, progress,
                copies=copies, patient_prefix=patient_prefix, rule=rule, report=report, dry_run=dry_run,
            )  # fmt: skip
        else:
            summary = import_dataset(source, output, progress, rule=rule, discard=discard, dry_run=dry_run)
    _show_change(summary, output, "New images", dry_run)


@data_app.command("relabel")
def data_relabel(
    corrections: Annotated[Path, typer.Argument(metavar="CSV", help="Columns: path, new_label; others are ignored.")],
    dataset: Dataset = DATA,
    dry_run: DryRun = False,
) -> None:
    """Correct labels: CSV names images and their new labels.

    Its column path is relative to the data set, as train/glioma/a.jpg; its
    column new_label is a class, 'remove' to take the image out of the set, or
    empty to leave it. odd_images.csv of the validation can be filled in so.

    An image keeps its split and its name. What is taken out stands in a folder
    beside the data set afterwards (data-removed).
    """
    from braintumor.data.relabel import relabel
    from braintumor.progress import shown

    with shown() as progress:
        summary = relabel(corrections, dataset, progress, dry_run=dry_run)
    _show_change(summary, dataset, "Corrected labels", dry_run)


@data_app.command("publish")
def data_publish(
    dataset: Dataset = DATA,
    remote: Annotated[
        str, typer.Option(help="DVC's remote: s3://BUCKET/PREFIX or a folder; else BRAINTUMOR_DATA_REMOTE.")
    ] = "",
) -> None:
    """Make the committed data version the one that scheduled runs take.

    Run it after 'dvc push' and 'git commit'. What the remote lacks, and what
    somebody else has published since, is noticed before anything is written.
    """
    from braintumor.data.dvc_remote import open_remote
    from braintumor.data.published import publish
    from braintumor.progress import shown

    with shown() as progress:
        published = publish(open_remote(remote), Path(f"{dataset}.dvc"), progress)
    print(f"publish: {published}")


def _show_change(summary: "Change", dataset: Path, message: str, dry_run: bool) -> None:
    from braintumor.data.next_version import next_commands

    print(summary)
    if dry_run:
        print("dry run: the data set stays as it is")
    elif summary.is_changed:
        print(next_commands(dataset, message))


@data_app.command("sample")
def data_sample(
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other patients.")] = 0,
    train_patients: Annotated[int, typer.Option(min=1, help="Patients of each class for training.")] = 100,
    test_patients: Annotated[int, typer.Option(min=1, help="Patients of each class for testing.")] = 33,
    size_px: Annotated[int, typer.Option(min=32, max=512, help="Side of the images.")] = 128,
    with_masks: Annotated[
        bool, typer.Option("--with-masks", help="Write the lesions of the test images to OUTPUT/masks, too.")
    ] = False,
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


@registry_app.command("setup")
def registry_setup(
    users: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="A line 'name: role' a user: reviewer, promoter, pipeline, reader."),
    ] = None,
    passwords: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A file a user, of his name; else BRAINTUMOR_PASSWORD_<NAME>.")
    ] = None,
    webhook_address: Annotated[
        str | None, typer.Option(help="The promoter's /webhook; needs BRAINTUMOR_WEBHOOK_SECRET.")
    ] = None,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Make roles, users, the model and the promoter's webhook, as often as you like.

    Takes an administrator's MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, and a server that was started with
    --app-name braintumor-auth. Users who are not named stay as they are.
    """
    from braintumor.params import load_params
    from braintumor.registry.provisioning import set_up

    done = set_up(load_params(params_file).registration, users, passwords, webhook_address)
    print("\n".join(f"registry: {line}" for line in done) or "registry: all is there")


@pipeline_app.command("compile")
def pipeline_compile(
    image: Image,
    output: Annotated[Path, typer.Option("--output", help="YAML file to write: two documents, both needed.")],
    profile: ClusterProfile = None,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Write the pipeline as a package that Kubeflow Pipelines takes."""
    from braintumor.artifacts import write_text

    package, _ = _compiled(profile, params_file, image)
    write_text(output, package)
    print(f"{output}: the graph, and its settings for Kubernetes; upload it as it is, both documents together")


@pipeline_app.command("run-local")
def pipeline_run_local(
    dataset: Annotated[str, typer.Option(help="Folder of images, md5 of a data version, or 'latest'.")] = str(DATA),
    output: Annotated[Path, typer.Option(help="Folder that gets a folder a run.")] = BUILD / "pipeline",
    profile: ClusterProfile = None,
    params_file: ParamsFile = PARAMS,
    force: Force = False,
) -> None:
    """Run the compiled pipeline on this machine, each task in a process."""
    from pipelines.local_run import run_local, show_local_run

    run = run_local(_profile(profile, params_file), dataset, output, is_forced=force)
    show_local_run(run)
    if run.ending.outcome == "gate not passed":
        raise GateNotPassed(run.ending.message)
    if run.ending.outcome == "failed":
        raise UserError(f"{run.ending.headline}: {run.ending.message}; the log is {run.log}")


@pipeline_app.command("submit")
def pipeline_submit(
    image: Image,
    profile: ClusterProfile = None,
    params_file: ParamsFile = PARAMS,
    dataset: ClusterDataset = "latest",
    force: Force = False,
    name: Annotated[str, typer.Option(help="What the run is called in the UI; the time of day if empty.")] = "",
    namespace: Namespace = None,
    experiment: Experiment = RETRAINING,
) -> None:
    """Start a run on the cluster that KF_PIPELINES_ENDPOINT names, and print its address.

    KF_PIPELINES_TOKEN is its bearer token, where it wants one.
    """
    from pipelines.cluster import run_parameters, submit
    from pipelines.connection import connect

    parameters = run_parameters(dataset, force)
    package, service_account = _compiled(profile, params_file, image)
    submitted = submit(
        connect(namespace=namespace), package, parameters,
        name=name, experiment=experiment, service_account=service_account,
    )  # fmt: skip
    print(f"submitted: run {submitted.run_id} of version {submitted.version}\n{submitted.address}")


@pipeline_app.command("schedule")
def pipeline_schedule(
    image: Image,
    cron: Annotated[str, typer.Option(help="Six fields, seconds first, in UTC: '0 0 2 * * *' is every night at two.")],
    profile: ClusterProfile = None,
    params_file: ParamsFile = PARAMS,
    dataset: ClusterDataset = "latest",
    force: Force = False,
    name: ScheduleName = RETRAINING,
    namespace: Namespace = None,
    experiment: Experiment = RETRAINING,
) -> None:
    """Start a run again and again; the schedule of the same name is replaced.

    One run at a time, and none is made up for. Run the command again after an
    interruption: one schedule of this name is there in the end.
    """
    from pipelines.cluster import run_parameters, schedule, show_schedule
    from pipelines.connection import connect
    from pipelines.cron import check_cron

    cron, parameters = check_cron(cron), run_parameters(dataset, force)
    package, service_account = _compiled(profile, params_file, image)
    scheduled = schedule(
        connect(namespace=namespace), package, parameters,
        name=name, cron=cron, experiment=experiment, service_account=service_account,
    )  # fmt: skip
    show_schedule(scheduled, name)


@pipeline_app.command("unschedule")
def pipeline_unschedule(name: ScheduleName = RETRAINING, namespace: Namespace = None) -> None:
    """Remove the schedule; a run that is under way goes on."""
    from pipelines.cluster import unschedule
    from pipelines.connection import connect

    removed = unschedule(connect(namespace=namespace), name)
    print(f"{name} is scheduled no more" if removed else f"{name} was not scheduled; nothing to do")


@pipeline_app.command("status")
def pipeline_status(
    limit: Annotated[int, typer.Option(min=1, help="How many of the last runs.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
    namespace: Namespace = None,
    experiment: Experiment = RETRAINING,
) -> None:
    """Show the schedules and the last runs, and why runs failed."""
    from pipelines.cluster import show_status, status
    from pipelines.connection import connect

    found = status(connect(namespace=namespace), experiment, limit)
    if as_json:
        print(found.as_json())
    else:
        show_status(found)


def _compiled(profile: str | None, params_file: Path, image: str) -> tuple[str, str]:
    """The package of a profile, and the service account that it runs as."""
    from pipelines.compiled import compile_pipeline

    chosen = _profile(profile, params_file)
    return compile_pipeline(chosen, image), chosen.cluster.service_account


def _profile(name: str | None, params_file: Path) -> "Profile":
    from braintumor.params import load_params, load_profile

    if name and params_file != PARAMS:
        raise UserError("--profile and --params both name the parameters; leave one of them out")
    return load_profile(name) if name else load_params(params_file)
