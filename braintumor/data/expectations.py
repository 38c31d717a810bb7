"""What a data set must be before it may be trained on, as a Great Expectations suite with severities and Data Docs."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from braintumor.data.manifest import Survey
from braintumor.errors import name_some
from braintumor.labels import CLASS_NAMES, DECLARED_SPLITS
from braintumor.params import ValidateParams

if TYPE_CHECKING:
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.expectations.expectation import Expectation

Severity = Literal["critical", "warning"]

DATA_DOCS_SITE = "data_docs"
GREY_MODES = ("L", "RGB")


@dataclass(frozen=True)
class Finding:
    """An expectation that the data set does not meet."""

    name: str
    severity: Severity
    message: str
    culprits: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For findings.json."""
        return asdict(self) | {"culprits": list(self.culprits)}

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" + (f": {name_some(self.culprits)}" if self.culprits else "")


@dataclass(frozen=True)
class Rule:
    """One expectation on a column: of the images, or of the facts of the whole data set."""

    name: str
    severity: Severity
    message: str  # {n}: how many images fail; {value}: the fact
    column: str
    values: Sequence[Any] | None = None
    minimum: float | None = None
    maximum: float | None = None
    is_unique: bool = False
    is_fact: bool = False  # on the whole data set: names its culprits; those of an image rule are the paths that fail
    culprits: tuple[str, ...] = ()


def check_expectations(
    survey: Survey, leakage: dict[str, Any], params: ValidateParams, data_docs: Path
) -> list[Finding]:
    """The findings on a surveyed data set, critical ones first; their Data Docs lie in `data_docs` afterwards.

    An expectation that can't be computed is a critical finding: nothing passes for want of an answer.
    """
    rules = {"dataset": _dataset_rules(survey, leakage, params), "images": _image_rules(params)}
    images = survey.images.assign(is_square=survey.images["width"] == survey.images["height"])
    frames = {"dataset": _facts(survey, leakage), "images": images}
    if survey.images.empty:
        # Checks of values pass on an empty table; the rules of the data set say what is wrong.
        del rules["images"], frames["images"]
    reasons = _reasons(survey.images)
    findings = [
        _finding(rules[name][int(result.expectation_config.meta["rule"])], result, reasons)
        for name, results in _run_checkpoints(rules, frames, data_docs).items()
        for result in results
        if not result.success
    ]
    return sorted(findings, key=lambda finding: finding.severity != "critical")


def _image_rules(params: ValidateParams) -> list[Rule]:
    darkest, brightest = params.min_intensity_mean, params.max_intensity_mean
    side: dict[str, Any] = {"minimum": params.min_side_px, "maximum": params.max_side_px}
    outside = f"{{n}} images are not {params.min_side_px} to {params.max_side_px} px"
    return [
        Rule("unreadable", "critical", "{n} images can't be decoded; replace or remove them", "is_readable", [True]),
        Rule("unknown_label", "critical", f"{{n}} images are not of {', '.join(CLASS_NAMES)}", "label", CLASS_NAMES),
        Rule("unknown_split", "critical", "{n} images are not in train/ or test/", "declared_split", DECLARED_SPLITS),
        Rule("repeated_path", "critical", "{n} rows repeat a path", "path", is_unique=True),
        Rule("width", "critical", f"{outside} wide (validate.min_side_px, max_side_px)", "width", **side),
        Rule("height", "critical", f"{outside} high (validate.min_side_px, max_side_px)", "height", **side),
        Rule("mode", "warning", "{n} images are of an unusual mode", "mode", GREY_MODES),
        Rule("not_square", "warning", "{n} images are not square; they get black borders", "is_square", [True]),
        Rule(
            "nearly_empty",
            "warning",
            f"{{n}} images are nearly empty: their standard deviation is below {params.min_intensity_std:g}",
            "std",
            minimum=params.min_intensity_std,
        ),
        Rule("brightness", "warning", "{n} images are nearly black or white", "mean", None, darkest, brightest),
    ]


def _dataset_rules(survey: Survey, leakage: dict[str, Any], params: ValidateParams) -> list[Rule]:
    contents = survey.contents
    layout = "{train,test}/{" + ",".join(CLASS_NAMES) + "}"
    conflicting = tuple(path for conflict in leakage["label_conflicts"] for path in conflict["paths"])
    too_few = "{value} images of class %s; at least %d are needed (validate.min_images_per_class)"
    return [
        _fact("no_images", "critical", f"no images in {layout}/; add some", "images", minimum=1),
        *(
            _fact(
                f"too_few_{name}",
                "critical",
                too_few % (name, params.min_images_per_class),
                f"images_{name}",
                minimum=params.min_images_per_class,
            )
            for name in CLASS_NAMES
        ),
        _fact(
            "no_test_images",
            "critical",
            "no images under test/; put a part of the images, whole patients, there, or let the split choose them: "
            "validate.require_test_images: false and split.protocol: grouped",
            "images_test",
            minimum=int(params.require_test_images),
        ),
        _fact(
            "unexpected_place",
            "critical",
            f"{{value}} images stand outside {layout}/; move them there, or out of the data set",
            "misplaced_files",
            maximum=0,
            culprits=tuple(contents.misplaced),
        ),
        _fact(
            "class_imbalance",
            "warning",
            f"the largest class is {{value}} times the smallest; above {params.max_class_imbalance:g}",
            "class_imbalance",
            maximum=params.max_class_imbalance,
        ),
        _fact(
            "leaked_share",
            "warning",
            f"{{value}} of the test images have a copy under train/; above {params.max_leaked_share:g}. "
            "The protocol 'official' drops such copies from training",
            "leaked_share",
            maximum=params.max_leaked_share,
        ),
        _fact(
            "label_conflicts",
            "warning",
            "{value} groups of copies carry several labels; correct the labels",
            "label_conflicts",
            maximum=0,
            culprits=conflicting,
        ),
        _fact(
            "ignored_files",
            "warning",
            "{value} files are no images and are ignored, though they count for the data version; remove them",
            "ignored_files",
            maximum=0,
            culprits=tuple(contents.ignored),
        ),
    ]


_fact = functools.partial(Rule, is_fact=True)


def _facts(survey: Survey, leakage: dict[str, Any]) -> pd.DataFrame:
    """One row about the whole data set; a null fact does not apply."""
    images = survey.images
    counts = {name: int((images["label"] == name).sum()) for name in CLASS_NAMES}
    smallest, largest = min(counts.values()), max(counts.values())
    facts = {
        "images": len(images),
        **{f"images_{name}": count for name, count in counts.items()},
        "images_test": int((images["declared_split"] == "test").sum()),
        "misplaced_files": len(survey.contents.misplaced),
        "ignored_files": len(survey.contents.ignored),
        # A class without images is a critical finding of its own.
        "class_imbalance": round(largest / smallest, 2) if smallest else None,
        "leaked_share": leakage["leaked_share"],
        "label_conflicts": len(leakage["label_conflicts"]),
    }
    return pd.DataFrame([facts])


def _expectation(rule: Rule, index: int) -> "Expectation":
    import great_expectations.expectations as gxe

    common: dict[str, Any] = {
        "column": rule.column,
        "severity": rule.severity,
        "meta": {"rule": index, "name": rule.name},
        "notes": rule.name,
    }
    if rule.is_unique:
        return gxe.ExpectColumnValuesToBeUnique(**common)
    if rule.values is not None:
        return gxe.ExpectColumnValuesToBeInSet(value_set=list(rule.values), **common)
    return gxe.ExpectColumnValuesToBeBetween(min_value=rule.minimum, max_value=rule.maximum, **common)


def _run_checkpoints(
    rules: dict[str, list[Rule]], frames: dict[str, pd.DataFrame], data_docs: Path
) -> dict[str, "list[ExpectationValidationResult]"]:
    """A suite, a checkpoint and its Data Docs for each frame; the results by the frame's name."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    # The site that an ephemeral context brings lies in a temporary folder.
    context.delete_data_docs_site("local_site")
    context.add_data_docs_site(DATA_DOCS_SITE, _site(data_docs))
    source = context.data_sources.add_pandas("manifest")
    results = {}
    for name, frame in frames.items():
        expectations = [_expectation(rule, index) for index, rule in enumerate(rules[name])]
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        definition = gx.ValidationDefinition(name=name, data=batch, suite=suite)
        checkpoint = gx.Checkpoint(
            name=name,
            validation_definitions=[context.validation_definitions.add(definition)],
            actions=[gx.checkpoint.UpdateDataDocsAction(name=DATA_DOCS_SITE, site_names=[DATA_DOCS_SITE])],
            result_format=_result_format(frame),
        )
        run = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
        results[name] = [result for suite_result in run.run_results.values() for result in suite_result.results]
    return results


def _site(data_docs: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(data_docs)},
    }


def _result_format(frame: pd.DataFrame) -> dict[str, Any]:
    names_images = "path" in frame.columns
    return {
        "result_format": "COMPLETE",
        "include_unexpected_rows": False,
        **({"unexpected_index_column_names": ["path"]} if names_images else {}),
    }


def _finding(rule: Rule, result: "ExpectationValidationResult", reasons: Mapping[str, str]) -> Finding:
    if "unexpected_count" not in result.result:
        problem = (result.exception_info or {}).get("exception_message") or "no result"
        return Finding(rule.name, "critical", f"this expectation could not be checked ({problem})")
    observed = result.result["partial_unexpected_list"][0]
    # No str.format: the layout that messages quote is written with braces.
    message = rule.message.replace("{n}", str(result.result["unexpected_count"]))
    if rule.is_fact:
        return Finding(rule.name, rule.severity, message.replace("{value}", _number(observed)), rule.culprits)
    paths = sorted({row["path"] for row in result.result["unexpected_index_list"]})
    return Finding(rule.name, rule.severity, message, tuple(reasons.get(path, path) for path in paths))


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def _reasons(images: pd.DataFrame) -> dict[str, str]:
    """What is wrong with each image that can't be decoded, without the remedy."""
    unreadable = images[~images["is_readable"]]
    return {path: error.partition(";")[0] for path, error in zip(unreadable["path"], unreadable["error"], strict=True)}
