"""Rewards, pairs, RLOO and DPO on the tiny Gemma: what is learned, what cannot be earned, and what is said."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from promptrec import preferences, rewards
from promptrec.data import shipped_triples
from promptrec.errors import InputError
from promptrec.inference import CURRENT, LanguageModelRecoverer
from promptrec.language_model import GenerationSettings, generate, load_model, load_tokenizer, token_ids
from promptrec.lora import LoraSettings, attach_adapter
from promptrec.methods import Task
from promptrec.profiles import ASSETS, get_profile, override
from promptrec.scoring import Scorer

BASE = str(ASSETS / "tiny-gemma")
QUICK = preferences.DPOSettings(
    rows=4, words=8, samples=2, new_tokens=4, steps=2, rows_a_step=2, at_once=4, evaluate_every=1, watched_rows=2,
    fitted_rows=12, least_gap=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that does something: its numbers are random."""
    folder = tmp_path_factory.mktemp("adapter")
    model = attach_adapter(load_model(BASE), LoraSettings(rank=2, alpha=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    return shipped_triples(["train"]).drop_duplicates("rewrite_prompt").head(20)


@pytest.fixture
def tuned(adapter):
    return rewards.tunable(BASE, adapter, QUICK)


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


# ------------------------------------------------------------------------------------------------ rewards


class Opposed(Scorer):
    """A scorer to which two prompts can be opposed: one number a text, the sign of its first word."""

    def _encode(self, texts):
        return np.array([[1.0 if text.startswith("Do") else -1.0] for text in texts])


def test_an_answer_earns_its_score_and_never_less_than_nothing(word_scorer):
    truth = "Rewrite it as a poem"
    reward = rewards.ScsReward(word_scorer)
    assert reward([truth, f"**{truth}**", "Rewrite it as a song"], [truth] * 3) == pytest.approx([1, 1, 0.8**3])
    assert rewards.ScsReward(Opposed())(["Do it", "Never"], ["Do that"] * 2).tolist() == [1.0, 0.0]


def test_blank_answers_and_banned_words_earn_nothing(word_scorer):
    truth = "Improve the text lucrarea"
    answers = ["", " \n", "<b>", truth, "Improve the text LUCRAREA", "Improve the text </s>", "Improve the text"]
    earned = rewards.ScsReward(word_scorer)(answers, [truth] * len(answers))
    assert (earned[:6] == 0).all() and earned[6] > 0.5


def test_what_is_banned_is_not_generated(tuned):
    model, tokenizer = tuned
    ask = lambda: generate(model, tokenizer, ["Say it"], GenerationSettings(6))[0]  # noqa: E731
    word = ask().split()[0]
    rewards.ready(model, tokenizer, override(QUICK, banned=(word,)))
    assert word not in ask().split()
    assert rewards.banned_ids(tokenizer, ()) is None
    spelt = [tokenizer.decode(ids).strip() for ids in rewards.banned_ids(tokenizer, ("lucrarea",))]
    assert spelt == ["lucrarea", "lucrarea"]


def test_rows_asked_are_of_distinct_prompts_short_and_the_same_for_a_seed(train):
    twice = pd.concat([train, train.assign(id=train["id"] + "-2")], ignore_index=True)
    one, again, other = (rewards.asked(twice, "gemma", override(QUICK, rows=15, seed=seed)) for seed in (0, 0, 1))
    assert len(one) == 15 == one["rewrite_prompt"].nunique()
    assert one["id"].tolist() == again["id"].tolist() != other["id"].tolist()
    longest = one["request"].str.split().str.len().max()
    assert (
        longest
        <= 2 * QUICK.words + len(["Original:", "Rewritten:", "What", "instruction", "turned", "the", "original"]) + 10
    )


def test_rows_that_cannot_be_asked_are_refused(train):
    with pytest.raises(InputError, match="no training triples"):
        rewards.asked(train.head(0), "gemma", QUICK)
    with pytest.raises(InputError, match="rewrite_prompt"):
        rewards.asked(train.drop(columns="rewrite_prompt"), "gemma", QUICK)


def test_only_the_policy_is_trained_and_the_reference_is_its_copy(adapter):
    model, _ = rewards.tunable(BASE, adapter, QUICK, reference=True)
    weights = dict(model.named_parameters())
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert trained == {name for name in weights if ".default." in name}
    assert all(torch.equal(weights[name], weights[name.replace(".default.", ".ref.")]) for name in trained)
    assert not [part for part in model.modules() if isinstance(part, torch.nn.Dropout) and part.p]


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
