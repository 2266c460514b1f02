"""Prompts of unseen clusters are placed, expected scores are what is reached, and a fit comes back as it was saved.

The features are synthetic, so that what can be known is known.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from promptrec import predictor as module
from promptrec.cache import save_arrays
from promptrec.predictor import Posterior, PredictorSettings, PromptPredictor, blend, choose
from promptrec.scoring import scs, unit
from promptrec.splits import SAME_PROMPT

QUICK = PredictorSettings(
    folds=2, epochs=12, batch_size=32, hidden=48, learning_rate=3e-3, dropout=0.3, input_dropout=0.2
)


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
    assert predictor.held_out == pytest.approx(reached.mean(), abs=0.1)
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
    assert len(predictor.heads) == QUICK.folds + 1


def test_a_predictor_comes_back_exactly_from_what_was_saved(tmp_path):
    predictor, (flat, directions, *_) = fitted(clusters=20, rows=60), synthetic(10, 20, seed=2)
    save_arrays(tmp_path / "state.npz", **predictor.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        loaded = PromptPredictor.load(dict(saved), QUICK)
    believed, again = predictor.predict(flat, directions), loaded.predict(flat, directions)
    for name in ("weights", "bank", "expected"):
        assert np.array_equal(getattr(believed, name), getattr(again, name)), name


def test_where_the_scorer_finds_all_prompts_alike_another_encoder_s_keys_tell_them_apart(tmp_path):
    def as_scored(vectors: np.ndarray) -> np.ndarray:  # cosines from .75 up, as sentence-t5 has them
        return np.concatenate([np.full((len(vectors), 1), 0.75**0.5), 0.5 * vectors], axis=1).astype(np.float32)

    flat, directions, prompts, numbers = synthetic(80, 640, seed=1)
    bank, (unseen, pointing, truth, _) = np.unique(prompts, axis=0), synthetic(40, 200, seed=2)
    believed = {}
    for name, keys in (("without", None), ("with", (prompts, bank))):
        predictor = PromptPredictor(QUICK).fit(flat, directions, as_scored(prompts), as_scored(bank), numbers, keys)
        save_arrays(tmp_path / f"{name}.npz", **predictor.state())
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as saved:
            loaded = PromptPredictor.load(dict(saved), QUICK)
        believed[name] = loaded.predict(unseen, pointing)
        assert np.array_equal(believed[name].weights, predictor.predict(unseen, pointing).weights)
    reached = {name: scs(unit(one.weights @ bank), truth).mean() for name, one in believed.items()}
    same = scs(fitted().predict(unseen, pointing).vectors, truth).mean()
    assert reached["with"] > reached["without"] + 0.05 and reached["with"] > same - 0.05
    assert (
        scs(believed["with"].vectors, as_scored(truth)).mean()
        > scs(believed["without"].vectors, as_scored(truth)).mean()
    )


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
    asked, build = [], module._head

    def watched(*given):
        head = build(*given)
        head.register_forward_hook(lambda head, given, answer: asked.append((head.training, *given[2:], answer)))
        return head

    monkeypatch.setattr(module, "_head", watched)
    flat, directions, prompts, numbers = synthetic(12, 48, seed=1)
    near = unit(prompts[:12] + np.float32(0.05))  # a second wording of each
    bank = np.concatenate([prompts[:12], near])
    assert (np.einsum("nd,nd->n", prompts[:12], near) >= SAME_PROMPT).all()
    predictor = PromptPredictor(QUICK).fit(flat, directions, prompts, bank, numbers)
    fitting, held = [ask for ask in asked if ask[0]], [ask for ask in asked if not ask[0]]
    assert fitting and held
    for _, _, hidden, scores in asked:
        assert (hidden.sum(1) >= 2).all() and float(scores.detach().softmax(-1)[hidden].max()) == 0
        assert hidden.any(0).sum() <= 24 and not hidden.all(1).any()
    assert {tuple(row) for ask in asked for row in ask[2].tolist()} == {
        tuple(row) for row in (prompts @ bank.T >= SAME_PROMPT).tolist()
    }
    asked.clear()
    predictor.predict(flat, directions)
    assert asked and all(hidden is None for _, _, hidden, _ in asked)


# --- choosing and blending


def random_posterior(rows: int, width: int, seed: int, bank: int = 7) -> Posterior:
    rng = np.random.default_rng(seed)
    prompts = unit(rng.normal(size=(bank, width)) + 0.5)
    return Posterior(rng.dirichlet(np.ones(bank), size=rows), prompts, rng.uniform(1e-4, 1, size=rows))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_never_expected_to_score_less_than_the_nearest_candidate(seed):
    rng = np.random.default_rng([seed, 1])
    posterior = random_posterior(int(rng.integers(1, 30)), int(rng.integers(2, 20)), seed)
    candidates = unit(rng.normal(size=(int(rng.integers(1, 40)), posterior.bank.shape[1])))
    expected, rows = posterior.values(candidates), np.arange(len(posterior.weights))
    nearest = (posterior.vectors @ candidates.T).argmax(1)
    assert (expected[rows, choose(posterior, candidates)] >= expected[rows, nearest]).all()
    chosen, near = (posterior.expected_scs(candidates[places]) for places in (choose(posterior, candidates), nearest))
    assert (chosen >= near - 1e-12).all()  # calibrated, too


def test_the_choice_is_not_always_the_nearest_one():
    bank = unit(np.array([[1.0, 0.1], [1.0, 0.1], [0.0, 1.0]]))
    posterior = Posterior(np.array([[0.3, 0.3, 0.4]]), bank, np.ones(1))
    candidates = np.stack([bank[0], unit(bank.sum(0))])
    assert (posterior.vectors @ candidates.T).argmax(1) == [1] and choose(posterior, candidates) == [0]


def test_the_vector_itself_is_expected_to_reach_what_the_calibration_says():
    posterior = random_posterior(6, 8, 0)
    assert posterior.expected_scs(posterior.vectors) == pytest.approx(posterior.expected)


def test_a_row_s_values_are_its_line_of_all_values():
    posterior, candidates = random_posterior(5, 8, 0), unit(np.random.default_rng(3).normal(size=(9, 8)))
    for row in range(5):
        assert posterior.value(row, candidates) == pytest.approx(posterior.values(candidates)[row])


def random_answers(seed: int, rows: int, methods: int, width: int) -> np.ndarray:
    return unit(np.random.default_rng([seed, 2]).normal(size=(rows, methods, width))).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_a_blend_moves_towards_the_answers_the_more_they_are_trusted(seed):
    posterior, answers = random_posterior(30, 12, seed), random_answers(seed, 30, 1, 12)
    blends = [blend(posterior, answers, [trust]) for trust in (0, 2, 6, 20, 500)]
    assert all(np.isfinite(one.weights).all() for one in blends)
    assert blends[0].weights == pytest.approx(posterior.weights)
    nearness = [(one.vectors * answers[:, 0]).sum(1) for one in blends]
    assert all((after > before).all() for before, after in pairwise(nearness))
    assert [one.shares.sum() for one in blends] == pytest.approx([0, 2 / 26, 6 / 30, 20 / 44, 500 / 524])


@pytest.mark.parametrize("seed", range(5))
def test_in_a_blend_answers_count_as_prompts_of_the_row_alone_in_any_order(seed):
    posterior, answers = random_posterior(6, 8, seed), random_answers(seed, 6, 3, 8)
    blended, turned = blend(posterior, answers, [4, 0, 2]), blend(posterior, answers[:, ::-1], [2, 0, 4])
    assert blended.weights.sum(1) + blended.shares.sum() == pytest.approx(np.ones(6))
    assert blended.vectors == pytest.approx(turned.vectors, abs=1e-6)
    candidates = unit(np.random.default_rng(seed).normal(size=(9, 8)))
    for row in range(6):
        weights = np.concatenate([blended.weights[[row]], blended.shares[None]], axis=1)
        alone = Posterior(weights, np.concatenate([posterior.bank, answers[row]]))
        assert blended.of([row]).vectors == pytest.approx(alone.vectors, abs=1e-6)
        assert blended.value(row, candidates) == pytest.approx(alone.value(0, candidates), abs=1e-6)
        own = blended.own_values(blended.vectors)[row]
        assert own == pytest.approx(alone.own_values(alone.vectors)[0], abs=1e-6)
        assert own == pytest.approx(blended.value(row, blended.vectors[[row]])[0], abs=1e-6)


def test_answers_are_compared_by_the_keys_where_there_are_any():
    posterior, answers = random_posterior(6, 8, 0), random_answers(0, 6, 2, 8)
    scored = Posterior(posterior.weights, unit(posterior.bank + 3))  # a scorer that finds all prompts alike
    blended = blend(scored, unit(answers + 3), [4, 1], keys=(answers, posterior.bank))
    assert blended.weights == pytest.approx(blend(posterior, answers, [4, 1]).weights, abs=1e-6)
    assert np.array_equal(blended.bank, scored.bank) and np.array_equal(blended.answers, unit(answers + 3))
