"""Intervals that hold what they promise on known distributions, and paired comparisons."""

import numpy as np
import pandas as pd
import pytest

from promptrec.comparison import bootstrap_means, compare, interval
from promptrec.errors import InputError


def test_the_interval_matches_the_normal_one_on_a_known_distribution():
    values = np.random.default_rng(0).normal(0.6, 0.2, size=400)
    mean, low, high = interval(values)
    error = values.std(ddof=1) / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.003)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, low, high = interval(rng.normal(0.5, 0.2, size=60))
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_wider_level_gives_a_wider_interval():
    values = np.random.default_rng(2).uniform(size=100)
    _, low, high = interval(values, level=0.8)
    _, lower, higher = interval(values, level=0.99)
    assert lower < low < high < higher


def clustered(seed: int = 0):
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(40), 10)
    return rng.normal(0, 0.2, size=40)[clusters] + rng.normal(0, 0.05, size=400), clusters


def test_clusters_that_matter_widen_the_interval():
    values, clusters = clustered()
    _, low, high = interval(values)
    _, low_by_cluster, high_by_cluster = interval(values, clusters)
    assert high_by_cluster - low_by_cluster > 2 * (high - low)


def test_clusters_that_do_not_matter_leave_it_about_as_it_was():
    values = np.random.default_rng(3).normal(size=400)
    widths = [np.diff(interval(values, clusters)[1:])[0] for clusters in (None, np.repeat(np.arange(100), 4))]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)


def test_cluster_names_may_be_anything_even_missing():
    values, clusters = clustered()
    by_name = [f"cluster {number}" for number in clusters]
    assert interval(values, by_name) == interval(values, clusters)
    some_missing = pd.Series(by_name).where(clusters > 2)
    assert interval(values, some_missing)[0] == pytest.approx(values.mean())


def test_a_constant_has_an_interval_of_no_width():
    assert interval(np.full(20, 0.25)) == (0.25, 0.25, 0.25)


def test_resampling_follows_its_seed():
    values = np.random.default_rng(4).normal(size=50)
    assert (bootstrap_means(values, seed=1) == bootstrap_means(values, seed=1)).all()
    assert (bootstrap_means(values, seed=1) != bootstrap_means(values, seed=2)).any()


@pytest.mark.parametrize("values", [[], [0.5, np.nan], [np.inf]])
def test_scores_that_are_none_are_refused(values):
    with pytest.raises(InputError, match="no scores to resample"):
        interval(np.array(values))


# --- paired comparison


@pytest.fixture
def scores():
    rng = np.random.default_rng(5)
    difficulty = rng.normal(0.5, 0.2, size=200)  # shared by all methods: only pairing takes it out
    parts = [
        pd.DataFrame({"method": method, "id": [f"r{n}" for n in range(200)], "prompt_cluster": np.arange(200) // 2,
                      "scs": difficulty + gain + rng.normal(0, 0.01, size=200)})
        for method, gain in (("constant", 0.0), ("retrieval", 0.02), ("worse", -0.02))
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def test_a_small_gain_shows_in_the_paired_difference_only(scores):
    table = compare(scores, baseline="constant").set_index("method")
    assert table.index.tolist() == ["retrieval", "constant", "worse"]  # best first
    assert table.loc["retrieval", "low"] < table.loc["constant", "mean"]  # unpaired, the intervals overlap
    assert table.loc["retrieval", "difference_low"] > 0.015
    assert table.loc["worse", "difference_high"] < -0.015
    assert table.loc["constant", ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    assert set(table["n"]) == {200} and set(table["clusters"]) == {100}


def test_the_order_of_rows_does_not_matter(scores):
    shuffled = scores.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compare(shuffled, "constant"), compare(scores, "constant"))


def test_means_are_plain_means(scores):
    table = compare(scores, "worse").set_index("method")["mean"]
    assert table.to_dict() == pytest.approx(scores.groupby("method")["scs"].mean().to_dict())


def test_an_unknown_baseline_and_a_method_with_gaps_are_refused(scores):
    with pytest.raises(InputError, match="baseline 'zero-shot' is not among the methods constant, retrieval, worse"):
        compare(scores, "zero-shot")
    with pytest.raises(InputError, match="method 'worse' did not answer every row"):
        compare(scores.drop(index=scores.index[-1]), "constant")
