"""Splits: what clusters and splits promise, checked on random tables."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from promptrec.errors import InputError
from promptrec.splits import (
    SAME_PROMPT,
    SPLITS,
    check_split,
    cluster_prompts,
    clusters_of,
    drop_mixed,
    hash_split,
    split_clusters,
    split_components,
    wordings_of,
)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clumps(seed: int, centres: int = 12, each: int = 6, spread: float = 0.25) -> np.ndarray:
    """Unit vectors around random centres: many pairs on either side of the threshold."""
    rng = np.random.default_rng(seed)
    around = np.repeat(rng.normal(size=(centres, 16)), each, axis=0)
    return unit(around + spread * rng.normal(size=around.shape))


def random_triples(seed: int, rows: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    clusters = rng.integers(120, size=rows)
    return pd.DataFrame(
        {
            "original_text": [f"text {n}" for n in rng.integers(200, size=rows)],
            "rewrite_prompt": [f"prompt {cluster}-{n}" for cluster, n in zip(clusters, rng.integers(3, size=rows), strict=True)],
            "prompt_cluster": clusters,
        }
    )  # fmt: skip


# --- clusters


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0.7, SAME_PROMPT])
def test_prompts_of_different_clusters_are_never_closer_than_the_threshold(seed, threshold):
    vectors = clumps(seed)
    clusters = cluster_prompts(vectors, threshold)
    apart = clusters[:, None] != clusters[None, :]
    assert 1 < len(set(clusters)) < len(vectors)
    assert (vectors @ vectors.T)[apart].max() < threshold


@pytest.mark.parametrize("seed", range(4))
def test_every_prompt_has_a_near_neighbour_in_its_cluster(seed):
    vectors = clumps(seed)
    clusters = cluster_prompts(vectors, 0.8)
    similar = vectors @ vectors.T - 2 * np.eye(len(vectors))
    for cluster in set(clusters):
        members = np.flatnonzero(clusters == cluster)
        if len(members) > 1:
            assert (similar[np.ix_(members, members)].max(1) >= 0.8).all()


def test_a_chain_of_near_prompts_is_one_cluster():
    angles = np.deg2rad([0, 20, 40, 60, 180])
    clusters = cluster_prompts(np.stack([np.cos(angles), np.sin(angles)], axis=1), threshold=0.9)
    assert clusters.tolist() == [0, 0, 0, 0, 1]


def test_clusters_are_numbered_by_first_appearance_whatever_the_block():
    vectors = clumps(1)
    clusters = cluster_prompts(vectors)
    assert list(dict.fromkeys(clusters)) == list(range(clusters.max() + 1))
    assert cluster_prompts(vectors, block=7).tolist() == clusters.tolist()


def test_equal_prompts_are_one_cluster_and_distant_ones_are_not():
    assert cluster_prompts(np.eye(3)[[0, 1, 0, 2, 1]]).tolist() == [0, 1, 0, 2, 1]


# --- splits


def test_a_hash_split_is_the_same_in_every_process():
    code = "from promptrec.splits import hash_split; print([hash_split(f'p{n}') for n in range(20)])"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert printed.strip() == str([hash_split(f"p{n}") for n in range(20)])


def test_a_hash_split_meets_its_fractions_and_follows_its_seed():
    drawn = pd.Series([hash_split(f"prompt {n}", (0.6, 0.3, 0.1)) for n in range(5000)]).value_counts(normalize=True)
    assert drawn.reindex(SPLITS).to_numpy() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    assert [hash_split(f"p{n}", seed=0) for n in range(30)] != [hash_split(f"p{n}", seed=1) for n in range(30)]


@pytest.mark.parametrize("seed", range(6))
def test_a_cluster_goes_to_one_split_whatever_the_order(seed):
    rng = np.random.default_rng(seed)
    prompts, clusters = [f"prompt {n}" for n in range(200)], rng.integers(60, size=200)
    splits = pd.Series(split_clusters(prompts, clusters, seed=seed))
    assert splits.groupby(clusters).nunique().max() == 1 and set(splits) == set(SPLITS)
    order = rng.permutation(200)
    again = split_clusters([prompts[row] for row in order], clusters[order], seed=seed)
    assert again == splits[order].tolist()


def test_adding_prompts_moves_no_cluster_that_does_not_change():
    prompts, clusters = [f"prompt {n}" for n in range(40)], np.arange(40) // 2
    before = split_clusters(prompts, clusters)
    assert split_clusters([*prompts, "another"], np.append(clusters, 99))[:40] == before


def test_a_cluster_follows_the_split_that_is_fixed_already_the_most_held_out_first():
    prompts, clusters = list("abcdef"), np.array([0, 0, 1, 1, 2, 2])
    fixed = {"a": "validation", "c": "train", "d": "test"}
    splits = split_clusters(prompts, clusters, fractions=(1.0, 0.0, 0.0), fixed=fixed)
    assert splits == ["validation", "validation", "test", "test", "train", "train"]


@pytest.mark.parametrize("seed", range(8))
def test_components_never_share_a_cluster_or_an_original_between_splits(seed):
    table = random_triples(seed, rows=120)
    splits = split_components(table, (0.4, 0.3, 0.3), seed=seed)
    assert set(splits) == set(SPLITS) and splits.index.equals(table.index)
    check_split(table.assign(split=splits))


def test_components_do_not_depend_on_the_order_of_the_rows():
    table = random_triples(3)
    shuffled = table.sample(frac=1, random_state=1)
    assert split_components(shuffled).reindex(table.index).equals(split_components(table))


def test_rows_linked_through_others_are_one_component():
    table = pd.DataFrame({"original_text": ["a", "a", "b", "c"], "prompt_cluster": [1, 2, 2, 3]})
    for seed in range(20):
        assert split_components(table, (0.4, 0.3, 0.3), seed=seed).iloc[:3].nunique() == 1


def test_mixed_rows_are_dropped():
    table = random_triples(5)
    originals = table["original_text"].map(lambda text: hash_split(text, (0.5, 0.25, 0.25)))
    prompts = pd.Series(
        split_clusters(table["rewrite_prompt"], table["prompt_cluster"], (0.5, 0.25, 0.25)), index=table.index
    )
    kept = drop_mixed(table, originals, prompts)
    assert 0 < len(kept) < len(table)
    check_split(kept)
    assert kept["split"].tolist() == originals[kept.index].tolist() == prompts[kept.index].tolist()


# --- the check


SPLIT = pd.DataFrame(
    {
        "original_text": ["a", "b", "c"],
        "rewrite_prompt": ["p", "q", "r"],
        "prompt_cluster": [0, 1, 2],
        "split": ["train", "train", "test"],
    }
)


def test_a_clean_split_passes_and_comes_back():
    pd.testing.assert_frame_equal(check_split(SPLIT), SPLIT)


@pytest.mark.parametrize(("column", "value"), [("prompt_cluster", 0), ("original_text", "a"), ("rewrite_prompt", "p")])
def test_anything_on_two_sides_is_refused_by_name(column, value):
    leaking = SPLIT.copy()
    leaking.loc[2, column] = value
    with pytest.raises(InputError, match=rf"{column} '{value}' lies in 2 splits"):
        check_split(leaking)


@pytest.mark.parametrize("column", ["prompt_cluster", "split"])
def test_rows_without_cluster_or_split_are_refused(column):
    table = SPLIT.astype({column: object})
    table.loc[1, column] = None
    with pytest.raises(InputError, match=f"1 rows have no {column}"):
        check_split(table)


def test_a_prompt_of_many_rows_is_compared_once(minilm, monkeypatch):
    compared = []
    monkeypatch.setattr(
        "promptrec.splits.cluster_prompts", lambda rows: compared.append(len(rows)) or cluster_prompts(rows)
    )
    prompts = ["Make it rhyme", "Turn it into a legal contract", "make it rhyme.", "Make it rhyme"] * 500
    assert clusters_of(prompts).tolist() == [0, 1, 0, 0] * 500 and compared == [3]


def test_wordings_of_others_are_found(minilm):
    prompts = ["Make it rhyme", "Turn it into a legal contract"]
    assert wordings_of(prompts, ["make it rhyme."]).tolist() == [True, False]
    assert wordings_of(prompts, []).tolist() == [False, False]
