"""Pairs, RLOO and DPO on the tiny Gemma: what is learned, what cannot be earned, and what is said."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from promptrec import preferences, rewards
from promptrec.errors import InputError
from promptrec.inference import CURRENT, LanguageModelRecoverer
from promptrec.language_model import GenerationSettings, load_tokenizer, token_ids
from promptrec.methods import Task
from promptrec.profiles import ASSETS, get_profile, override

BASE = str(ASSETS / "tiny-gemma")
QUICK = preferences.DPOSettings(
    rows=4, words=8, samples=2, new_tokens=4, steps=2, rows_a_step=2, at_once=4, evaluate_every=1, watched_rows=2,
    fitted_rows=12, least_gap=0.0,
)  # fmt: skip


@pytest.fixture
def task(adapter, train, monkeypatch, tmp_path):
    names = ("rows", "words", "samples", "new_tokens", "steps", "rows_a_step", "at_once")
    small = {
        name: getattr(QUICK, name) for name in (*names, "evaluate_every", "watched_rows", "fitted_rows", "least_gap")
    }
    monkeypatch.setenv("PROMPTREC_SETTINGS", json.dumps(small))
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path))
    return Task(get_profile("local"), train, train.tail(3), adapter)


class Wanted:
    """A reward for a letter."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def __call__(self, answers, truth) -> np.ndarray:
        return np.array([float(self.letter in answer) for answer in answers])


# ------------------------------------------------------------------------------------------------ TRL's view


def test_the_trainer_reads_a_request_as_the_recoverer_does_and_ends_answers_alike(train):
    tokenizer = preferences.trainer_tokenizer(BASE, "gemma")
    plain = load_tokenizer(BASE)
    for request in rewards.asked(train, "gemma", QUICK)["request"]:
        assert tokenizer(preferences.begun(tokenizer, request))["input_ids"] == token_ids(plain, request)
    assert tokenizer.eos_token_id == plain.convert_tokens_to_ids("<end_of_turn>") != plain.eos_token_id


def test_rloo_raises_the_share_of_answers_that_earn(tuned, train):
    settings = preferences.RLOOSettings(
        rows=2, words=4, samples=8, new_tokens=3, steps=8, rows_a_step=2, learning_rate=5e-3, beta=0.0
    )
    rows = rewards.asked(train, "gemma", settings)
    history = preferences.rloo(tuned[0], preferences.trainer_tokenizer(BASE, "gemma"), rows, Wanted("e"), settings)
    assert [point["step"] for point in history] == list(range(1, 9))
    means = [point["mean"] for point in history]
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.15
    assert history[0]["low"] <= means[0] <= history[0]["high"]


def test_rloo_starts_at_its_reference_and_leaves_it(tuned, train):
    settings = preferences.RLOOSettings(
        rows=2, words=4, samples=2, new_tokens=3, steps=3, rows_a_step=2, at_once=2, learning_rate=1e-2
    )
    history = preferences.rloo(
        tuned[0],
        preferences.trainer_tokenizer(BASE, "gemma"),
        rewards.asked(train, "gemma", settings),
        Wanted("e"),
        settings,
    )
    assert history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert max(abs(point["kl"]) for point in history[1:]) > 1e-4


def test_rloo_says_when_a_step_cannot_be_shared_out(tuned, train):
    settings = override(preferences.RLOOSettings(), rows=3, words=4, rows_a_step=3, samples=2, at_once=4)
    with pytest.raises(InputError, match="at_once=4"):
        preferences.rloo(tuned[0], tuned[1], rewards.asked(train, "gemma", settings), Wanted("e"), settings)


# ------------------------------------------------------------------------------------------------ pairs and DPO


def test_pairs_are_best_against_worst_and_ties_are_dropped():
    rows = pd.DataFrame({"request": ["a", "b", "c"]})
    answers = np.array([["x", "y", "z"], ["p", "q", "r"], ["k", "l", "m"]], dtype=object)
    earned = np.array([[0.1, 0.5, 0.0], [0.2, 0.2, 0.21], [0.9, 0.3, 0.4]])
    pairs = preferences.ranked_pairs(rows, answers, earned, least_gap=0.05)
    assert pairs.to_dict("list") == {"prompt": ["a", "c"], "chosen": ["y", "k"], "rejected": ["z", "l"]}
    with pytest.raises(InputError, match="lower least_gap"):
        preferences.ranked_pairs(rows, answers, earned, least_gap=2.0)


def test_an_answer_that_was_cut_off_is_never_the_better_one(tuned, train, word_scorer, monkeypatch):
    rows, settings = rewards.asked(train, "gemma", override(QUICK, rows=1)), override(QUICK, samples=2, new_tokens=6)
    truth = rows["rewrite_prompt"].iloc[0]
    monkeypatch.setattr(
        preferences, "generate", lambda *_, **__: [f"{truth} and so on and on and on", " ".join(truth.split()[:2])]
    )
    pairs = preferences.own_pairs(*tuned, rows, rewards.ScsReward(word_scorer), "gemma", settings)
    assert pairs["rejected"].tolist() == [f"{truth} and so on and on and on"]


def test_another_models_guess_is_rejected_for_the_truth(train, minilm, monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path))
    settings = override(QUICK, least_gap=0.01)
    rows = rewards.asked(train, "gemma", settings)
    pairs = preferences.other_pairs(train, rows, rewards.ScsReward(minilm), settings)
    assert pairs["chosen"].tolist() == rows["rewrite_prompt"].tolist()
    assert not set(pairs["rejected"]) & set(rows["rewrite_prompt"]) and set(pairs["rejected"]) <= set(
        train["rewrite_prompt"]
    )


def test_dpo_starts_at_ln_2_and_learns_to_prefer(tuned, train, word_scorer):
    settings = override(QUICK, steps=8, learning_rate=3e-3)
    rows = rewards.asked(train, "gemma", settings)
    pairs = pd.DataFrame({"prompt": rows["request"], "chosen": rows["rewrite_prompt"], "rejected": "Nothing at all"})
    model, tokenizer = tuned
    greedy = LanguageModelRecoverer(model, tokenizer, "held out", adapter=CURRENT, settings=GenerationSettings(4))
    watch = preferences.Watch(greedy, train.tail(2), rewards.ScsReward(word_scorer), every=4)
    history = preferences.dpo(model, preferences.trainer_tokenizer(BASE, "gemma"), pairs, watch, settings)
    by_step = {point["step"]: point for point in history}
    assert by_step[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are one
    assert by_step[8]["accuracy"] == 1 and by_step[8]["margin"] > 0.5 and by_step[8]["loss"] < 0.5
    assert [step for step in by_step if "mean" in by_step[step]] == [0, 4, 8]


def test_dpo_says_when_a_step_cannot_be_shared_out(tuned):
    settings = override(QUICK, rows_a_step=3, at_once=2)
    with pytest.raises(InputError, match="at_once=2 does not divide 3"):
        preferences.dpo(*tuned, pd.DataFrame(), None, settings)


# ------------------------------------------------------------------------------------------------ as methods


@pytest.mark.parametrize(
    ("builder", "options", "name"),
    [("build_rloo", {}, "rloo"), ("build_dpo", {}, "dpo"), ("build_dpo", {"pairs": "other"}, "dpo-other")],
)
def test_a_method_answers_every_row_and_tells_how_it_learned(task, train, builder, options, name):
    one = getattr(preferences, builder)(task, **options)
    answers = one.recover(train.tail(4)[["original_text", "rewritten_text"]])
    assert one.name == name and len(answers) == 4 and all(answer.strip() for answer in answers)
    assert [point["step"] for point in one.history if point["step"]] == [1, 2]
    json.dumps(one.history)  # a result file can hold it
    told = [point for point in one.history if "mean" in point]
    assert told and all(0 <= point["low"] <= point["mean"] <= point["high"] <= 1 for point in told)


def test_the_same_seed_gives_the_same_run(task, train):
    one, again = (preferences.build_rloo(task) for _ in range(2))
    assert one.history == again.history
    table = train.tail(4)[["original_text", "rewritten_text"]]
    assert one.recover(table) == again.recover(table)


def test_what_cannot_be_started_is_said(task, tmp_path):
    with pytest.raises(InputError, match="own or other"):
        preferences.build_dpo(task, pairs="mine")
    with pytest.raises(InputError, match="run Part 2"):
        preferences.build_rloo(Task(task.profile, task.train, task.validation, tmp_path / "none"))
