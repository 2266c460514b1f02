"""Recovery without a language model: it fits, beats a constant where the task is easy, and says when it cannot answer.

The predictor is tried on synthetic features, where what can be known is known; the whole on shipped triples.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from promptrec import embedding
from promptrec.data import shipped_triples
from promptrec.embedding import (
    DecodingSettings,
    EmbeddingRecoverer,
    Posterior,
    PredictorSettings,
    PromptPredictor,
    RetrievalRecoverer,
    blend,
    choose,
    join_prompts,
    pair_features,
)
from promptrec.errors import InputError
from promptrec.inference import best_constant
from promptrec.scoring import scs
from promptrec.search_encoders import encoder_of
from promptrec.splits import SAME_PROMPT
from promptrec.text_features import save_arrays, unit

QUICK = PredictorSettings(folds=2, epochs=12, batch_size=32, hidden=48, learning_rate=3e-3)

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


# --- the predictor


def synthetic(clusters: int, rows: int, seed: int, noise: float = 0.2, width: int = 16) -> tuple[np.ndarray, ...]:
    """Flat features, directions, prompts and cluster numbers of rows whose features are a fixed turn of the prompt.

    Noise differs from row to row, up to `noise`, so that some prompts can be told better than others.
    """
    turn = np.random.default_rng(0).normal(size=(width, 24)) / np.sqrt(width)
    rng = np.random.default_rng([seed, 1])
    prompts = unit(rng.normal(size=(clusters, width)) + 0.6)  # prompts resemble each other, as real ones do
    numbers = np.arange(rows) % clusters
    each = prompts[numbers]
    spread = noise * rng.random((rows, 1))
    flat = 2 * (each @ turn) + spread * rng.normal(size=(rows, 24))
    directions = unit(each[:, None] + 3 * spread[..., None] * rng.normal(size=(rows, 3, width)))
    return (*(table.astype(np.float32) for table in (flat, directions, each)), numbers)


def fitted(settings: PredictorSettings = QUICK, clusters: int = 80, rows: int = 640, **how) -> PromptPredictor:
    flat, directions, prompts, numbers = synthetic(clusters, rows, seed=1, **how)
    return PromptPredictor(settings).fit(flat, directions, prompts, np.unique(prompts, axis=0), numbers)


def test_prompts_of_unseen_clusters_are_predicted_better_than_by_the_mean():
    *_, known, _ = synthetic(80, 640, seed=1)
    flat, directions, truth, _ = synthetic(40, 200, seed=2)
    assert (truth @ known.T).max() < 0.97  # no test prompt is a training prompt
    believed = fitted().predict(flat, directions)
    assert np.linalg.norm(believed.vectors, axis=1) == pytest.approx(np.ones(200), abs=1e-5)
    assert believed.weights.sum(1) == pytest.approx(np.ones(200), abs=1e-4)
    mean = np.broadcast_to(unit(known.mean(0)), truth.shape)
    assert scs(believed.vectors, truth).mean() > scs(mean, truth).mean() + 0.25


def test_the_expected_score_is_about_what_is_reached_on_unseen_clusters():
    predictor = fitted(noise=1.5)
    flat, directions, truth, _ = synthetic(60, 600, seed=3, noise=1.5)
    believed = predictor.predict(flat, directions)
    reached = scs(believed.vectors, truth)
    assert believed.expected.mean() == pytest.approx(reached.mean(), abs=0.1)
    assert predictor.held_out[0] == pytest.approx(reached.mean(), abs=0.1)
    assert (believed.expected > 0).all() and (believed.expected <= 1).all()


def test_the_same_seed_predicts_the_same_and_another_does_not():
    flat, directions, *_ = synthetic(10, 20, seed=2)
    first, again, other = (
        fitted(replace(QUICK, seed=seed), clusters=20, rows=60).predict(flat, directions) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.vectors, again.vectors) and np.array_equal(first.expected, again.expected)
    assert not np.allclose(first.vectors, other.vectors, atol=1e-3)


def test_fitting_again_forgets_the_first_fit():
    given, clusters = synthetic(20, 60, seed=1)[:3], np.arange(60) % 20
    predictor = PromptPredictor(QUICK)
    for _ in range(2):
        predictor.fit(*given, given[2], clusters)
    assert len(predictor.heads) == QUICK.folds


def test_a_predictor_comes_back_exactly_from_what_was_saved(tmp_path):
    predictor, (flat, directions, *_) = fitted(clusters=20, rows=60), synthetic(10, 20, seed=2)
    save_arrays(tmp_path / "state.npz", **predictor.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        loaded = PromptPredictor.load(dict(saved), QUICK)
    believed, again = predictor.predict(flat, directions), loaded.predict(flat, directions)
    for name in ("vectors", "weights", "expected"):
        assert np.array_equal(getattr(believed, name), getattr(again, name)), name


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_one_prompt_is_enough_to_fit_on(rows):
    flat, directions, prompts, numbers = synthetic(1, rows, seed=1)
    predictor = PromptPredictor(QUICK).fit(flat, directions, prompts, prompts[:1], numbers)
    believed = predictor.predict(flat, directions)
    assert np.isfinite(believed.vectors).all() and np.isfinite(believed.expected).all()
    assert believed.weights == pytest.approx(np.ones((rows, 1)))


@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_any_number_of_steps_can_be_trained(epochs):
    predictor = fitted(replace(QUICK, epochs=epochs, batch_size=64), clusters=10, rows=20)
    assert np.isfinite(predictor.held_out).all()


def test_in_training_every_prompt_near_the_true_one_is_hidden(monkeypatch):
    asked, build = [], embedding._head

    def watched(*given):
        head = build(*given)
        head.register_forward_hook(lambda head, given, answer: asked.append((head.training, *given[2:], answer[3])))
        return head

    monkeypatch.setattr(embedding, "_head", watched)
    flat, directions, prompts, numbers = synthetic(12, 48, seed=1)
    near = unit(prompts[:12] + np.float32(0.05))  # a second wording of each
    bank = np.concatenate([prompts[:12], near])
    assert (np.einsum("nd,nd->n", prompts[:12], near) >= SAME_PROMPT).all()
    predictor = PromptPredictor(QUICK).fit(flat, directions, prompts, bank, numbers)
    fitting, held = [ask for ask in asked if ask[0]], [ask for ask in asked if not ask[0]]
    assert fitting and held
    for _, _, hidden, weights in asked:
        assert (hidden.sum(1) >= 2).all() and float(weights.detach()[hidden].max()) == 0
        assert hidden.any(0).sum() <= 24 and not hidden.all(1).any()
    assert {tuple(row) for ask in asked for row in ask[2].tolist()} == {
        tuple(row) for row in (prompts @ bank.T >= SAME_PROMPT).tolist()
    }
    asked.clear()
    predictor.predict(flat, directions)
    assert asked and all(hidden is None for _, _, hidden, _ in asked)


# --- choosing and blending


def random_posterior(rows: int, width: int, seed: int) -> Posterior:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(5), size=rows)
    return Posterior(unit(rng.normal(size=(rows, width))), weights, rng.uniform(1e-4, 1, size=rows))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_never_expected_to_score_less_than_the_nearest_candidate(seed):
    rng = np.random.default_rng([seed, 1])
    posterior = random_posterior(int(rng.integers(1, 30)), int(rng.integers(2, 20)), seed)
    candidates = unit(rng.normal(size=(int(rng.integers(1, 40)), posterior.vectors.shape[1])))
    expected, rows = posterior.expected_scs(candidates), np.arange(len(posterior.vectors))
    nearest = (posterior.vectors @ candidates.T).argmax(1)
    assert (expected[rows, choose(posterior, candidates)] >= expected[rows, nearest]).all()
    assert (expected >= 0).all() and (expected <= posterior.expected[:, None] + 1e-9).all()


def test_the_vector_itself_is_expected_to_reach_what_the_calibration_says():
    posterior = random_posterior(6, 8, 0)
    assert np.diag(posterior.expected_scs(posterior.vectors)) == pytest.approx(posterior.expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_blend_moves_towards_the_answers_the_more_the_heavier_they_weigh(seed):
    posterior = random_posterior(30, 12, seed)
    answers = unit(np.random.default_rng([seed, 2]).normal(size=(30, 12)))
    moved = [(blend(posterior, answers, weight).vectors * answers).sum(1) for weight in (0, 0.3, 0.6, 5)]
    assert moved[0] == pytest.approx((posterior.vectors * answers).sum(1))
    assert all((after > before).all() for before, after in pairwise(moved))
    assert np.linalg.norm(blend(posterior, answers, 0.5).vectors, axis=1) == pytest.approx(np.ones(30))


# --- from vector to string


@pytest.mark.parametrize("joined", [1, 2, 4])
def test_joining_never_leads_away_from_the_vector(word_scorer, joined):
    bank = [*STYLES, "Make it rhyme", "Use a calm tone", "Turn this into a letter", "Explain the words"]
    vectors = word_scorer.encode(bank)
    posterior = random_posterior(25, 64, joined)
    posterior = replace(posterior, vectors=unit(np.abs(posterior.vectors)).astype(np.float32))
    start = (posterior.vectors @ vectors.T).max(1)
    texts, reached = join_prompts(posterior, bank, vectors, word_scorer, DecodingSettings(joined=joined))
    nearness = (posterior.vectors * word_scorer.encode(texts)).sum(1)
    assert (nearness >= start - 1e-6).all()
    assert nearness == pytest.approx((posterior.vectors * reached).sum(1), abs=1e-6)
    assert (joined > 1) == (nearness.mean() > start.mean() + 0.01)


def test_joining_finds_the_two_prompts_that_a_vector_is_made_of(word_scorer):
    bank = list(STYLES)
    target = word_scorer.encode([f"{bank[0]} {bank[3]}"])
    posterior = Posterior(target, np.ones((1, 4)) / 4, np.ones(1))
    (text,), _ = join_prompts(posterior, bank, word_scorer.encode(bank), word_scorer, DecodingSettings(joined=2))
    assert sorted(text.split()) == sorted(f"{bank[0]} {bank[3]}".split())


def test_a_bank_of_one_prompt_is_joined_with_nothing_else(word_scorer):
    posterior = random_posterior(3, 64, 0)
    texts, _ = join_prompts(
        posterior, ["Only this"], word_scorer.encode(["Only this"]), word_scorer, DecodingSettings()
    )
    assert {word for text in texts for word in text.split()} == {"Only", "this"}


def test_what_exceeds_the_token_budget_is_neither_chosen_nor_joined(minilm):
    bank = ["Make it rhyme", "Use a calm tone", "Explain the words of the letter", "very long prompt " * 30]
    settings = DecodingSettings(joined=3, max_tokens=9, evaluations=0)
    long = minilm.encode(["very long prompt " * 30, "Make it rhyme Use a calm tone Explain the words of the letter"])
    posterior = Posterior(long, np.ones((2, 4)) / 4, np.ones(2))
    texts, _ = join_prompts(posterior, bank, minilm.encode(bank), minilm, settings)
    assert all(encoder_of(minilm).count_tokens(text) <= 9 for text in texts)


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
    assert all(encoder_of(minilm).count_tokens(answer) <= 24 for answer in answers)
    nearest = (posterior.vectors @ whole.vectors.T).max(1)
    assert ((posterior.vectors * minilm.encode(answers)).sum(1) >= nearest - 1e-4).all()
    assert set(whole.seconds) == {"fit", "decode"}


def test_searching_brings_the_strings_nearer(whole, minilm, shipped):
    posterior, nearness = whole.posterior(shipped[1]), []
    for evaluations in (0, 8):
        whole.decoding = DecodingSettings(evaluations=evaluations, joined=1)
        nearness.append((posterior.vectors * minilm.encode(whole.decode(posterior))).sum(1))
    assert (nearness[1] >= nearness[0] - 1e-5).all() and nearness[1].mean() > nearness[0].mean()


def test_a_table_s_predictions_pull_the_vector_and_join_the_candidates(whole, minilm, shipped):
    whole.decoding = DecodingSettings(evaluations=0, joined=1)
    truth = shipped[1]["rewrite_prompt"].tolist()
    told = shipped[1].assign(prediction=truth)
    plain, pulled = whole.posterior(shipped[1]).vectors, whole.posterior(told).vectors
    assert ((pulled - plain) * minilm.encode(truth) > 0).sum(1).min() > 0
    assert (scs(pulled, minilm.encode(truth)) > scs(plain, minilm.encode(truth))).all()
    whole.answer_weight = 50.0
    assert whole.recover(told) == truth
    whole.answer_weight = 0.5
    with pytest.raises(InputError, match="row 2: prediction is blank"):
        whole.recover(told.assign(prediction=[truth[0], " ", *truth[2:]]))


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
