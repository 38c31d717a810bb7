"""What copies of training images among the test images do to an accuracy, and what looking images up would reach."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.evidence.bootstrap import mean_interval
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams


def measure_leakage_of_scores(rows: pd.DataFrame, params: EvaluateParams) -> dict[str, Any]:
    """Accuracy with and without copies beside the floors, with warnings; the rows may come in any order.

    `rows` are the test images: label, predicted, group (str), is_leaked (bool: of a group that this training used),
    is_declared_copy (bool: with a copy in the declared training folder), neighbour_label, statistics_label. Returns
      split, declared: a list of {part: all | with copies | copy-free, n, n_groups, accuracy, accuracy_interval,
        neighbour_accuracy, statistics_accuracy}; what a part without images can't tell is None;
      advantage: {split, declared}, each None or {difference, interval, same_mix}: accuracy with copies less copy-free
        accuracy; same_mix, None or {difference, interval}, is that of the single classes, averaged with Mantel and
        Haenszel's weights: what is left where copies are not merely more frequent in the easier classes;
      per_group: {accuracy, accuracy_interval}, where each group counts once, however many copies it has;
      over_neighbour: {difference, interval} of the accuracies of model and nearest neighbour;
      warnings: sentences; none where the model is above the floor and no better on copies than elsewhere. They call
        the accuracy inflated unless same_mix shows that copies may just stand more often in the easier classes.
    Images with a copy in a folder that was not trained on may be easier or harder than others: of 'declared' there is
    no warning.
    """
    rows = rows.reset_index(drop=True)
    rows = rows.assign(
        group=pd.factorize(rows["group"], sort=True)[0],
        is_right=rows["predicted"] == rows["label"],
        is_neighbour_right=rows["neighbour_label"] == rows["label"],
        is_statistics_right=rows["statistics_label"] == rows["label"],
    )
    is_copy = {"split": rows["is_leaked"].astype(bool), "declared": rows["is_declared_copy"].astype(bool)}
    parts = {name: _parts(rows, having, params) for name, having in is_copy.items()}
    advantage = {name: _advantage(rows, having, params) for name, having in is_copy.items()}
    gain = rows["is_right"].astype(float) - rows["is_neighbour_right"]
    over_neighbour = {
        "difference": float(gain.mean()),
        "interval": mean_interval(gain, rows["group"], params, is_share=False),
    }
    return {
        **parts,
        "advantage": advantage,
        "per_group": _per_group(rows, params),
        "over_neighbour": over_neighbour,
        "warnings": _warnings(parts["split"], advantage["split"], over_neighbour),
    }


def _parts(rows: pd.DataFrame, is_copy: "pd.Series[bool]", params: EvaluateParams) -> list[dict[str, Any]]:
    parts = {"all": rows, "with copies": rows[is_copy], "copy-free": rows[~is_copy]}
    return [{"part": name, **_figures(part, params)} for name, part in parts.items()]


def _figures(part: pd.DataFrame, params: EvaluateParams) -> dict[str, Any]:
    known = len(part) > 0
    return {
        "n": len(part),
        "n_groups": int(part["group"].nunique()),
        "accuracy": float(part["is_right"].mean()) if known else None,
        "accuracy_interval": mean_interval(part["is_right"], part["group"], params) if known else None,
        "neighbour_accuracy": float(part["is_neighbour_right"].mean()) if known else None,
        "statistics_accuracy": float(part["is_statistics_right"].mean()) if known else None,
    }


def _per_group(rows: pd.DataFrame, params: EvaluateParams) -> dict[str, Any]:
    share_right = rows.groupby("group")["is_right"].mean()
    return {
        "accuracy": float(share_right.mean()),
        "accuracy_interval": mean_interval(share_right, share_right.index, params),
    }


def _advantage(rows: pd.DataFrame, is_copy: "pd.Series[bool]", params: EvaluateParams) -> dict[str, Any] | None:
    sides = [rows[is_copy], rows[~is_copy]]
    if any(side.empty for side in sides):
        return None
    classes = [name for name in CLASS_NAMES if all((side["label"] == name).any() for side in sides)]
    with_copies, copy_free = ([side[side["label"] == name] for name in classes] for side in sides)
    return {
        **_mean_difference(sides[:1], sides[1:], params),
        "same_mix": _mean_difference(with_copies, copy_free, params) if classes else None,
    }


def _mean_difference(
    with_copies: list[pd.DataFrame], copy_free: list[pd.DataFrame], params: EvaluateParams
) -> dict[str, Any]:
    """Mean over strata, and its interval out of those of its terms (Zou & Donner 2008), which are of other groups each.

    Their bounds hold for few images, all of them right, too: a resampling of the difference itself would have no
    spread there.
    """
    counts = np.array([[len(stratum) for stratum in side] for side in (with_copies, copy_free)])
    weights = counts.prod(axis=0) / counts.sum(axis=0)
    weights /= weights.sum()
    ours, theirs = (np.array([_bounds(stratum, params) for stratum in side]) for side in (with_copies, copy_free))
    difference = float(weights @ (ours[:, 1] - theirs[:, 1]))
    down = _length(weights, ours[:, 1] - ours[:, 0], theirs[:, 2] - theirs[:, 1])
    up = _length(weights, ours[:, 2] - ours[:, 1], theirs[:, 1] - theirs[:, 0])
    return {"difference": difference, "interval": [difference - down, difference + up]}


def _bounds(rows: pd.DataFrame, params: EvaluateParams) -> tuple[float, float, float]:
    low, high = mean_interval(rows["is_right"], rows["group"], params)
    return low, float(rows["is_right"].mean()), high


def _length(weights: NDArray[np.float64], *reaches: NDArray[np.float64]) -> float:
    return float(np.sqrt(sum(np.square(weights * reach).sum() for reach in reaches)))


def _warnings(
    parts: list[dict[str, Any]], advantage: Mapping[str, Any] | None, over_neighbour: Mapping[str, Any]
) -> list[str]:
    everything, with_copies, copy_free = parts
    warnings = []
    if advantage and advantage["interval"][0] > 0:
        so = (
            "the accuracy on all test images is inflated; go by the copy-free one"
            if is_inflated(advantage)
            else "copies stand more often in the classes that are easier; that they help is not shown"
        )
        warnings.append(
            f"{with_copies['n']} of {everything['n']} test images have copies among the training images, and there the "
            f"accuracy is {with_copies['accuracy']:.1%}, elsewhere {copy_free['accuracy']:.1%}, more than chance "
            f"explains{_within_classes(advantage['same_mix'])}: {so}"
        )
    if over_neighbour["interval"][0] <= 0:
        warnings.append(
            f"the model, at {everything['accuracy']:.1%}, is not clearly above the nearest neighbour, at "
            f"{everything['neighbour_accuracy']:.1%}: it may do no more than look training images up"
        )
    return warnings


def is_inflated(advantage: Mapping[str, Any]) -> bool:
    """Whether images with copies are easier beyond chance, and beyond what their mix of classes explains."""
    same_mix = advantage["same_mix"]
    return bool(advantage["interval"][0] > 0 and (same_mix is None or same_mix["interval"][0] > 0))


def _within_classes(same_mix: Mapping[str, Any] | None) -> str:
    if same_mix is None:
        return ""
    low, high = same_mix["interval"]
    return f" (within classes {100 * same_mix['difference']:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f})"
