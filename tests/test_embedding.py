"""Recovery without a language model: it fits, beats a constant where the task is easy, and says when it cannot answer.

What predicts is tested in test_predictor.py; here it is joined with texts.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from easy_triples import STYLES, easy

from promptrec.data import shipped_triples
from promptrec.decoding import DecodingSettings
from promptrec.embedding import EmbeddingRecoverer, RetrievalRecoverer, pair_features
from promptrec.errors import InputError
from promptrec.inference import best_constant
from promptrec.predictor import PredictorSettings
from promptrec.scoring import scs

QUICK = PredictorSettings(folds=2, epochs=12, batch_size=32, hidden=48, learning_rate=3e-3)


def test_features_are_both_texts_their_difference_and_their_product():
    original, rewritten = np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])
    expected = [[1, 0, 0.6, 0.8, -0.4, 0.8, 0.6 * np.sqrt(2), 0]]
    assert pair_features(original, rewritten) == pytest.approx(np.array(expected))


def test_retrieval_beats_the_best_constant_on_texts_it_has_not_seen(word_scorer, text_encoder):
    train, test = easy(120, 0), easy(60, 1)
    answers = RetrievalRecoverer(word_scorer, encoder=text_encoder).fit(train).recover(test)
    truth = test["rewrite_prompt"].tolist()
    constant = best_constant(train["rewrite_prompt"].tolist(), word_scorer)
    retrieved = word_scorer.scs(answers, truth).mean()
    assert retrieved > 0.9 > word_scorer.scs([constant] * 60, truth).mean() + 0.3


def test_predicted_vectors_are_unit_vectors(word_scorer, text_encoder):
    vectors = RetrievalRecoverer(word_scorer, encoder=text_encoder).fit(easy(40, 0)).predict_vectors(easy(10, 1))
    assert vectors.shape == (10, 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_answers_come_from_the_bank_that_is_the_training_prompts_and_more(word_scorer, text_encoder):
    train = easy(80, 0)
    is_pirate = train["rewrite_prompt"].str.contains("pirate")
    extra = "Let a pirate say it"
    recoverer = RetrievalRecoverer(word_scorer, bank=[extra], encoder=text_encoder).fit(train[~is_pirate])
    assert set(recoverer.bank) == {extra, *train["rewrite_prompt"][~is_pirate]} and len(recoverer.bank) == 4
    assert set(recoverer.recover(train[is_pirate])) <= set(recoverer.bank)


def test_fitting_and_answering_again_gives_the_same(word_scorer, text_encoder):
    train, test = easy(60, 0), easy(20, 1)
    once, again = (RetrievalRecoverer(word_scorer, encoder=text_encoder).fit(train).recover(test) for _ in range(2))
    assert once == again


def test_it_says_when_it_cannot_answer(word_scorer, text_encoder):
    with pytest.raises(InputError, match="not fitted"):
        RetrievalRecoverer(word_scorer, encoder=text_encoder).recover(easy(2, 0))
    with pytest.raises(InputError, match="no training triples"):
        RetrievalRecoverer(word_scorer, encoder=text_encoder).fit(easy(2, 0).head(0))
    fitted = RetrievalRecoverer(word_scorer, encoder=text_encoder).fit(easy(10, 0))
    with pytest.raises(InputError, match="row 1: rewritten_text is blank"):
        fitted.recover(easy(2, 0).assign(rewritten_text=[" ", "x"]))


def test_it_works_with_the_scorer_the_offline_profile_has(minilm, text_encoder):
    train, test = easy(24, 0), easy(8, 1)
    answers = RetrievalRecoverer(minilm, encoder=text_encoder).fit(train).recover(test)
    assert (np.array(answers) == test["rewrite_prompt"].to_numpy()).mean() > 0.7


# --- all together


def recoverer(scorer, encoder, **decoding) -> EmbeddingRecoverer:
    decoding = DecodingSettings(**({"evaluations": 0, "joined": 2} | decoding))
    return EmbeddingRecoverer(scorer, settings=replace(QUICK, epochs=6), decoding=decoding, encoder=encoder)


@pytest.fixture(scope="module")
def shipped() -> tuple[pd.DataFrame, pd.DataFrame]:
    """60 training triples and 6 of clusters that are not among them."""
    columns = ["id", "original_text", "rewrite_prompt", "rewritten_text"]
    return tuple(shipped_triples([split]).iloc[::9][columns].head(rows) for split, rows in (("train", 60), ("test", 6)))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def whole(minilm, text_encoder, shipped, tmp_path_factory):
    """Fitted on the shipped triples once; its cache is kept for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTREC_CACHE", str(tmp_path_factory.mktemp("predictor")))
        return recoverer(minilm, text_encoder).fit(shipped[0])


@pytest.mark.parametrize("evaluations", [0, 8])
def test_every_row_gets_a_string_within_the_token_budget(whole, minilm, shipped, evaluations):
    whole.decoding = DecodingSettings(evaluations=evaluations, max_tokens=24)
    posterior = whole.posterior(shipped[1])
    answers = whole.recover(shipped[1])
    assert len(answers) == len(shipped[1]) and all(answer.strip() for answer in answers)
    assert all(minilm.count_tokens(answer) <= 24 for answer in answers)
    short = [text for text in whole.bank if minilm.count_tokens(text) <= 24]
    nearest = (posterior.vectors @ minilm.encode(short).T).max(1)
    assert ((posterior.vectors * minilm.encode(answers)).sum(1) >= nearest - 1e-4).all()
    assert set(whole.seconds) == {"fit", "decode"}


def test_more_is_expected_of_an_answer_than_of_another_row_s_or_of_none(whole, shipped):
    whole.decoding = DecodingSettings(evaluations=0)
    answers = whole.recover(shipped[1])
    own, dealt, junk = (
        whole.expected_scs(shipped[1], texts)
        for texts in (answers, answers[1:] + answers[:1], ["Bake a cake"] * len(answers))
    )
    assert own.shape == (len(answers),) and (own > 0).all()
    assert own.mean() > dealt.mean() > junk.mean()


def test_a_table_s_predictions_pull_the_vector_and_join_the_candidates(whole, minilm, shipped):
    whole.decoding = DecodingSettings(evaluations=0, joined=1)
    truth = shipped[1]["rewrite_prompt"].tolist()
    told = shipped[1].assign(prediction=truth)
    plain, pulled = whole.posterior(shipped[1]).vectors, whole.posterior(told).vectors
    gain = scs(pulled, minilm.encode(truth)) - scs(plain, minilm.encode(truth))
    assert gain.mean() > 0.005 and (gain > 0).sum() >= 4
    assert set(truth).isdisjoint(whole.bank)
    whole.answer_trust = 100.0  # then only what resembles the answers counts
    assert whole.recover(told) != whole.recover(shipped[1])
    whole.answer_trust = 4.0
    with pytest.raises(InputError, match="row 2: prediction is blank"):
        whole.recover(told.assign(prediction=[truth[0], " ", *truth[2:]]))


def test_prompts_are_compared_as_minilm_embeds_them_whatever_scores(whole, minilm, cache, word_scorer, text_encoder):
    other = recoverer(word_scorer, text_encoder).fit(easy(20, 0))
    for fitted in (other, recoverer(word_scorer, text_encoder).fit(easy(20, 0))):  # made, then read
        assert np.allclose(fitted.predictor.keys, minilm.encode(other.bank), atol=1e-6)
        assert fitted.vectors.shape[1] == 64
    assert whole.predictor.keys is whole.predictor.bank


def test_the_second_fit_of_the_same_triples_is_read(cache, word_scorer, text_encoder, monkeypatch):
    train, test = easy(20, 0), easy(6, 1)
    first = recoverer(word_scorer, text_encoder).fit(train)
    (kept,) = (cache / "predictors").iterdir()
    monkeypatch.setattr(EmbeddingRecoverer, "_fit", lambda *_: pytest.fail("fitted again"))
    again = recoverer(word_scorer, text_encoder).fit(train)
    believed, read = first.posterior(test), again.posterior(test)
    assert np.array_equal(believed.vectors, read.vectors) and np.array_equal(believed.expected, read.expected)
    assert first.recover(test) == again.recover(test)
    for changed in (train.head(19), train.assign(rewritten_text="other words")):
        with pytest.raises(pytest.fail.Exception, match="fitted again"):
            recoverer(word_scorer, text_encoder).fit(changed)
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(pytest.fail.Exception, match="fitted again"):  # a damaged fit is no fit
        recoverer(word_scorer, text_encoder).fit(train)


def test_what_is_read_is_not_embedded_again_and_is_not_another_scorer_s(cache, word_scorer, text_encoder, monkeypatch):
    train, asked = easy(20, 0), []
    first = recoverer(word_scorer, text_encoder).fit(train)
    monkeypatch.setattr(EmbeddingRecoverer, "_fit", lambda *_: pytest.fail("fitted again"))
    fresh, encode = type(word_scorer)(), word_scorer._encode
    fresh._encode = lambda texts: asked.extend(texts) or encode(texts)
    again = recoverer(fresh, text_encoder).fit(train)
    assert len(asked) == 1 and not {*asked} & {*first.bank}  # the fingerprint
    assert np.array_equal(again.vectors, first.vectors)
    fresh = type(word_scorer)()
    fresh._encode = lambda texts: -encode(texts)  # other weights of the same name
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        recoverer(fresh, text_encoder).fit(train)


def test_without_a_place_to_keep_it_the_fit_still_answers(monkeypatch, tmp_path, word_scorer, text_encoder):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "file"))
    answers = recoverer(word_scorer, text_encoder).fit(easy(12, 0)).recover(easy(3, 1))
    assert len(answers) == 3 and all(answers)


def test_a_scorer_that_cannot_be_searched_is_answered_by_joined_prompts(cache, word_scorer, text_encoder):
    answers = recoverer(word_scorer, text_encoder, evaluations=8).fit(easy(20, 0)).recover(easy(6, 1))
    said = {word for prompt in STYLES for word in prompt.split()}
    assert {word for answer in answers for word in answer.split()} <= said


@pytest.mark.parametrize("column", ["original_text", "rewrite_prompt", "rewritten_text"])
@pytest.mark.parametrize("value", ["  ", None, np.nan])
def test_the_predictor_names_a_training_row_without_text(cache, word_scorer, text_encoder, column, value):
    train = easy(3, 0).astype(object)
    train.loc[1, column] = value
    with pytest.raises(InputError, match=f"row 2: {column} is blank"):
        recoverer(word_scorer, text_encoder).fit(train)


def test_the_predictor_says_when_it_cannot_answer(cache, word_scorer, text_encoder):
    new = recoverer(word_scorer, text_encoder)
    for ask in (new.recover, new.posterior):
        with pytest.raises(InputError, match="not fitted"):
            ask(easy(2, 0))
    with pytest.raises(InputError, match="no training triples"):
        new.fit(easy(2, 0).head(0))
    new.fit(easy(3, 0))  # as few as that will do
    assert len(new.recover(easy(2, 1))) == 2
    with pytest.raises(InputError, match="row 1: rewritten_text is blank"):
        new.recover(easy(2, 0).assign(rewritten_text=[" ", "x"]))
    with pytest.raises(InputError, match="no rows to answer"):
        new.recover(easy(2, 0).head(0))
