"""Intervals by bootstrap over whole groups of copies or patients (Efron & Tibshirani 1993, chapter 13)."""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from braintumor.params import EvaluateParams


def resample_groups(n_groups: int, params: EvaluateParams) -> NDArray[np.int64]:
    """How often each group is drawn (bootstrap_samples, n_groups), each row n_groups in all.

    The same numbers for the same n_groups and seed, so that figures of the same groups are resampled together.
    """
    return _draws(n_groups, params.bootstrap_samples, params.seed).astype(np.int64)


def resampled_sums(sums: NDArray[np.float64], params: EvaluateParams) -> NDArray[np.float64]:
    """Totals (bootstrap_samples, columns) over resamples of the groups, from their own `sums` (n_groups, columns)."""
    return _draws(len(sums), params.bootstrap_samples, params.seed) @ sums


def mean_interval(
    values: ArrayLike, groups: ArrayLike, params: EvaluateParams, *, is_share: bool = True
) -> list[float]:
    """Interval [low, high] of the mean of `values` (n,), whose `groups` (n,) are any integers.

    With `is_share` the values are 0 or 1, see `ratio_interval`; give False for scores and differences.
    """
    return ratio_interval(values, np.ones(len(np.asarray(values))), groups, params, is_share=is_share)


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, groups: ArrayLike, params: EvaluateParams, *, is_share: bool = True
) -> list[float]:
    """Interval [low, high] of sum(numerator) / sum(denominator), over resamples of the groups with a denominator.

    A share of exactly 0 or 1 gives resamples without spread. Its interval then reaches to Clopper & Pearson's bound
    (1934) for as many groups, so that few images can't claim certainty. A share within one single group is unknown:
    [0, 1]. Raises ValueError where all denominators are 0.
    """
    rows = np.column_stack([np.asarray(numerator, float), np.asarray(denominator, float)])
    sums = group_sums(rows, np.asarray(groups))
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        raise ValueError("an interval needs rows with a denominator")
    part, whole = resampled_sums(sums, params).T
    low, high = percentile_interval(part / whole, params)
    return widen_share(sums[:, 0].sum() / sums[:, 1].sum(), [low, high], len(sums), params) if is_share else [low, high]


def shares_of_parts(
    is_right: ArrayLike, parts: NDArray[np.bool_], groups: ArrayLike, params: EvaluateParams
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The share that is right in each part (k,), and over the resamples (bootstrap_samples, k), all from one draw.

    `parts` (n, k) says which rows a part has. NaN where a part, or a resample of it, has none.
    """
    is_in = np.asarray(parts, float)
    is_right_in = is_in * np.asarray(is_right, float)[:, None]
    sums = group_sums(np.hstack([is_right_in, is_in]), np.asarray(groups))
    n_parts = is_in.shape[1]
    both = np.vstack([sums.sum(axis=0), resampled_sums(sums, params)])
    part, whole = both[:, :n_parts], both[:, n_parts:]
    shares = np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
    return shares[0], shares[1:]


def percentile_interval(resampled: NDArray[np.float64], params: EvaluateParams) -> list[float]:
    """The central `confidence_level` of a figure's values (bootstrap_samples,) over the resamples."""
    tail = (1 - params.confidence_level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return [float(low), float(high)]


def widen_share(share: float, interval: list[float], n_groups: int, params: EvaluateParams) -> list[float]:
    """`interval` of a share that rests on `n_groups` groups, widened where these can't have given it a spread."""
    from scipy.stats import beta

    tail = (1 - params.confidence_level) / 2
    low, high = interval
    if share == 1:
        low = min(low, float(beta.ppf(tail, n_groups, 1)))
    elif share == 0:
        high = max(high, float(beta.ppf(1 - tail, 1, n_groups)))
    elif n_groups == 1:
        low, high = 0.0, 1.0
    return [low, high]


def group_sums(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of `values` (n, columns) by group (n_groups, columns), groups in ascending order of their number.

    The same to the last bit for rows in any order.
    """
    order = np.lexsort((*values.T, groups))
    codes, group_of = np.unique(groups[order], return_inverse=True)
    columns = [np.bincount(group_of, column, len(codes)) for column in values[order].T]
    return np.column_stack(columns)


def one_of_each_group(
    values: NDArray[np.float64], groups: NDArray[np.int64], params: EvaluateParams
) -> NDArray[np.int64]:
    """Indices of one row of each group, drawn at random from its rows of `values` (n, columns).

    Rows of different groups are independent, as the guarantees of conformal sets and binomial bounds ask for; copies
    in one group are not (Dunn, Wasserman & Ramdas 2022, 'subsampling once'). The values drawn are the same for rows in
    any order, and with every row copied as often.
    """
    order = np.lexsort((*values.T, groups))
    _, first, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    drawn = np.random.default_rng(params.seed).random(len(first))
    return order[first + np.floor(drawn * sizes).astype(np.int64)]


# A report asks for the same few numbers of groups dozens of times. Floats: a product with integers is ten times slower.
@lru_cache(maxsize=8)
def _draws(n_groups: int, samples: int, seed: int) -> NDArray[np.float64]:
    shares = np.full(n_groups, 1 / n_groups)
    drawn = np.random.default_rng(seed).multinomial(n_groups, shares, size=samples).astype(float)
    drawn.flags.writeable = False
    return drawn
