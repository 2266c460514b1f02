"""Strings for a posterior: joins and searches never lower what is expected, budgets hold, strings are shared."""

import numpy as np
import pytest

from promptrec.decoding import DecodingSettings, frequent_words, improve, join_prompts
from promptrec.predictor import Posterior, choose

STYLES = [
    "Rewrite it as a pirate would say it",
    "Turn the words into a royal decree",
    "Make a weather forecast out of this",
    "Summarise the passage for small children",
]

BANK = [*STYLES, "Make it rhyme", "Use a calm tone", "Turn this into a letter", "Explain the words"]


def believing(scorer, bank, rows: int, seed: int) -> Posterior:
    weights = np.random.default_rng(seed).dirichlet(np.full(len(bank), 0.4), size=rows)
    return Posterior(weights, scorer.encode(bank), np.ones(rows))


@pytest.mark.parametrize("joined", [1, 2, 4])
def test_joining_never_lowers_what_is_expected(word_scorer, joined):
    posterior = believing(word_scorer, BANK, 25, joined)
    vectors = posterior.bank
    start = posterior.own_values(vectors[choose(posterior, vectors)])
    texts, reached = join_prompts(posterior, BANK, vectors, word_scorer, DecodingSettings(joined=joined))
    found = posterior.own_values(word_scorer.encode(texts))
    assert (found >= start - 1e-6).all() and found == pytest.approx(posterior.own_values(reached), abs=1e-6)
    assert (joined > 1) == (found.mean() > start.mean() + 0.001)


def test_joining_finds_the_two_prompts_that_a_vector_is_made_of(word_scorer):
    bank = STYLES
    target = word_scorer.encode([f"{bank[0]} {bank[3]}"])
    posterior = Posterior(np.ones((1, 1)), target, np.ones(1))
    (text,), _ = join_prompts(posterior, bank, word_scorer.encode(bank), word_scorer, DecodingSettings(joined=2))
    assert sorted(text.split()) == sorted(f"{bank[0]} {bank[3]}".split())


def test_a_row_s_own_answer_is_tried_for_it_and_for_no_other(word_scorer):
    answers = ["Sing it like a shanty", "Sell it like a lawyer", "Whisper it at midnight"]
    posterior = Posterior(np.eye(3), word_scorer.encode(answers), np.ones(3))
    vectors, settings = word_scorer.encode(BANK), DecodingSettings(joined=2)
    texts, reached = join_prompts(posterior, BANK, vectors, word_scorer, settings, [[one] for one in answers])
    assert texts == answers and posterior.own_values(reached) == pytest.approx(1)
    turned = [[one] for one in (*answers[1:], answers[0])]
    texts, _ = join_prompts(posterior, BANK, vectors, word_scorer, settings, turned)
    assert not any(answer in text for answer, text in zip(answers, texts, strict=True))
    alone, _ = join_prompts(posterior.of([1]), BANK, vectors, word_scorer, settings, [turned[1]])
    assert alone == [texts[1]]


def test_a_bank_of_one_prompt_is_joined_with_nothing_else(word_scorer):
    posterior = believing(word_scorer, BANK, 3, 0)
    texts, _ = join_prompts(
        posterior, ["Only this"], word_scorer.encode(["Only this"]), word_scorer, DecodingSettings()
    )
    assert {word for text in texts for word in text.split()} == {"Only", "this"}


def test_what_exceeds_the_token_budget_is_neither_chosen_nor_joined(minilm):
    bank = ["Make it rhyme", "Use a calm tone", "Explain the words of the letter", "very long prompt " * 30]
    settings = DecodingSettings(joined=3, max_tokens=9, evaluations=0)
    long = minilm.encode(["very long prompt " * 30, "Make it rhyme Use a calm tone Explain the words of the letter"])
    posterior = Posterior(np.eye(2), long, np.ones(2))
    texts, _ = join_prompts(posterior, bank, minilm.encode(bank), minilm, settings)
    assert all(minilm.count_tokens(text) <= 9 for text in texts)


def test_a_row_s_own_search_raises_what_is_expected(minilm):
    posterior, start = believing(minilm, BANK, 3, 0), ["Write something about it"] * 3
    found = improve(posterior, start, BANK, minilm, DecodingSettings(max_tokens=24, evaluations=60))
    assert (posterior.own_values(minilm.encode(found)) > posterior.own_values(minilm.encode(start)) + 0.01).all()
    assert all(minilm.count_tokens(text) <= 24 for text in found)


def test_where_nothing_can_be_searched_the_texts_stay(word_scorer):
    posterior = believing(word_scorer, BANK, 5, 0)
    assert improve(posterior, BANK[:5], BANK, word_scorer, DecodingSettings(evaluations=50)) == BANK[:5]


def test_frequent_words_come_first_and_letters_do_not_count():
    assert frequent_words(["Make a poem", "make a song", "Make it rhyme a b"], 2) == ("make", "poem")
