"""What is new, gone, moved, relabelled and shifted since another data version.

An image is the same image where its file has the same bytes, or decodes to the same grey pixels: a file that was
written again without loss, or stripped of its metadata, is counted as rewritten, not as one removed and one added. A
file that was compressed again with loss is another image. Equal files are told apart by their places, one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.data.privacy import NAME_DIGITS
from braintumor.data.profile import STATISTICS, Accepted
from braintumor.labels import CLASS_NAMES

NAMED_PER_LIST = 200
# Pairs of equal images are sought in this order: at their own place first, then ever further away.
PLACES = (("label", "declared_split", "name"), ("label", "declared_split"), ("label",), ("declared_split",), ())
CONTENTS = ("sha256", "pixels")
# A distance that samples of one distribution exceed once in a thousand times says nothing.
CHANCE = 0.001


@dataclass(frozen=True)
class Drift:
    """How far a statistic's distribution has moved, class by class."""

    distances: dict[str, float]  # Kolmogorov-Smirnov, of each class that both versions hold
    chance: dict[str, float]  # what samples of these sizes reach by chance

    @property
    def label(self) -> str | None:
        """The class that has moved furthest, of those that moved further than by chance."""
        moved = {name: distance for name, distance in self.distances.items() if distance > self.chance[name]}
        return max(moved, key=lambda name: (moved[name], name), default=None)

    @property
    def distance(self) -> float:
        """The distance of that class; 0 where chance explains all."""
        return self.distances[self.label] if self.label else 0.0


@dataclass(frozen=True)
class Difference:
    """The present images against those of an earlier version; frames are sorted by path."""

    n_before: int
    n_now: int
    added: pd.DataFrame  # path
    removed: pd.DataFrame  # path, as the earlier version's profile shows it, label and sha256
    moved: pd.DataFrame  # path, before, now: the declared split
    relabelled: pd.DataFrame  # path, before, now: the label
    renamed: int | None  # None where all names of the earlier version were hashed
    rewritten: int  # other bytes, same pixels
    regrouped: int  # images, in both versions, whose duplicate group has another name now
    joined_groups: list[dict[str, Any]]  # also renamed ones: group, earlier names, bridges: paths of its new images
    gone: dict[str, float]  # share of the earlier images, and of each class of them, that were removed
    label_mix: dict[str, tuple[float, float]]  # share of each class before and now
    drift: dict[str, Drift]  # of each statistic


def compare(images: pd.DataFrame, accepted: pd.DataFrame) -> Difference:
    """The images of a manifest against the profile of an earlier version."""
    now, before = _prepare(images), _prepare(accepted)
    pairs = _pair(now, before)
    added, removed = now.drop(pairs["now"]), before.drop(pairs["before"])
    kept, kept_before = now.loc[pairs["now"]], before.loc[pairs["before"]]
    return Difference(
        n_before=len(before),
        n_now=len(now),
        added=added[["path"]].reset_index(drop=True),
        removed=removed[["path", "label", "sha256"]].reset_index(drop=True),
        moved=_changes(kept, kept_before, "declared_split"),
        relabelled=_changes(kept, kept_before, "label"),
        renamed=_renamed(kept, kept_before),
        rewritten=_unequal(kept, kept_before, "sha256"),
        regrouped=_unequal(kept, kept_before, "duplicate_group"),
        joined_groups=_joined_groups(kept, kept_before, added),
        gone=_gone(before, removed),
        label_mix={label: (_share(before, label), _share(now, label)) for label in CLASS_NAMES},
        drift={name: _drift(now, before, name) for name in STATISTICS},
    )


def ks_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """The two-sample Kolmogorov-Smirnov distance: the largest gap between the cumulated shares, 0 to 1."""
    first, second = np.sort(first), np.sort(second)
    values = np.concatenate([first, second])
    shares = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def as_json(difference: Difference | None, accepted: Accepted | None, data_md5: str) -> dict[str, Any]:
    """The content of difference.json; without a difference it says why there is none."""
    version = None if accepted is None else {"version": accepted.version, "data_md5": accepted.data_md5}
    record: dict[str, Any] = {"data_md5": data_md5, "accepted": version, "statement": _statement(difference, accepted)}
    if difference is None:
        return record | dict.fromkeys(("counts", "images", "joined_groups", "gone", "label_mix", "drift"))
    lists = {name: getattr(difference, name) for name in ("added", "removed", "moved", "relabelled")}
    return record | {
        "counts": {
            "before": difference.n_before,
            "now": difference.n_now,
            **{name: len(frame) for name, frame in lists.items()},
            "renamed": difference.renamed,
            "rewritten": difference.rewritten,
            "regrouped": difference.regrouped,
        },
        # The counts say how many there are.
        "images": {name: frame.head(NAMED_PER_LIST).to_dict("records") for name, frame in lists.items()},
        "joined_groups": difference.joined_groups,
        "gone": difference.gone,
        "label_mix": {label: {"before": was, "now": now} for label, (was, now) in difference.label_mix.items()},
        "drift": {
            name: {
                "distance": drift.distance,
                "label": drift.label,
                "classes": {
                    label: {"distance": distance, "chance": drift.chance[label]}
                    for label, distance in drift.distances.items()
                },
            }
            for name, drift in difference.drift.items()
        },
    }


def _statement(difference: Difference | None, accepted: Accepted | None) -> str:
    if accepted is None:
        return "first version: no other data version was accepted yet, so there is nothing to compare it with"
    known = f"data {accepted.data_md5}, accepted with model version {accepted.version}"
    return f"compared with {known}" if difference else f"not compared: MLflow keeps no profile of {known}"


def _prepare(images: pd.DataFrame) -> pd.DataFrame:
    ordered = images.sort_values("path", ignore_index=True)
    names = [PurePosixPath(path).name for path in ordered["path"]]
    return ordered.assign(name=names, pixels=ordered["pixels_sha256"].fillna(ordered["sha256"]))


def _pair(now: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Rows (now, before) of the same image, each row of the frames at most once."""
    found = [pd.DataFrame({"now": [], "before": []}, dtype=int)]
    for place in PLACES:
        for content in CONTENTS:
            pairs = _equal_rows(now, before, [content, *place])
            now, before = now.drop(pairs["now"]), before.drop(pairs["before"])
            found.append(pairs)
    return pd.concat(found).sort_values("now", ignore_index=True)


def _equal_rows(now: pd.DataFrame, before: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    def counted(frame: pd.DataFrame, side: str) -> pd.DataFrame:
        rows = frame[columns].assign(occurrence=frame.groupby(columns).cumcount())
        return rows.rename_axis(side).reset_index()

    pairs = counted(now, "now").merge(counted(before, "before"), on=[*columns, "occurrence"])
    return pairs[["now", "before"]]


def _changes(now: pd.DataFrame, before: pd.DataFrame, column: str) -> pd.DataFrame:
    changes = pd.DataFrame(
        {"path": now["path"].to_numpy(), "before": before[column].to_numpy(), "now": now[column].to_numpy()}
    )
    return changes[changes["before"] != changes["now"]].sort_values("path", ignore_index=True)


def _unequal(now: pd.DataFrame, before: pd.DataFrame, column: str) -> int:
    return int((now[column].to_numpy() != before[column].to_numpy()).sum())


def _renamed(now: pd.DataFrame, before: pd.DataFrame) -> int | None:
    """How many files have another name in their folder, of those whose earlier name is known."""
    hashed = [
        name.startswith(sha256[:NAME_DIGITS]) for name, sha256 in zip(before["name"], before["sha256"], strict=True)
    ]
    is_known = ~np.asarray(hashed, bool)
    if len(is_known) and not is_known.any():
        return None
    return _unequal(now[is_known], before[is_known], "name")


def _joined_groups(now: pd.DataFrame, before: pd.DataFrame, added: pd.DataFrame) -> list[dict[str, Any]]:
    earlier = pd.Series(before["duplicate_group"].to_numpy(), index=now["duplicate_group"].to_numpy())
    bridges = added.groupby("duplicate_group")["path"].agg(list)
    return [
        {"group": group, "earlier": sorted(names.unique()), "bridges": sorted(bridges.get(group, []))}
        for group, names in earlier.groupby(level=0)
        # A name decides a side of the split: a group that got another one may move as well.
        if set(names) != {group}
    ]


def _gone(before: pd.DataFrame, removed: pd.DataFrame) -> dict[str, float]:
    counts, lost = before["label"].value_counts(), removed["label"].value_counts()
    shares = {str(label): float(lost.get(label, 0) / count) for label, count in sorted(counts.items())}
    return {"all": len(removed) / len(before), **shares}


def _share(images: pd.DataFrame, label: str) -> float:
    return float((images["label"] == label).mean()) if len(images) else 0.0


def _drift(now: pd.DataFrame, before: pd.DataFrame, statistic: str) -> Drift:
    """Within each class: another mix of the classes shifts the images' brightness as well, and is told apart."""
    samples = {label: [_values(frame, label, statistic) for frame in (now, before)] for label in CLASS_NAMES}
    both = {label: pair for label, pair in samples.items() if all(map(len, pair))}
    return Drift(
        distances={label: ks_distance(*pair) for label, pair in both.items()},
        chance={label: _by_chance([len(sample) for sample in pair]) for label, pair in both.items()},
    )


def _values(images: pd.DataFrame, label: str, statistic: str) -> NDArray[np.float64]:
    # An image that can't be decoded has no statistics, and is a critical finding.
    return images.loc[images["label"] == label, statistic].dropna().to_numpy(float)


def _by_chance(sizes: Sequence[int]) -> float:
    """Smirnov's asymptotic bound for two samples; for values that repeat it is too large rather than too small."""
    return float(np.sqrt(-np.log(CHANCE / 2) / 2 * sum(1 / size for size in sizes)))
