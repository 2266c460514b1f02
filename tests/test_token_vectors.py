"""Token vectors: near the encoder on strings they never saw, kept on disk, and their moves rise more often than others."""

import numpy as np
import pytest

from promptrec.prompt_bank import shipped_prompts
from promptrec.search_encoders import MiniLMEncoder
from promptrec.search_moves import edited, summed_moves
from promptrec.search_space import Objective, Units
from promptrec.text_features import frequent_words
from promptrec.token_search import SearchRow, SearchSettings
from promptrec.token_vectors import TokenVectors, TokenVectorSettings, fidelity, fit_token_vectors, token_vectors

SMALL = TokenVectorSettings(strings=600, words=120, longest=12, steps=60, batch_size=64)


@pytest.fixture(scope="module")
def prompts():
    return shipped_prompts()["rewrite_prompt"].tolist()


@pytest.fixture(scope="module")
def encoder():
    return MiniLMEncoder()


@pytest.fixture(scope="module")
def small(encoder, prompts):
    return fit_token_vectors(encoder, prompts[::40], SMALL)


def test_sums_are_nearer_to_the_encoder_than_those_of_shuffled_vectors(encoder, prompts, small):
    held = prompts[7::400]
    shuffled = TokenVectors(np.random.default_rng(0).permutation(small.vectors), small.offset)
    assert fidelity(small, encoder, held) > fidelity(shuffled, encoder, held) + 0.1


def test_a_token_that_no_string_held_adds_nothing(encoder, small):
    unseen = encoder.token_ids("zygomorphic")
    assert not small.sums([unseen]).any() and small.sums([encoder.token_ids("rewrite")]).any()
    assert small.sums([]).shape == (0, 384)


def test_the_same_seed_gives_the_same_vectors(encoder, prompts, small):
    again = fit_token_vectors(encoder, prompts[::40], SMALL)
    assert again.vectors == pytest.approx(small.vectors, abs=1e-5)


def test_they_are_fitted_once_and_read_afterwards(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path))
    monkeypatch.setattr("promptrec.token_vectors.TokenVectorSettings", lambda: SMALL)
    first = token_vectors(MiniLMEncoder())
    assert len(list((tmp_path / "token-vectors").glob("*.npz"))) == 1
    monkeypatch.setattr("promptrec.token_vectors.fit_token_vectors", None)  # must not be called again
    encoder = MiniLMEncoder()
    assert (token_vectors(encoder).vectors == first.vectors).all()
    assert token_vectors(encoder) is token_vectors(encoder)


def test_its_moves_rise_more_often_than_random_ones(encoder, prompts, small):
    encoder._token_vectors = small
    target = Objective(encoder.encode(["Turn the story into a formal letter for a lawyer"]), np.ones(1))
    settings = SearchSettings(candidates=16, evaluations=1000, max_tokens=30)
    units = Units(encoder, "word", 30, ("poem",), frequent_words(prompts[::40], 120))
    row = SearchRow(units, target, "Make it sound like an old tale of the sea", None, settings)
    start = row.start
    row.vectors[units.join(start)] = encoder.encode([units.join(start)])[0]
    moves = summed_moves(row, start)
    texts = [units.join(edited(start, edits)) for edits in moves]
    drawn = [units.join(edited(start, row.random_edit(start))) for _ in range(64)]
    floor = target.value(encoder.encode([units.join(start)]))[0]
    rises = lambda strings: (target.value(encoder.encode(strings)) > floor).mean()  # noqa: E731
    assert len(set(texts)) == 16 and all(units.allows(text) for text in texts)
    assert rises(texts) > rises(drawn) + 0.1
