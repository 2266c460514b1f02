"""Retrieval: it fits, it beats a constant where the task is easy, and it says when it cannot answer."""

import numpy as np
import pandas as pd
import pytest

from promptrec.embedding import RetrievalRecoverer, pair_features
from promptrec.errors import InputError
from promptrec.inference import best_constant

STYLES = {
    "Rewrite it as a pirate would say it": "ahoy matey arr",
    "Turn the words into a royal decree": "hear ye hereby decreed",
    "Make a weather forecast out of this": "sunny showers tonight",
    "Summarise the passage for small children": "once little bunny",
}


def easy(rows: int, seed: int) -> pd.DataFrame:
    """Triples in which the rewrite's added words give the prompt away."""
    rng = np.random.default_rng(seed)
    vocabulary = ["ferry", "harbour", "bread", "letter", "garden", "engine", "sister", "winter", "window", "market"]
    prompts = rng.choice(list(STYLES), size=rows)
    originals = [" ".join(rng.choice(vocabulary, size=6)) for _ in range(rows)]
    rewritten = [f"{STYLES[prompt]} {text}" for text, prompt in zip(originals, prompts, strict=True)]
    return pd.DataFrame({"original_text": originals, "rewrite_prompt": prompts, "rewritten_text": rewritten})


def test_features_are_both_texts_their_difference_and_their_product():
    original, rewritten = np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])
    expected = [[1, 0, 0.6, 0.8, -0.4, 0.8, 0.6 * np.sqrt(2), 0]]
    assert pair_features(original, rewritten) == pytest.approx(np.array(expected))


def test_retrieval_beats_the_best_constant_on_texts_it_has_not_seen(word_scorer):
    train, test = easy(120, 0), easy(60, 1)
    answers = RetrievalRecoverer(word_scorer).fit(train).recover(test)
    truth = test["rewrite_prompt"].tolist()
    constant = best_constant(train["rewrite_prompt"].tolist(), word_scorer)
    retrieved = word_scorer.scs(answers, truth).mean()
    assert retrieved > 0.9 > word_scorer.scs([constant] * 60, truth).mean() + 0.3


def test_predicted_vectors_are_unit_vectors(word_scorer):
    vectors = RetrievalRecoverer(word_scorer).fit(easy(40, 0)).predict_vectors(easy(10, 1))
    assert vectors.shape == (10, 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_answers_come_from_the_bank_that_is_the_training_prompts_and_more(word_scorer):
    train = easy(80, 0)
    is_pirate = train["rewrite_prompt"].str.contains("pirate")
    extra = "Let a pirate say it"
    recoverer = RetrievalRecoverer(word_scorer, bank=[extra]).fit(train[~is_pirate])
    assert set(recoverer.bank) == {extra, *train["rewrite_prompt"][~is_pirate]} and len(recoverer.bank) == 4
    assert set(recoverer.recover(train[is_pirate])) <= set(recoverer.bank)


def test_fitting_and_answering_again_gives_the_same(word_scorer):
    train, test = easy(60, 0), easy(20, 1)
    once, again = (RetrievalRecoverer(word_scorer).fit(train).recover(test) for _ in range(2))
    assert once == again


def test_it_says_when_it_cannot_answer(word_scorer):
    with pytest.raises(InputError, match="not fitted"):
        RetrievalRecoverer(word_scorer).recover(easy(2, 0))
    with pytest.raises(InputError, match="no training triples"):
        RetrievalRecoverer(word_scorer).fit(easy(2, 0).head(0))
    fitted = RetrievalRecoverer(word_scorer).fit(easy(10, 0))
    with pytest.raises(InputError, match="row 1: rewritten_text is blank"):
        fitted.recover(easy(2, 0).assign(rewritten_text=[" ", "x"]))


def test_it_works_with_the_scorer_the_offline_profile_has(minilm):
    train, test = easy(24, 0), easy(8, 1)
    answers = RetrievalRecoverer(minilm).fit(train).recover(test)
    assert (np.array(answers) == test["rewrite_prompt"].to_numpy()).mean() > 0.7
