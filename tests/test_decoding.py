"""Strings for vectors: joins and searches never lead away from the vector, budgets hold, answers stay with their rows."""

import numpy as np
import pytest

from promptrec.decoding import DecodingSettings, improve, join_prompts
from promptrec.scoring import unit

STYLES = [
    "Rewrite it as a pirate would say it",
    "Turn the words into a royal decree",
    "Make a weather forecast out of this",
    "Summarise the passage for small children",
]

BANK = [*STYLES, "Make it rhyme", "Use a calm tone", "Turn this into a letter", "Explain the words"]


def mixtures(scorer, bank, rows: int, seed: int) -> np.ndarray:
    """Targets [rows, d] that lie among a bank's prompts."""
    weights = np.random.default_rng(seed).dirichlet(np.full(len(bank), 0.4), size=rows).astype(np.float32)
    return unit(weights @ scorer.encode(bank))


def nearness(targets: np.ndarray, scorer, texts) -> np.ndarray:
    return (targets * scorer.encode(texts)).sum(1)


@pytest.mark.parametrize("joined", [1, 2, 4])
def test_joining_never_leads_away_from_the_vector(word_scorer, joined):
    targets, vectors = mixtures(word_scorer, BANK, 25, joined), word_scorer.encode(BANK)
    start = (targets @ vectors.T).max(1)
    texts, reached = join_prompts(targets, BANK, vectors, word_scorer, DecodingSettings(joined=joined))
    found = nearness(targets, word_scorer, texts)
    assert (found >= start - 1e-6).all() and found == pytest.approx((targets * reached).sum(1), abs=1e-6)
    assert (joined > 1) == (found.mean() > start.mean() + 0.001)


def test_joining_finds_the_two_prompts_that_a_vector_is_made_of(word_scorer):
    target = word_scorer.encode([f"{STYLES[0]} {STYLES[3]}"])
    (text,), _ = join_prompts(target, STYLES, word_scorer.encode(STYLES), word_scorer, DecodingSettings(joined=2))
    assert sorted(text.split()) == sorted(f"{STYLES[0]} {STYLES[3]}".split())


def test_a_row_s_own_answer_is_tried_for_it_and_for_no_other(word_scorer):
    answers = ["Sing it like a shanty", "Sell it like a lawyer", "Whisper it at midnight"]
    targets, vectors, settings = word_scorer.encode(answers), word_scorer.encode(BANK), DecodingSettings(joined=2)
    texts, reached = join_prompts(targets, BANK, vectors, word_scorer, settings, [[one] for one in answers])
    assert texts == answers and (targets * reached).sum(1) == pytest.approx(1)
    turned = [[one] for one in (*answers[1:], answers[0])]
    texts, _ = join_prompts(targets, BANK, vectors, word_scorer, settings, turned)
    assert not any(answer in text for answer, text in zip(answers, texts, strict=True))
    alone, _ = join_prompts(targets[[1]], BANK, vectors, word_scorer, settings, [turned[1]])
    assert alone == [texts[1]]


def test_a_bank_of_one_prompt_is_joined_with_nothing_else(word_scorer):
    only, targets = ["Only this"], mixtures(word_scorer, BANK, 3, 0)
    texts, _ = join_prompts(targets, only, word_scorer.encode(only), word_scorer, DecodingSettings())
    assert {word for text in texts for word in text.split()} == {"Only", "this"}


def test_what_exceeds_the_token_budget_is_neither_chosen_nor_joined(minilm):
    bank = ["Make it rhyme", "Use a calm tone", "Explain the words of the letter", "very long prompt " * 30]
    settings = DecodingSettings(joined=3, max_tokens=9)
    long = minilm.encode(["very long prompt " * 30, "Make it rhyme Use a calm tone Explain the words of the letter"])
    texts, _ = join_prompts(long, bank, minilm.encode(bank), minilm, settings)
    assert all(minilm.count_tokens(text) <= 9 for text in texts)


@pytest.mark.parametrize("method", ["surrogate", "gradient"])
def test_a_row_s_own_search_comes_nearer_within_the_token_budget(minilm, method):
    targets, start = mixtures(minilm, BANK, 3, 0), ["Write something about it"] * 3
    settings = DecodingSettings(max_tokens=24, evaluations=60, method=method)
    found = improve(targets, start, BANK, minilm, settings)
    assert (nearness(targets, minilm, found) > nearness(targets, minilm, start) + 0.05).all()
    assert all(minilm.count_tokens(text) <= 24 for text in found)


def test_where_nothing_can_be_searched_the_texts_stay(word_scorer):
    targets = mixtures(word_scorer, BANK, 5, 0)
    assert improve(targets, BANK[:5], BANK, word_scorer, DecodingSettings(evaluations=50)) == BANK[:5]
