"""How sure are we? Bootstrap intervals and paired differences, resampled by prompt cluster.

Rows that share a prompt cluster are not independent; resampling whole clusters keeps an interval honest.
Source: Efron and Tibshirani (1993), cluster bootstrap: Field and Welsh (2007).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from promptrec.errors import InputError


def bootstrap_means(
    values: np.ndarray, clusters: Sequence | None = None, repeats: int = 2000, seed: int = 0
) -> np.ndarray:
    """`repeats` bootstrap means of values [n]; whole clusters are drawn when `clusters` [n] is given."""
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise InputError("no scores to resample, or a score is not a number")
    codes = (
        pd.factorize(np.asarray(clusters), use_na_sentinel=False)[0] if clusters is not None else np.arange(len(values))
    )
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(repeats, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def interval(
    values: np.ndarray, clusters: Sequence | None = None, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) with a percentile bootstrap interval at `level`."""
    means = bootstrap_means(values, clusters, seed=seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(values)), float(low), float(high)


def compare(scores: pd.DataFrame, baseline: str, seed: int = 0) -> pd.DataFrame:
    """One row a method, best first: mean SCS with interval, and the paired difference to `baseline`.

    `scores` has columns method, id, scs and prompt_cluster; every method must answer the same ids.
    """
    wide = scores.pivot(index="id", columns="method", values="scs")
    if baseline not in wide:
        raise InputError(f"baseline {baseline!r} is not among the methods {', '.join(wide.columns)}")
    if wide.isna().any().any():
        raise InputError(f"method {wide.columns[wide.isna().any()][0]!r} did not answer every row")
    clusters = scores.drop_duplicates("id").set_index("id").loc[wide.index, "prompt_cluster"]
    rows = []
    for method in wide:
        mean, low, high = interval(wide[method].to_numpy(), clusters, seed=seed)
        gain, gain_low, gain_high = interval((wide[method] - wide[baseline]).to_numpy(), clusters, seed=seed)
        rows.append(
            {
                "method": method,
                "mean": mean,
                "low": low,
                "high": high,
                "difference": gain,
                "difference_low": gain_low,
                "difference_high": gain_high,
                "n": len(wide),
                "clusters": clusters.nunique(),
            }
        )
    return pd.DataFrame(rows).sort_values("mean", ascending=False, ignore_index=True)
