"""Rewards: what earns, what cannot, which rows are asked, and what is trained on them."""

import numpy as np
import pandas as pd
import pytest
import torch

from promptrec import rewards
from promptrec.errors import InputError
from promptrec.language_model import TINY_GEMMA, GenerationSettings, generate
from promptrec.profiles import override
from promptrec.scoring import Scorer

QUICK = rewards.TuningSettings(rows=4, words=8, new_tokens=4)


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
    model, _ = rewards.tunable(TINY_GEMMA, adapter, QUICK, reference=True)
    weights = dict(model.named_parameters())
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert trained == {name for name in weights if ".default." in name}
    assert all(torch.equal(weights[name], weights[name.replace(".default.", ".ref.")]) for name in trained)
    assert not [part for part in model.modules() if isinstance(part, torch.nn.Dropout) and part.p]
