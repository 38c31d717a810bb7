"""Who trains, who validates, who calibrates, who tests: whole units of copies and patients, by a stable rule.

A unit is a connected component over duplicate groups and patients: what must never stand on two sides. A salted hash
of the unit's name decides its side, so new images move no unit that they do not touch, and classes are stratified in
expectation; how far the shares really are from it is measured and warned of.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES, HASHED_PATIENT, SPLIT_NAMES, UNKNOWN_PATIENT_PREFIX
from braintumor.params import SplitParams

CLAIM_LEAKS = "leaks kept"
CLAIM_PATIENTS = "patient-disjoint"
CLAIM_COPIES = "copy-free, patients unknown"
# Protocols that keep copies of test images in training: for comparison, never for the gate.
LEAKY_PROTOCOLS = ("declared", "control")


@dataclass(frozen=True)
class Splits:
    """The sides of a split."""

    rows: pd.DataFrame  # path, label, group, split; sorted by path
    dropped: pd.DataFrame  # path, label, group, reason; sorted by path
    claim: str
    leaked_test_images: int  # whose unit also stands in train, val or calibration
    max_share_deviation: float
    warnings: list[str]

    @property
    def leaked_share(self) -> float:
        """Of the test images."""
        return self.leaked_test_images / int((self.rows["split"] == "test").sum())


def make_splits(images: pd.DataFrame, params: SplitParams) -> Splits:
    """The manifest's images on their sides, by the protocol in `params`.

    Takes the columns path, label, declared_split, duplicate_group and patient. Raises UserError where a class is
    missing from a side.
    """
    if params.val_fraction + params.calibration_fraction >= 1:
        raise UserError(
            "split.val_fraction and split.calibration_fraction add up to 1 or more, "
            "so that nothing is left to train on; lower them"
        )
    units = images.sort_values("path", ignore_index=True).assign(group=lambda frame: find_units(frame))
    is_test = _is_test(units, params)
    units["split"] = np.where(is_test, "test", _development_sides(units["group"], params))
    is_dropped, units["reason"] = _left_out(units, is_test, params)
    rows = units.loc[~is_dropped, ["path", "label", "group", "split"]].reset_index(drop=True)
    dropped = units.loc[is_dropped, ["path", "label", "group", "reason"]].reset_index(drop=True)
    _refuse_missing_classes(rows, params)
    deviation, warnings = _share_deviation(rows, params)
    warnings += _size_warnings(rows, params)
    return Splits(
        rows=rows,
        dropped=dropped,
        claim=_claim(units[~is_dropped], params),
        leaked_test_images=_leaked_test_images(rows),
        max_share_deviation=deviation,
        warnings=warnings,
    )


def find_units(images: pd.DataFrame) -> pd.Series:
    """The unit of each image: the smallest duplicate group among all that copies and patients link to it."""
    groups, names = pd.factorize(images["duplicate_group"], sort=True)
    patients, _ = pd.factorize(images["patient"])
    is_known = patients >= 0
    count = len(names) + int(patients.max(initial=-1)) + 1
    links = (np.ones(int(is_known.sum())), (groups[is_known], patients[is_known] + len(names)))
    _, component = connected_components(coo_matrix(links, shape=(count, count)), directed=False)
    # `names` is sorted: the first group of a component is its smallest.
    smallest = pd.Series(np.arange(len(names))).groupby(component[: len(names)]).transform("min").to_numpy()
    return pd.Series(np.asarray(names)[smallest[groups]], index=images.index, dtype=object)


def position(group: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but these three: the place of a group on the line that is cut."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _is_test(units: pd.DataFrame, params: SplitParams) -> "pd.Series[bool]":
    if params.protocol == "grouped":
        return units["group"].map(lambda group: position(group, params.seed, "test")) < params.test_fraction
    return units["declared_split"] == "test"


def _left_out(
    units: pd.DataFrame, is_test: "pd.Series[bool]", params: SplitParams
) -> tuple["pd.Series[bool]", pd.Series]:
    """Which images the protocol takes out, and the reason, which says something of these alone."""
    leaks = units["group"].isin(units.loc[is_test, "group"]) & ~is_test
    match params.protocol:
        case "official":
            is_copy = units["duplicate_group"].isin(units.loc[is_test, "duplicate_group"])
            reasons = np.where(is_copy, "copy of a test image", "patient of a test image")
            return leaks, pd.Series(reasons, index=units.index)
        case "control":
            is_drawn = _drawn_to_the_size_of(units[~leaks & ~is_test], units[~is_test], params)
            return ~is_test & ~units.index.isin(is_drawn), pd.Series("not drawn for the control", index=units.index)
        case _:
            return pd.Series(False, index=units.index), pd.Series("", index=units.index)


def _drawn_to_the_size_of(pattern: pd.DataFrame, images: pd.DataFrame, params: SplitParams) -> pd.Index:
    """As many of `images` on each side and in each class as `pattern` has, whether they are copies or not."""
    quotas = pattern.groupby(["split", "label"]).size()
    places = images["path"].map(lambda path: position(path, params.seed, "control"))
    ranks = places.groupby([images["split"], images["label"]]).rank(method="first")
    quota = pd.MultiIndex.from_frame(images[["split", "label"]]).map(quotas.to_dict().get)
    return images.index[ranks.to_numpy() <= pd.Series(quota).fillna(0).to_numpy()]


def side_of(group: str, params: SplitParams) -> str:
    """The side that the hash gives to a group, as far as no declared test folder decides."""
    if params.protocol == "grouped" and position(group, params.seed, "test") < params.test_fraction:
        return "test"
    return str(_development_sides(pd.Series([group]), params).iloc[0])


def _development_sides(groups: pd.Series, params: SplitParams) -> pd.Series:
    """Train, val or calibration for each group, wherever the test images lie."""
    places = groups.map(lambda group: position(group, params.seed, "development"))
    is_val = places < params.val_fraction
    is_calibration = ~is_val & (places < params.val_fraction + params.calibration_fraction)
    return pd.Series(np.select([is_val, is_calibration], ["val", "calibration"], "train"), index=groups.index)


def _refuse_missing_classes(rows: pd.DataFrame, params: SplitParams) -> None:
    counts = sizes_by_class(rows)
    missing = {split: [label for label in CLASS_NAMES if not counts[split][label]] for split in SPLIT_NAMES}
    if not any(missing.values()):
        return
    told = ", ".join(f"{split} holds no {label}" for split, labels in missing.items() for label in labels)
    if rows["group"].nunique() == 1:
        remedy = "all images are in one group of copies or patients, which no split divides: add images of others"
    elif missing["test"] and params.protocol != "grouped":
        remedy = "add images of it under test/, whole patients, or set split.protocol: grouped"
    else:
        remedy = "add images, enlarge the fractions of section split, or take another split.seed"
    raise UserError(f"the split by protocol '{params.protocol}' leaves classes without images: {told}; {remedy}")


def sizes_by_class(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    """How many images of each class each side holds."""
    counts = Counter(zip(rows["split"], rows["label"], strict=True))
    return {split: {label: counts[split, label] for label in CLASS_NAMES} for split in SPLIT_NAMES}


def _share_deviation(rows: pd.DataFrame, params: SplitParams) -> tuple[float, list[str]]:
    """The largest distance between a class's share of a side and of what that side was drawn from."""
    counts = sizes_by_class(rows)
    # A declared test folder was not drawn: it has no share to keep.
    drawn = [split for split in SPLIT_NAMES if split != "test" or params.protocol == "grouped"]
    expected = _shares({label: sum(counts[split][label] for split in drawn) for label in CLASS_NAMES})
    deviations = {
        (split, label): (share, abs(share - expected[label]))
        for split in drawn
        for label, share in _shares(counts[split]).items()
    }
    warnings = [
        f"{label} makes up {share:.0%} of {split}, expected {expected[label]:.0%}"
        for (split, label), (share, deviation) in deviations.items()
        if deviation > params.max_share_deviation
    ]
    return max(deviation for _, deviation in deviations.values()), warnings


def _size_warnings(rows: pd.DataFrame, params: SplitParams) -> list[str]:
    """A side that is larger or smaller than its fraction: large groups go to one side as a whole."""
    sizes = rows["split"].value_counts()
    n_development = len(rows) - int(sizes["test"])
    expected = {"val": params.val_fraction, "calibration": params.calibration_fraction}
    shares = {split: sizes[split] / n_development for split in expected}
    if params.protocol == "grouped":
        expected["test"], shares["test"] = params.test_fraction, sizes["test"] / len(rows)
    return [
        f"{split} holds {share:.0%} of the images it is drawn from, expected {expected[split]:.0%}"
        for split, share in shares.items()
        if abs(share - expected[split]) > params.max_share_deviation
    ]


def _shares(counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {label: count / total for label, count in counts.items()}


def _claim(used: pd.DataFrame, params: SplitParams) -> str:
    if params.protocol in LEAKY_PROTOCOLS:
        return CLAIM_LEAKS
    namings = {_naming(patient) for patient in used["patient"].unique()}
    # One person may stand under a number and a hash, or under the hashes of two keys.
    return CLAIM_PATIENTS if None not in namings and len(namings) == 1 else CLAIM_COPIES


def _naming(patient: object) -> str | None:
    """Who gave the patient this name: the key that hashed it, or people; None for nobody's."""
    if not isinstance(patient, str) or patient.startswith(UNKNOWN_PATIENT_PREFIX):
        return None
    hashed = HASHED_PATIENT.fullmatch(patient)
    return f"key {hashed['key']}" if hashed else "people"


def _leaked_test_images(rows: pd.DataFrame) -> int:
    is_test = rows["split"] == "test"
    return int((is_test & rows["group"].isin(rows.loc[~is_test, "group"])).sum())
