"""Leaderboard probes: constants whose score is known tell which prompts a hidden test set is made of.

Finds weights of our prompts under which the constants score what they scored there (4th, 3rd and 7th place did so by
choosing rows). Does not search: see mean_prompt.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.data import check_cells
from promptrec.errors import InputError
from promptrec.tables import read_table

PULL = 1e-8  # towards equal weights; small, so that it only chooses among weights that reproduce the scores


def read_probes(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Constants and their scores [k]: columns rewrite_prompt and score of a table.

    Raises InputError naming the row for a blank text, a score that is not a number from -1 to 1, a text that is there
    twice.
    """
    table = read_table(path, required=["rewrite_prompt", "score"])
    check_cells(table[["rewrite_prompt"]], ["rewrite_prompt"], str(path))
    texts, scores = table["rewrite_prompt"].str.strip(), pd.to_numeric(table["score"], errors="coerce").to_numpy(float)
    if texts.duplicated().any():
        raise InputError(f"{path}: {texts[texts.duplicated()].iloc[0][:60]!r} occurs twice; keep one of them")
    _check_scores(scores, str(path))
    return texts.tolist(), scores


def _check_scores(scores: np.ndarray, where: str) -> None:
    bad = ~(np.abs(scores) <= 1)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(f"{where}: row {row + 1}: score {scores[row]} is not a number from -1 to 1; write .61, not 61")


def probe_weights(vectors: np.ndarray, probes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [n] (not negative, sum 1) of unit vectors [n, d] under which unit vectors `probes` [k, d] have the mean
    SCS `scores` [k], and the root mean square of what still differs. Of weights that do it, those closest to equal.

    Minimises |A w - scores|^2 + PULL n |w - 1/n|^2 on the simplex, A = cos**3 [k, n], by Newton's method on its dual:
    for k numbers y, w = simplex(1/n - A'y / (PULL n)), and at the optimum y = A w - scores. Milliseconds for n = 6,000.
    """
    vectors, probes, scores = (np.asarray(array, float) for array in (vectors, probes, scores))
    if not len(vectors) or not len(scores) or scores.shape != probes.shape[:1]:
        raise InputError(f"probes: {len(probes)} with {len(scores)} scores, {len(vectors)} prompts; give one or more")
    _check_scores(scores, "probes")
    twins = np.argwhere(np.triu(probes @ probes.T, 1) > 1 - 1e-6)
    if len(twins):
        raise InputError(f"probes: rows {twins[0][0] + 1} and {twins[0][1] + 1} are the same text; keep one of them")
    pairs = (probes @ vectors.T) ** 3
    weights = _solve(pairs, scores, PULL * len(vectors))
    return weights, float(np.sqrt(np.mean((pairs @ weights - scores) ** 2)))


def _solve(pairs: np.ndarray, scores: np.ndarray, pull: float, steps: int = 200) -> np.ndarray:
    dual = np.zeros(len(scores))
    weights, value = _at(dual, pairs, scores, pull)
    for _ in range(steps):
        slope = dual + scores - pairs @ weights
        if np.abs(slope).max() < 1e-9:
            break
        held = pairs[:, weights > 0]
        held = held - held.mean(1, keepdims=True)
        step = np.linalg.solve(np.eye(len(scores)) + held @ held.T / pull, slope)
        for size in 0.5 ** np.arange(30):
            lower, lower_value = _at(dual - size * step, pairs, scores, pull)
            if lower_value < value - 1e-4 * size * (slope @ step):
                break
        else:
            break  # as low as floating point goes
        dual, weights, value = dual - size * step, lower, lower_value
    return weights


def _at(dual: np.ndarray, pairs: np.ndarray, scores: np.ndarray, pull: float) -> tuple[np.ndarray, float]:
    """The weights that belong to a dual point, and the dual objective there."""
    wanted = 1 / pairs.shape[1] - dual @ pairs / pull
    weights = _on_simplex(wanted)
    return weights, dual @ dual / 2 + scores @ dual + pull * (wanted @ weights - weights @ weights / 2)


def _on_simplex(values: np.ndarray) -> np.ndarray:
    """The nearest vector that is not negative and sums to 1."""
    ordered = np.sort(values)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(values) + 1)
    return np.maximum(values - excess[ordered > excess][-1], 0)
