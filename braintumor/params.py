"""params.yaml as typed values: unknown and missing keys are errors that name section and key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from braintumor.artifacts import write_text
from braintumor.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PROFILES = Path("params")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Checked = TypeVar("Checked", bound=BaseModel)


class Section(BaseModel):
    """A section of the parameters file: no key may be added or left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OddImages(Section):
    """Above which numbers of the manifest an image is odd, and listed for annotators."""

    max_coloured_share: Annotated[float, Field(ge=0, le=1, description="of the pixels: tinted, or a website around it")]
    max_coloured_line: Annotated[float, Field(ge=0, le=1, description="of a row or column near the edge: a banner")]
    max_white_line: Annotated[float, Field(ge=0, le=1, description="of a row or column near the edge: a white frame")]
    max_mark_length: Annotated[float, Field(ge=0, description="of strokes that look drawn, / the longer side: arrows")]
    max_sharpness: Annotated[float, Field(gt=0, description="Laplacian over deviation: an edge filter")]


class ValidateParams(Section):
    """Thresholds of the data validation."""

    workers: Annotated[int, Field(ge=0, description="processes that read images; 0: one a core")]
    min_images_per_class: Positive
    require_test_images: bool
    min_side_px: Positive
    max_side_px: Positive
    max_class_imbalance: Annotated[float, Field(ge=1, description="largest class / smallest class")]
    min_intensity_std: Annotated[float, Field(ge=0, description="below it an image counts as nearly empty, 0..255")]
    min_intensity_mean: Annotated[float, Field(ge=0, le=255, description="below it an image is nearly black")]
    max_intensity_mean: Annotated[float, Field(ge=0, le=255, description="above it an image is nearly white")]
    copy_correlation: Annotated[float, Field(gt=0, le=1, description="two images are copies above it")]
    max_leaked_share: Fraction
    max_shrinkage: Annotated[float, Field(ge=0, le=1, description="of the last accepted data version, and its classes")]
    max_statistic_drift: Annotated[float, Field(gt=0, le=1, description="Kolmogorov-Smirnov distance to that version")]
    max_label_drift: Annotated[float, Field(gt=0, le=1, description="change of a class's share since that version")]
    odd_images: OddImages


class SplitParams(Section):
    """How images are divided into train, val, calibration and test."""

    protocol: Literal["official", "grouped", "declared", "control"]
    seed: Seed
    test_fraction: Annotated[float, Field(gt=0, lt=1, description="of all images; used by 'grouped' alone")]
    val_fraction: Annotated[float, Field(gt=0, lt=1, description="of the images that are not for testing")]
    calibration_fraction: Annotated[float, Field(gt=0, lt=1, description="of the images that are not for testing")]
    max_share_deviation: Annotated[float, Field(gt=0, le=1, description="of a class's share in a split")]


class Augmentation(Section):
    """Random changes of a training image; 0 or false turns one off."""

    rotation_degrees: Annotated[float, Field(ge=0, le=180)]
    shift_fraction: Fraction
    zoom_fraction: Annotated[float, Field(ge=0, lt=1)]
    contrast_fraction: Annotated[float, Field(ge=0, lt=1)]
    flip_horizontal: bool


class TrainParams(Section):
    """The training recipe."""

    seed: Seed
    image_size_px: Annotated[int, Field(ge=32, le=1024)]
    weights: Annotated[str, Field(min_length=1, description="'imagenet', 'none', a file or an s3:// address")]
    batch_size: Positive
    head_epochs: Annotated[int, Field(ge=0)]
    head_views: Annotated[int, Field(ge=1, le=64, description="of each image: itself, and augmented ones")]
    head_learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]
    optimizer: Literal["adamw", "adam", "sgd"]
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "constant"]
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    class_weights: bool
    input_scaling: Annotated[Literal["imagenet", "per_image"], Field(description="per_image: mean 0, deviation 1")]
    batch_norm: Annotated[
        Literal["by_weights", "inference", "train"], Field(description="by_weights: 'train' with weights 'none' alone")
    ]
    ema_momentum: Annotated[float, Field(ge=0, lt=1, description="of the averaged weights, a step; 0: no averaging")]
    ood_alarm_share: Annotated[float, Field(gt=0, lt=0.5, description="of images like the training's, called unlike")]
    early_stopping_epochs: Annotated[int, Field(ge=0, description="0: never stop early")]
    batch_norm_momentum: Annotated[float, Field(gt=0, lt=1, description="used where BatchNorm trains")]
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"]
    xla: bool
    images_in_memory: Annotated[int, Field(ge=1, description="more are decoded to disk, and shuffled in parts")]
    distribution: Literal["one_device", "mirrored", "multi_worker"]
    augmentation: Augmentation

    @model_validator(mode="after")
    def _has_no_contradiction(self) -> "TrainParams":
        if self.weights == "none" and self.epochs == 0:
            raise ValueError("weights 'none' need epochs >= 1: there is no head phase without pretrained weights")
        if self.head_epochs + self.epochs == 0:
            raise ValueError("head_epochs and epochs are both 0: nothing would be trained")
        if self.weights == "none" and self.batch_norm == "inference":
            raise ValueError("batch_norm 'inference' needs pretrained weights: it would keep statistics of nothing")
        if self.schedule == "constant" and self.warmup_fraction:
            raise ValueError("schedule 'constant' has no warm-up: set warmup_fraction to 0 or take 'cosine'")
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError("optimizer 'adam' has no weight decay: set weight_decay to 0 or take 'adamw'")
        return self


class EvaluateParams(Section):
    """How figures and their intervals are computed."""

    bootstrap_samples: Annotated[int, Field(ge=100)]
    confidence_level: Annotated[float, Field(gt=0.5, lt=1)]
    seed: Seed
    conformal_confidence: Annotated[float, Field(gt=0.5, lt=1, description="share of sets that hold the true class")]
    triage_max_error: Annotated[float, Field(gt=0, lt=1, description="of the images that are not referred")]
    ood_probes: Annotated[int, Field(ge=8, description="images of each kind that are unlike the training's")]
    robustness_images: Annotated[int, Field(ge=0, description="test images that are perturbed; 0: none")]
    gallery_images: Annotated[int, Field(ge=0, description="of each kind, with Grad-CAM; 0: none")]


class Bound(Section):
    """A bound of a figure; only a required one can close the gate, the others warn."""

    value: Fraction
    required: bool


class Rule(Section):
    """A rule without a number; only a required one can close the gate, the others warn."""

    required: bool


class GateParams(Section):
    """Bounds that a model is judged by; null turns one off, except that of the accuracy."""

    min_accuracy: Bound
    min_accuracy_low: Bound | None
    min_copy_free_accuracy: Bound | None
    min_tumour_sensitivity: Bound | None
    min_class_recall: Bound | None
    max_ece: Bound | None
    min_ood_auroc: Bound | None
    not_worse_than_champion: Rule | None


class RegisterParams(Section):
    """Where models are registered."""

    experiment: Annotated[str, Field(min_length=1)]
    model_name: Annotated[str, Field(min_length=1)]
    alias: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]

    @field_validator("alias")
    @classmethod
    def _is_free(cls, alias: str) -> str:
        if alias == "champion":
            raise ValueError("a reviewer sets 'champion' by hand; name another alias, as 'challenger'")
        if alias == "latest" or (alias[0] == "v" and alias[1:].isdecimal()):
            raise ValueError("MLflow keeps this alias for itself; name another one")
        return alias


class PrivacyParams(Section):
    """What of the images may be copied into Data Docs, MLflow and galleries."""

    copy_images: Literal["all", "phantoms", "none"]
    hash_names: bool


class Resources(Section):
    """What a pod asks for and may not exceed, in Kubernetes' quantities, and how long it may run."""

    cpu: Annotated[str, Field(pattern=r"^[0-9]+m?$|^[0-9]+\.[0-9]+$")]
    memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]i?$")]
    timeout_minutes: Positive


class Toleration(Section):
    """A taint of the nodes that pods may stand on all the same."""

    key: Annotated[str, Field(min_length=1)]
    operator: Literal["Equal", "Exists"]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class GpuParams(Section):
    """The accelerators that train and evaluate run on."""

    resource: Annotated[
        str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", description="as the device plugin names it")
    ]
    count: Positive
    node_selector: dict[str, str]
    tolerations: list[Toleration]


class ClusterParams(Section):
    """What the pipeline needs of a Kubernetes cluster; no step sees it, and it changes no result."""

    service_account: Annotated[str, Field(min_length=1)]
    addresses: Annotated[str, Field(min_length=1, description="ConfigMap: addresses as environment variables")]
    credentials: Annotated[str, Field(min_length=1, description="Secret: keys and passwords as environment variables")]
    cache_claim: Annotated[str, Field(min_length=1, description="PersistentVolumeClaim of the data sets' cache")]
    run_as_user: Annotated[int, Field(ge=1, description="not root")]
    shared_memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]i?$", description="/dev/shm of train and evaluate")]
    steps: Resources
    train: Resources
    training_nodes: Annotated[int, Field(ge=1, description="more than one: a TrainJob")]
    validation_shards: Annotated[int, Field(ge=1, le=1000, description="tasks that read and compare the images")]
    evaluate: Resources
    gpu: GpuParams | None


class PromoteParams(Section):
    """By what a version may become the champion, and how the promoter looks for it; no step sees it."""

    max_age_days: Annotated[int, Field(ge=1, description="a version registered earlier needs an override")]
    poll_seconds: Annotated[int, Field(ge=1, le=86_400, description="how long a promotion waits without a webhook")]


class Params(BaseModel):
    """What the steps go by: all that changes a result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation: ValidateParams = Field(alias="validate")
    privacy: PrivacyParams
    split: SplitParams
    train: TrainParams
    evaluate: EvaluateParams
    gate: GateParams
    registration: RegisterParams = Field(alias="register")

    def as_json(self) -> str:
        """These sections alone, the same text for the same values; `parse_params` reads it back."""
        fields = set(Params.model_fields)
        content = self.model_dump(mode="json", by_alias=True, include=fields)
        return json.dumps(content, sort_keys=True, allow_nan=False)


class Profile(Params):
    """A whole parameters file."""

    promote: PromoteParams
    cluster: ClusterParams

    @model_validator(mode="after")
    def _has_nodes_that_train_together(self) -> "Profile":
        if self.cluster.training_nodes > 1 and self.train.distribution != "multi_worker":
            raise ValueError("cluster.training_nodes above 1 need train.distribution 'multi_worker'")
        return self


def _sections_of(kind: type[Params]) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in kind.model_fields.items())


SECTIONS = _sections_of(Profile)


def load_params(path: Path) -> Profile:
    """The parameters in `path`, all sections checked."""
    if not path.is_file():
        raise UserError(f"{path} is missing; give --params FILE, or run 'braintumor params use NAME'")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no sections; it needs {', '.join(SECTIONS)}")
    return _checked(Profile, content, str(path))


def parse_params(text: str) -> Params:
    """The parameters that `as_json` wrote."""
    name = "the pipeline's parameter 'params'"
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not valid JSON: {error}; leave it as it was compiled, or mend it") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no sections; it needs {', '.join(_sections_of(Params))}")
    return _checked(Params, content, name)


def load_profile(name: str, folder: Path = PROFILES) -> Profile:
    """The profile `name`, as 'braintumor params list' shows it."""
    return load_params(_profile_file(name, folder))


def _checked(kind: type[Checked], content: Mapping[str, object], place: str) -> Checked:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(_explain(place, item) for item in error.errors())) from error


def _explain(path: str, item: "ErrorDetails") -> str:
    place = ".".join(str(part) for part in item["loc"])
    match item["type"]:
        case "missing":
            return f"{path}: {place} is missing; add it (a complete file: params/reference.yaml)"
        case "extra_forbidden":
            return f"{path}: {place} is unknown; remove it or mend its spelling"
        case _:
            given = "" if isinstance(item["input"], dict) else f" is {item['input']!r}"
            return f"{path}: {place}{given}: {item['msg']}"


def list_profiles(folder: Path = PROFILES) -> dict[str, str]:
    """Name and first comment line of every profile."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for path in sorted(folder.glob("*.yaml"))
    }


def use_profile(name: str, folder: Path = PROFILES, target: Path = Path("params.yaml")) -> Path:
    """`target` is a copy of the profile `name`; the file that stood there is in git."""
    path = _profile_file(name, folder)
    load_params(path)
    write_text(target, path.read_text(encoding="utf-8"))
    return path


def _profile_file(name: str, folder: Path) -> Path:
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no profile {name}; choose one of {', '.join(list_profiles(folder)) or 'none found'}")
    return path
