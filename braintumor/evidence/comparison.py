"""Champion and challenger on the same images: what differs beyond chance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from braintumor.evidence.bootstrap import group_sums, percentile_interval, resampled_sums
from braintumor.evidence.metrics import figures_of_confusion
from braintumor.evidence.verdicts import BETTER, NO_CHAMPION, NO_DIFFERENCE, NOT_COMPARABLE, WORSE
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams

# Below these a percentile bootstrap over groups finds differences that are none.
MIN_IMAGES, MIN_GROUPS = 100, 30


def compare_with_champion(
    truth: ArrayLike,
    challenger: ArrayLike,
    champion: ArrayLike,
    groups: ArrayLike,
    is_excluded: ArrayLike,
    params: EvaluateParams,
    champion_version: str,
) -> dict[str, Any]:
    """How the challenger does against the champion, image by image, over resamples of whole groups.

    `truth` (n,) are classes as indices into CLASS_NAMES, `challenger` and `champion` (n, 4) probabilities for the same
    images, `groups` (n,) any integers. `is_excluded` (n,) marks the images that either knows from its training.
    Returns, whatever the verdict,
      verdict: better | worse | no difference found | not comparable | no champion. Better and worse need both an
        interval of the accuracies' difference that leaves 0 out and, since that is too narrow where few images make
        the difference, an exact sign test over the groups on which one model has more right than the other;
      reason: a sentence; champion: its version, or None;
      n, n_groups: of the images compared; n_excluded;
      figures: {accuracy | balanced_accuracy | macro_f1 | tumour_sensitivity | tumour_specificity:
        {challenger, champion, difference, interval (of the difference)}}, empty where nothing was compared;
      only_challenger_right, only_champion_right: images (McNemar's counts), or None.
    Fewer than 100 images or 30 groups, or a class without images, are not comparable.
    """
    kept = ~np.asarray(is_excluded, bool)
    n_excluded = int((~kept).sum())
    true, codes = np.asarray(truth, np.int64)[kept], np.asarray(groups, np.int64)[kept]
    n_groups = len(np.unique(codes))
    if reason := _obstacle(true, n_groups, n_excluded):
        return not_comparable(reason, champion_version, len(true), n_groups, n_excluded)
    answers = [np.asarray(probabilities, float)[kept].argmax(axis=1) for probabilities in (challenger, champion)]
    tables = [_confusion_by_group(true, answer, codes) for answer in answers]
    figures = _compare(tables[0], tables[1], params)
    is_right, was_right = (answer == true for answer in answers)
    signs = np.sign(group_sums((is_right.astype(float) - was_right)[:, np.newaxis], codes)[:, 0])
    verdict, reason = _judge(figures["accuracy"], int((signs > 0).sum()), int((signs < 0).sum()), params)
    return {
        "verdict": verdict,
        "reason": reason,
        "champion": champion_version,
        "n": len(true),
        "n_groups": n_groups,
        "n_excluded": n_excluded,
        "figures": figures,
        "only_challenger_right": int((is_right & ~was_right).sum()),
        "only_champion_right": int((was_right & ~is_right).sum()),
    }


def not_comparable(
    reason: str, champion_version: str | None, n: int = 0, n_groups: int = 0, n_excluded: int = 0
) -> dict[str, Any]:
    """The comparison that could not be made, with the keys of one that was."""
    return _without_figures(NOT_COMPARABLE, reason, champion_version, n, n_groups, n_excluded)


def no_champion() -> dict[str, Any]:
    """The comparison where there is nobody to compare with, with the keys of one that was made."""
    return _without_figures(NO_CHAMPION, "no version has the alias champion yet", None, 0, 0, 0)


def _without_figures(
    verdict: str, reason: str, champion: str | None, n: int, n_groups: int, n_excluded: int
) -> dict[str, Any]:
    return {
        "verdict": verdict,
        "reason": reason,
        "champion": champion,
        "n": n,
        "n_groups": n_groups,
        "n_excluded": n_excluded,
        "figures": {},
        "only_challenger_right": None,
        "only_champion_right": None,
    }


def _obstacle(truth: NDArray[np.int64], n_groups: int, n_excluded: int) -> str | None:
    left = f"of the test images {len(truth)} in {n_groups} groups are left"
    if n_excluded:
        left += f", without the {n_excluded} that the champion or this model was trained on"
    if len(truth) < MIN_IMAGES or n_groups < MIN_GROUPS:
        return f"{left}; {MIN_IMAGES} images in {MIN_GROUPS} groups are needed"
    absent = [name for index, name in enumerate(CLASS_NAMES) if not (truth == index).any()]
    return f"{left}, none of them {' or '.join(absent)}" if absent else None


def _confusion_by_group(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Counts (n_groups, true, predicted)."""
    size = len(CLASS_NAMES)
    cells = np.zeros((len(truth), size * size))
    cells[np.arange(len(truth)), truth * size + predicted] = 1
    return group_sums(cells, groups).reshape(-1, size, size)


def _compare(
    challenger: NDArray[np.float64], champion: NDArray[np.float64], params: EvaluateParams
) -> dict[str, dict[str, Any]]:
    tables = {"challenger": challenger, "champion": champion}
    point = {who: figures_of_confusion(table.sum(axis=0)) for who, table in tables.items()}
    resampled = {
        who: figures_of_confusion(resampled_sums(table.reshape(len(table), -1), params).reshape(-1, *table.shape[1:]))
        for who, table in tables.items()
    }
    figures = {}
    for name in point["challenger"]:
        ours, theirs = (float(point[who][name]) for who in tables)
        differences = resampled["challenger"][name] - resampled["champion"][name]
        figures[name] = {
            "challenger": ours,
            "champion": theirs,
            "difference": ours - theirs,
            "interval": percentile_interval(differences, params),
        }
    return figures


def _judge(accuracy: Mapping[str, Any], n_ahead: int, n_behind: int, params: EvaluateParams) -> tuple[str, str]:
    """Verdict and reason, from the groups on which the challenger has more right than the champion, and fewer."""
    from scipy.stats import binomtest

    low, high = accuracy["interval"]
    by_interval = BETTER if low > 0 else WORSE if high < 0 else NO_DIFFERENCE
    told = {BETTER: "above 0", WORSE: "below 0", NO_DIFFERENCE: "on both sides of 0, or at it"}[by_interval]
    reason = (
        f"accuracy {accuracy['challenger']:.1%} against the champion's {accuracy['champion']:.1%}: the "
        f"{params.confidence_level:.0%} interval of the difference, {100 * low:+.1f} to {100 * high:+.1f} points, "
        f"lies {told}"
    )
    if by_interval == NO_DIFFERENCE:
        return by_interval, reason
    p_value = float(binomtest(n_ahead, n_ahead + n_behind).pvalue)
    is_same_side = (n_ahead > n_behind) == (by_interval == BETTER)
    if is_same_side and p_value <= 1 - params.confidence_level:
        return by_interval, reason
    few = f"it rests on few images: this model has more right in {n_ahead} groups, the champion in {n_behind}"
    if is_same_side:
        few += f", and so uneven are equally good models with a probability of {p_value:.2g} (sign test)"
    return NO_DIFFERENCE, f"{reason}, but {few}"
