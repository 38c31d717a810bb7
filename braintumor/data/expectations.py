"""What a data set must be before it may be trained on, as a Great Expectations suite with severities and Data Docs."""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import pyarrow as pa

from braintumor.data.difference import Difference
from braintumor.data.manifest import SCHEMA, Survey
from braintumor.data.oddities import USUAL_MODES
from braintumor.data.privacy import shown_names
from braintumor.data.profile import Accepted
from braintumor.errors import UserError, name_some
from braintumor.labels import CLASS_NAMES, DECLARED_SPLITS
from braintumor.params import Params, PrivacyParams, ValidateParams

if TYPE_CHECKING:
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.expectations.expectation import Expectation

Severity = Literal["critical", "warning"]

DATA_DOCS_SITE = "data_docs"


@dataclass(frozen=True)
class Finding:
    """An expectation that the data set does not meet."""

    name: str
    severity: Severity
    message: str
    culprits: tuple[str, ...] = ()
    shown_culprits: tuple[str, ...] = ()  # the same, as they may be named in Data Docs

    def as_dict(self) -> dict[str, Any]:
        """For findings.json, which stays with the data."""
        return {
            "name": self.name, "severity": self.severity, "message": self.message, "culprits": list(self.culprits)
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" + (f": {name_some(self.culprits)}" if self.culprits else "")


@dataclass(frozen=True)
class Culprits:
    """What a finding names: as it is called, and as it may be called in Data Docs."""

    real: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


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
    is_fact: bool = False  # on the whole data set: names its culprits; those of an image rule are the rows that fail
    culprits: Culprits = Culprits()


@dataclass(frozen=True)
class Suite:
    """Rules, and the table that they are about."""

    rules: list[Rule]
    frame: pd.DataFrame


def check_expectations(
    survey: Survey,
    leakage: dict[str, Any],
    accepted: Accepted | None,
    difference: Difference | None,
    params: Params,
    data_docs: Path,
) -> list[Finding]:
    """The findings on a surveyed data set, critical ones first; their Data Docs lie in `data_docs` afterwards.

    `difference` is that to the accepted data version; without one, the rules about it are left out. An expectation
    that can't be computed is a critical finding: nothing passes for want of an answer.
    """
    names = _Names(survey.images, params.privacy)
    suites = {"dataset": _dataset_suite(survey, leakage, accepted, difference, params.validation, names)}
    if difference is not None and accepted is not None:
        suites["difference"] = _difference_suite(difference, accepted, params.validation, names)
    # Checks of values pass on an empty table; the rules of the data set say what is wrong.
    if not survey.images.empty:
        suites["images"] = _images_suite(survey, params.validation, names)
    findings = [
        _finding(suites[name].rules[int(result.expectation_config.meta["rule"])], result, names)
        for name, results in _run_checkpoints(suites, data_docs).items()
        for result in results
        if not result.success
    ]
    return sorted(findings, key=lambda finding: finding.severity != "critical")


class _Names:
    """How the images of a manifest are called, inside the data set and outside."""

    def __init__(self, images: pd.DataFrame, privacy: PrivacyParams) -> None:
        self.privacy = privacy
        self.real = images["path"].tolist()
        self.shown = shown_names(images, privacy).tolist()
        self._shown_of = dict(zip(self.real, self.shown, strict=True))
        unreadable = images[~images["is_readable"].astype(bool)]
        self._reasons = dict(zip(unreadable["path"], unreadable["error"], strict=True))

    def images(self, paths: Iterable[str], remarks: Iterable[str] | None = None) -> Culprits:
        """Images of the manifest, each with a remark."""
        paths = list(paths)
        remarks = [""] * len(paths) if remarks is None else [f" ({remark})" for remark in remarks]
        return Culprits(
            tuple(f"{path}{remark}" for path, remark in zip(paths, remarks, strict=True)),
            tuple(f"{self._shown_of[path]}{remark}" for path, remark in zip(paths, remarks, strict=True)),
        )

    def rows(self, rows: Iterable[int]) -> Culprits:
        """The images in these rows of the manifest; of one that can't be decoded, what is wrong with it."""
        pairs = sorted({(self.real[row], self.shown[row]) for row in rows})
        return Culprits(
            tuple(self._reason(path, path) for path, _ in pairs),
            tuple(self._reason(path, shown) for path, shown in pairs),
        )

    def removed(self, images: pd.DataFrame) -> Culprits:
        """Images of an earlier version: only their shown names are known, and privacy may be stricter by now."""
        return Culprits(tuple(images["path"]), tuple(shown_names(images, self.privacy)))

    def joined_groups(self, groups: Sequence[Mapping[str, Any]]) -> Culprits:
        """Each group, what it was before, and the new images that joined it."""

        def named(joined: Mapping[str, Any], bridges: Iterable[str]) -> str:
            by = (
                f"by {', '.join(bridges)}"
                if joined["bridges"]
                else "by no new image: images were removed, or the rule for copies has changed"
            )
            return f"{joined['group']} (was {', '.join(joined['earlier'])}; joined {by})"

        return Culprits(
            tuple(named(joined, joined["bridges"]) for joined in groups),
            tuple(named(joined, (self._shown_of[path] for path in joined["bridges"])) for joined in groups),
        )

    def files(self, paths: Sequence[str]) -> Culprits:
        """Files that are no images of the manifest: nothing but their names could be shown."""
        is_hidden = self.privacy.hash_names and len(paths) > 0
        return Culprits(tuple(paths), ("their names stand in findings.json",) if is_hidden else tuple(paths))

    def _reason(self, path: str, shown: str) -> str:
        # Without the remedy, which the message states once.
        error = self._reasons.get(path)
        return (path if error is None else error.rpartition("; ")[0]).replace(path, shown)


def _images_suite(survey: Survey, params: ValidateParams, names: _Names) -> Suite:
    side: dict[str, Any] = {"minimum": params.min_side_px, "maximum": params.max_side_px}
    outside = f"{{n}} images are not {params.min_side_px} to {params.max_side_px} px"
    rules = [
        Rule("unreadable", "critical", "{n} images can't be decoded; replace or remove them", "is_readable", [True]),
        Rule("unknown_label", "critical", f"{{n}} images are not of {', '.join(CLASS_NAMES)}", "label", CLASS_NAMES),
        Rule("unknown_split", "critical", "{n} images are not in train/ or test/", "declared_split", DECLARED_SPLITS),
        Rule("width", "critical", f"{outside} wide (validate.min_side_px, max_side_px)", "width", **side),
        Rule("height", "critical", f"{outside} high (validate.min_side_px, max_side_px)", "height", **side),
        Rule(
            "identical_files",
            "warning",
            "{n} images have the very bytes of another one; they count several times",
            "sha256",
            is_unique=True,
        ),
        *_odd_rules(params),
    ]
    images = survey.images
    # Great Expectations prints the path of every image that fails, as it stands; `row` leads back to its real name.
    frame = images.assign(
        path=[escape(name) for name in names.shown],
        row=range(len(images)),
        is_square=images["width"] == images["height"],
    )
    return Suite(rules, frame.drop(columns=["patient", "error"], errors="ignore"))


def _odd_rules(params: ValidateParams) -> list[Rule]:
    """A warning for each kind of odd image (oddities.KINDS), by the same numbers and thresholds."""
    darkest, brightest, limits = params.min_intensity_mean, params.max_intensity_mean, params.odd_images
    looks_odd = [
        ("coloured", "show colour", "coloured_share", "max_coloured_share"),
        ("banner", "have a coloured line at an edge, as a banner has", "coloured_line", "max_coloured_line"),
        ("white_frame", "have a white line at an edge, as a frame has", "white_line", "max_white_line"),
        ("arrows", "show marks that look drawn, as arrows do", "mark_length", "max_mark_length"),
        ("edge_filtered", "look sharpened or edge-filtered", "sharpness", "max_sharpness"),
    ]
    return [
        Rule(
            "mode", "warning", f"{{n}} images are of another mode than {' and '.join(USUAL_MODES)}", "mode", USUAL_MODES
        ),
        Rule("not_square", "warning", "{n} images are not square; they get black borders", "is_square", [True]),
        Rule(
            "nearly_empty",
            "warning",
            f"{{n}} images are nearly empty: their standard deviation is below {params.min_intensity_std:g} "
            "(validate.min_intensity_std)",
            "std",
            minimum=params.min_intensity_std,
        ),
        Rule(
            "brightness",
            "warning",
            f"{{n}} images are nearly black or white: their mean is not {darkest:g} to {brightest:g} "
            "(validate.min_intensity_mean, max_intensity_mean)",
            "mean",
            minimum=darkest,
            maximum=brightest,
        ),
        *(
            Rule(
                name,
                "warning",
                f"{{n}} images {what}: {column} above {getattr(limits, limit):g} (validate.odd_images.{limit})",
                column,
                maximum=getattr(limits, limit),
            )
            for name, what, column, limit in looks_odd
        ),
    ]


def _dataset_suite(
    survey: Survey,
    leakage: dict[str, Any],
    accepted: Accepted | None,
    difference: Difference | None,
    params: ValidateParams,
    names: _Names,
) -> Suite:
    contents = survey.contents
    layout = "{train,test}/{" + ",".join(CLASS_NAMES) + "}"
    conflicting = [path for conflict in leakage["label_conflicts"] for path in conflict["paths"]]
    paths = survey.images["path"]
    repeated = sorted(set(paths[paths.duplicated()]))
    wrong_columns = _wrong_columns(survey.images)
    too_few = "{value} images of class %s; at least %d are needed (validate.min_images_per_class)"
    rules = [
        _fact(
            "columns",
            "critical",
            "{value} columns of the manifest are missing or of another type",
            "wrong_columns",
            maximum=0,
            culprits=Culprits(wrong_columns, wrong_columns),
        ),
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
            "repeated_path",
            "critical",
            "{value} paths stand in several rows",
            "repeated_paths",
            maximum=0,
            culprits=names.images(repeated),
        ),
        _fact(
            "unexpected_place",
            "critical",
            f"{{value}} images stand outside {layout}/; move them there, or out of the data set",
            "misplaced_files",
            maximum=0,
            culprits=names.files(contents.misplaced),
        ),
        _fact(
            "class_imbalance",
            "warning",
            "the largest class is {value} times the smallest; "
            f"above {params.max_class_imbalance:g} (validate.max_class_imbalance)",
            "class_imbalance",
            maximum=params.max_class_imbalance,
        ),
        _fact(
            "leaked_share",
            "warning",
            "{value} of the test images have a copy under train/; "
            f"above {params.max_leaked_share:g} (validate.max_leaked_share). "
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
            culprits=names.images(conflicting),
        ),
        _fact(
            "ignored_files",
            "warning",
            "{value} files are no images and are ignored, though they count for the data version; remove them",
            "ignored_files",
            maximum=0,
            culprits=names.files(contents.ignored),
        ),
    ]
    facts = _facts(survey, leakage) | {"wrong_columns": len(wrong_columns), "repeated_paths": len(repeated)}
    if accepted is not None:
        facts["is_compared"] = int(difference is not None)
        message = (
            f"MLflow keeps no profile of {_known(accepted)}: what is gone since and how the images have drifted was "
            "not checked; the next model that is registered brings a profile"
        )
        rules.append(_fact("not_compared", "warning", message, "is_compared", minimum=1))
    return Suite(rules, pd.DataFrame([facts]))


def _difference_suite(difference: Difference, accepted: Accepted, params: ValidateParams, names: _Names) -> Suite:
    since = f"since {_known(accepted)}"
    too_much_gone = {part: share for part, share in difference.gone.items() if share > params.max_shrinkage}
    removed = difference.removed
    classes_gone = removed["label"].isin(too_much_gone)
    changes = {label: now - before for label, (before, now) in difference.label_mix.items()}
    facts: dict[str, float] = {
        "largest_share_gone": max(difference.gone.values()),
        "removed": len(removed),
        "added": len(difference.added),
        "moved": len(difference.moved),
        "relabelled": len(difference.relabelled),
        "joined_groups": len(difference.joined_groups),
        "largest_label_change": max(map(abs, changes.values())),
        **{f"drift_{name}": drift.distance for name, drift in difference.drift.items()},
    }
    rules = [
        _fact(
            "shrinkage",
            "critical",
            f"{_shares_gone(too_much_gone)} are gone {since}, above {params.max_shrinkage:g} "
            "(validate.max_shrinkage); bring them back, or raise it if they had to go",
            "largest_share_gone",
            maximum=params.max_shrinkage,
            culprits=names.removed(removed if "all" in too_much_gone else removed[classes_gone]),
        ),
        _fact(
            "removed", "warning", f"{{value}} images are gone {since}", "removed", maximum=0,
            culprits=names.removed(removed),
        ),
        _fact(
            "added", "warning", f"{{value}} images are new {since}", "added", maximum=0,
            culprits=names.images(difference.added["path"]),
        ),
        _fact(
            "moved", "warning", f"{{value}} images stand in another folder of train/ and test/ {since}", "moved",
            maximum=0, culprits=_changed(difference.moved, names),
        ),
        _fact(
            "relabelled", "warning", f"{{value}} images have another label {since}", "relabelled",
            maximum=0, culprits=_changed(difference.relabelled, names),
        ),
        _fact(
            "joined_groups", "warning",
            f"{{value}} groups of copies were joined or renamed, {since}: sides may change", "joined_groups",
            maximum=0, culprits=names.joined_groups(difference.joined_groups),
        ),
        _fact(
            "label_drift", "warning",
            f"{_label_changes(difference.label_mix, params.max_label_drift)} {since}; a change above "
            f"{params.max_label_drift:g} (validate.max_label_drift)",
            "largest_label_change", maximum=params.max_label_drift,
        ),
        *(
            _fact(
                f"drift_{name}", "warning",
                f"{name} has drifted by {{value}} in class {drift.label} {since} (Kolmogorov-Smirnov distance); above "
                f"{params.max_statistic_drift:g} (validate.max_statistic_drift)",
                f"drift_{name}", maximum=params.max_statistic_drift,
            )
            for name, drift in difference.drift.items()
        ),
    ]  # fmt: skip
    return Suite(rules, pd.DataFrame([facts]))


_fact = functools.partial(Rule, is_fact=True)


def _known(accepted: Accepted) -> str:
    return f"data {accepted.data_md5[:7]} of model version {accepted.version}"


def _shares_gone(gone: Mapping[str, float]) -> str:
    parts = [f"{share:.1%} of {'all images' if part == 'all' else f'class {part}'}" for part, share in gone.items()]
    return " and ".join(parts)


def _label_changes(mix: Mapping[str, tuple[float, float]], threshold: float) -> str:
    return ", ".join(
        f"class {label} makes up {now:.1%} of the images instead of {before:.1%}"
        for label, (before, now) in mix.items()
        if abs(now - before) > threshold
    )


def _changed(images: pd.DataFrame, names: _Names) -> Culprits:
    return names.images(images["path"], (f"{before} before" for before in images["before"]))


def _wrong_columns(images: pd.DataFrame) -> tuple[str, ...]:
    """The manifest's columns that are absent, or hold something else than they should."""

    def is_wrong(field: pa.Field) -> bool:
        if field.name not in images.columns:
            return True
        try:
            column = pa.Array.from_pandas(images[field.name], type=field.type)
        except pa.ArrowException:
            return True
        return bool(column.null_count) and not field.nullable

    return tuple(field.name for field in SCHEMA if is_wrong(field))


def _facts(survey: Survey, leakage: dict[str, Any]) -> dict[str, float | None]:
    """What is to be known of the whole data set; a null fact does not apply."""
    images = survey.images
    counts = {name: int((images["label"] == name).sum()) for name in CLASS_NAMES}
    smallest, largest = min(counts.values()), max(counts.values())
    return {
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


def _run_checkpoints(suites: Mapping[str, Suite], data_docs: Path) -> dict[str, "list[ExpectationValidationResult]"]:
    """A suite, a checkpoint and its Data Docs for each table; the results by the suite's name."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    # The site that an ephemeral context brings lies in a temporary folder.
    context.delete_data_docs_site("local_site")
    context.add_data_docs_site(DATA_DOCS_SITE, _site(data_docs))
    source = context.data_sources.add_pandas("manifest")
    results = {}
    for name, suite in suites.items():
        expectations = [_expectation(rule, index) for index, rule in enumerate(suite.rules)]
        added = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        definition = gx.ValidationDefinition(name=name, data=batch, suite=added)
        checkpoint = gx.Checkpoint(
            name=name,
            validation_definitions=[context.validation_definitions.add(definition)],
            actions=[gx.checkpoint.UpdateDataDocsAction(name=DATA_DOCS_SITE, site_names=[DATA_DOCS_SITE])],
            result_format=_result_format(suite.frame),
        )
        with _whole_pages(data_docs):
            run = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": suite.frame})
        results[name] = [result for suite_result in run.run_results.values() for result in suite_result.results]
    return results


@contextmanager
def _whole_pages(data_docs: Path) -> Iterator[None]:
    """A page that Great Expectations could not write is an error; it only logs that, with a traceback."""
    logger = logging.getLogger("great_expectations.render.renderer.site_builder")
    failures: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            # Its own words, the failure, the traceback.
            failures.append(record.getMessage().partition("follows:")[2].partition("Traceback:")[0].strip())
        return False

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
    if failures:
        raise UserError(f"{data_docs} could not be written ({failures[0]}); see to the space there and try again")


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
        **({"unexpected_index_column_names": ["path", "row"]} if names_images else {}),
    }


def _finding(rule: Rule, result: "ExpectationValidationResult", names: _Names) -> Finding:
    if "unexpected_count" not in result.result:
        problem = (result.exception_info or {}).get("exception_message") or "no result"
        return Finding(rule.name, "critical", f"this expectation could not be checked ({problem})")
    observed = result.result["partial_unexpected_list"][0]
    # No str.format: the layout that messages quote is written with braces.
    message = rule.message.replace("{n}", str(result.result["unexpected_count"]))
    culprits = rule.culprits
    if rule.is_fact:
        message = message.replace("{value}", _number(observed))
    else:
        culprits = names.rows(row["row"] for row in result.result["unexpected_index_list"])
    return Finding(rule.name, rule.severity, message, culprits.real, culprits.shown)


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
