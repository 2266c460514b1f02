"""Solved examples: the pool they come from, those most like a row, those least like each other."""

import numpy as np
import pandas as pd
import pytest

from promptrec.data import shipped_triples
from promptrec.errors import InputError
from promptrec.shots import LIKENESS, SimilarShots, as_shots, diverse_shots, pair_vectors, shot_pool


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    return shipped_triples(["train"]).head(60)


def test_the_pool_has_one_short_triple_for_each_prompt(train, minilm):
    pool = shot_pool(pd.concat([train, train]), size=40, words=20, seed=1)
    vectors = minilm.encode(pool["rewrite_prompt"].tolist())
    assert (np.triu(vectors @ vectors.T, 1) < 0.9).all() and 10 < len(pool) <= 40
    assert pool[["original_text", "rewritten_text"]].map(lambda text: len(text.split())).to_numpy().max() <= 20
    pd.testing.assert_frame_equal(pool, shot_pool(pd.concat([train, train]), 40, 20, 1))
    assert set(pool["rewrite_prompt"]) != set(shot_pool(train, 40, 20, seed=2)["rewrite_prompt"])


@pytest.mark.parametrize("likeness", LIKENESS)
def test_a_row_of_the_pool_is_most_similar_to_itself(train, text_encoder, likeness):
    pool = shot_pool(train, 30, 20)
    vectors = pair_vectors(pool, likeness, 20, text_encoder)
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.allclose(lengths[lengths > 0], 1, atol=1e-5)
    rows = np.flatnonzero(lengths)[:8]  # where an uncased encoder sees no change, no triple is like it
    shots = SimilarShots(pool, 3, 20, likeness, text_encoder)(pool.iloc[rows])
    solved = as_shots(pool)
    assert [row[-1] for row in shots] == [solved[row] for row in rows]
    told = [
        [vectors[row] @ vectors[solved.index(shot)] for shot in near] for row, near in zip(rows, shots, strict=True)
    ]
    assert np.allclose(told, np.sort(vectors[rows] @ vectors.T)[:, -3:], atol=1e-5)  # the best one last


def test_diverse_shots_come_from_different_groups_of_prompts():
    groups = ["Write a sea shanty about {}", "Summarise the {} in one line", "Translate {} into French"]
    prompts = [group.format(word) for group in groups for word in ("ferries", "bread", "winter", "engines")]
    pool = pd.DataFrame({"original_text": "a", "rewritten_text": "b", "rewrite_prompt": prompts})
    for seed in range(3):
        shots = diverse_shots(pool, 3, seed)
        assert {prompt.split()[0] for _, _, prompt in shots} == {"Write", "Summarise", "Translate"}
        assert shots == diverse_shots(pool, 3, seed)


def test_an_unknown_likeness_is_refused(train, text_encoder):
    with pytest.raises(InputError, match="likeness 'size' is unknown; choose one of both, rewritten, change"):
        SimilarShots(train.head(3), 2, 20, "size", text_encoder)
