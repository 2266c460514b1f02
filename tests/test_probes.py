"""Probe weights: convex, closest to equal, and the known scores come out."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from promptrec.errors import InputError
from promptrec.probes import PULL, probe_weights, read_probes
from promptrec.tables import write_table


def unit(rows: int, seed: int, dims: int = 32) -> np.ndarray:
    """Unit vectors with much in common, as prompts have."""
    vectors = np.random.default_rng(seed).normal(size=(rows, dims)) + 0.8 * np.random.default_rng(99).normal(size=dims)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def table_of(vectors: np.ndarray, probes: np.ndarray) -> np.ndarray:
    return (probes.astype(float) @ vectors.T.astype(float)) ** 3


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("rows", "count"), [(40, 1), (300, 5), (6000, 16)])
def test_scores_made_from_known_weights_are_reproduced_by_convex_weights(rows, count, seed):
    vectors, probes = unit(rows, seed), unit(count, seed + 100)
    known = np.random.default_rng(seed).dirichlet(np.full(rows, 0.3))
    pairs = table_of(vectors, probes)
    scores = pairs @ known
    weights, residual = probe_weights(vectors, probes, scores)
    assert weights.shape == (rows,) and weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-9)
    assert np.abs(pairs @ weights - scores).max() < 1e-3
    assert residual == pytest.approx(np.sqrt(np.mean((pairs @ weights - scores) ** 2)))
    assert residual < np.sqrt(np.mean((pairs.mean(1) - scores) ** 2))
    assert ((weights - 1 / rows) ** 2).sum() <= (
        (known - 1 / rows) ** 2
    ).sum() + 1e-9  # no farther from equal than known


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shift", [-0.9, -0.05, 0.05, 0.3])
def test_scores_that_no_weights_give_are_approached(seed, shift):
    vectors, probes = unit(60, seed), unit(4, seed + 100)
    pairs = table_of(vectors, probes)
    scores = np.clip(pairs.mean(1) + shift, -1, 1)
    weights, residual = probe_weights(vectors, probes, scores)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-9)
    assert residual < np.sqrt(np.mean((pairs.mean(1) - scores) ** 2))


def test_the_weights_are_the_optimum_that_a_general_solver_finds():
    vectors, probes = unit(30, 1), unit(3, 2)
    pairs = table_of(vectors, probes)
    scores = pairs[:, :4].mean(1)
    loss = lambda w: 1e4 * (((pairs @ w - scores) ** 2).sum() + PULL * 30 * ((w - 1 / 30) ** 2).sum())  # noqa: E731
    slope = lambda w: 2e4 * (pairs.T @ (pairs @ w - scores) + PULL * 30 * (w - 1 / 30))  # noqa: E731
    whole = {"type": "eq", "fun": lambda w: w.sum() - 1}
    start = np.full(30, 1 / 30)
    other = minimize(loss, start, jac=slope, bounds=[(0, 1)] * 30, constraints=whole, method="SLSQP", tol=1e-14)
    assert loss(probe_weights(vectors, probes, scores)[0]) <= other.fun + 1e-9


def test_scores_of_equal_weights_leave_them_equal():
    vectors, probes = unit(50, 1), unit(3, 2)
    weights, residual = probe_weights(vectors, probes, table_of(vectors, probes).mean(1))
    assert weights == pytest.approx(np.full(50, 1 / 50), abs=1e-9) and residual < 1e-9


@pytest.mark.parametrize(
    ("probes", "scores", "message"),
    [
        (unit(0, 1), [], "give one or more"),
        (unit(2, 1), [0.5], "2 with 1 scores"),
        (unit(2, 1), [0.5, 61], "row 2: score 61.0 is not a number from -1 to 1"),
        (unit(2, 1), [np.nan, 0.5], "row 1: score nan"),
        (unit(1, 1).repeat(2, axis=0), [0.5, 0.6], "rows 1 and 2 are the same text"),
    ],
)
def test_bad_probes_are_refused(probes, scores, message):
    with pytest.raises(InputError, match=message):
        probe_weights(unit(9, 0), probes, np.array(scores))


@pytest.mark.parametrize(
    ("texts", "scores", "message"),
    [
        (["a", "b"], [0.5, "high"], "row 2: score nan is not a number"),
        (["a", "b"], [0.5, None], "row 2: score nan is not a number"),
        (["a", "b"], [-1.1, 0.5], "row 1: score -1.1 is not a number from -1 to 1"),
        (["a", "a "], [0.5, 0.6], "'a' occurs twice"),
        (["a", " "], [0.5, 0.6], "row 2: rewrite_prompt is blank"),
        ([], [], "the table has no rows"),
    ],
)
def test_a_bad_file_of_probes_is_refused(tmp_path, texts, scores, message):
    path = write_table(pd.DataFrame({"rewrite_prompt": texts, "score": scores}), tmp_path / "probes.csv")
    with pytest.raises(InputError, match=message):
        read_probes(path)
