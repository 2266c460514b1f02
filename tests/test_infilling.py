"""Filling in prompts with a masked language model: what it reads, what it learns, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from promptrec.data import shipped_triples
from promptrec.errors import InputError
from promptrec.infilling import BERT, InfillingRecoverer, InfillingSettings, SoftScorer, build
from promptrec.methods import Task
from promptrec.profiles import get_profile
from promptrec.small_models import frame
from promptrec.submission import FALLBACK

QUICK = InfillingSettings(steps=2, batch_size=4, kept_layers=1, trained_layers=1, max_tokens=48, lengths_tried=2)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def triples():
    return shipped_triples(["train"]).head(24), shipped_triples(["test"]).head(5)


@pytest.fixture(scope="module")
def fitted(triples) -> InfillingRecoverer:
    return InfillingRecoverer(QUICK).fit(triples[0])


@pytest.fixture(scope="module")
def soft_scorer() -> SoftScorer:
    return SoftScorer()


def test_what_the_model_reads_is_the_paper_s_sequence(fitted):
    (original,), (rewritten,) = fitted._ids(["A cat sat."], 9), fitted._ids(["Ahoy, a cat."], 9)
    said = fitted.tokenizer.decode(frame(original, rewritten, fitted.task + [fitted.tokenizer.mask_token_id] * 2, 99))
    assert said == (
        "a cat sat.. the task is to rewrite this narrative with the given blanks : [MASK] [MASK] ahoy, a cat."
    )


def test_certain_tokens_score_what_their_text_scores(soft_scorer, minilm):
    texts, true = ["Turn it into a haiku", "Make this formal"], ["Write it as a poem", "Turn this into a list"]
    ids = soft_scorer.tokenizer(texts, add_special_tokens=False)["input_ids"]
    used = np.unique(np.concatenate(ids))
    places = torch.from_numpy(np.searchsorted(used, np.concatenate(ids)))
    shares = torch.nn.functional.one_hot(places, len(used)).float()
    soft = soft_scorer(shares, used, [len(row) for row in ids], torch.from_numpy(minilm.encode(true)))
    assert soft.numpy() == pytest.approx(minilm.scs(texts, true), abs=1e-4)


def test_the_soft_score_can_be_climbed(soft_scorer, minilm):
    words = soft_scorer.tokenizer("turn this into a pirate poem song list", add_special_tokens=False)["input_ids"]
    used, logits = np.unique(words), torch.zeros(3, len(words), requires_grad=True)
    truth = torch.from_numpy(minilm.encode(["a pirate song"]))
    optimizer, scores = torch.optim.Adam([logits], 0.5), []
    for _ in range(20):
        score = soft_scorer(logits.softmax(-1), used, [3], truth)
        optimizer.zero_grad()
        (-score.sum()).backward()
        optimizer.step()
        scores.append(score.item())
    assert scores[-1] > scores[0] + 0.2
    assert "pirate" in soft_scorer.tokenizer.decode(used[logits.argmax(-1).numpy()])


@pytest.mark.parametrize(
    "changes",
    [{}, {"length": "likelihood"}, {"length": "likelihood", "shown": 0.9, "passes": 3}, {"scs_share": 0.5}],
    ids=["drawn", "likelihood", "iterative", "scs"],
)
def test_every_variant_answers_every_row_and_again_the_same(triples, changes):
    train, test = triples
    once, again = (InfillingRecoverer(replace(QUICK, **changes)).fit(train) for _ in range(2))
    answers = once.recover(test.drop(columns="rewrite_prompt"))
    assert len(answers) == len(test) and all(answer.strip() for answer in answers)
    assert once.losses == again.losses and len(once.losses) == 2
    assert again.recover(test) == answers  # the true prompt is not looked at


def test_another_seed_gives_another_model(fitted, triples):
    assert InfillingRecoverer(replace(QUICK, seed=1)).fit(triples[0]).losses != fitted.losses


def test_it_learns_the_few_rows_it_is_shown():
    train = shipped_triples(["train"]).head(2)
    settings = replace(QUICK, steps=60, batch_size=2, learning_rate=3e-3, length="likelihood")
    recoverer = InfillingRecoverer(settings).fit(train)
    assert recoverer.losses[-1] < recoverer.losses[0] / 4
    truth = [set(prompt.lower().strip(".").split()) for prompt in train["rewrite_prompt"]]
    answers = [set(answer.lower().strip(".").split()) for answer in recoverer.recover(train)]
    assert all(len(answer & true) > len(true) / 2 for answer, true in zip(answers, truth, strict=True))


def test_an_answer_has_as_many_tokens_as_masks_and_only_those_of_prompts(fitted, triples):
    texts = fitted.encode(triples[1])
    filled, likelihoods = fitted.fill(texts, [4, 7, 5, 1, 9])
    assert [len(fitted._ids([text], 99)[0]) for text in filled] == [4, 7, 5, 1, 9]
    assert (likelihoods < 0).all()
    prompts = fitted._ids(triples[0]["rewrite_prompt"], 99)
    assert set(np.concatenate(fitted._ids(filled, 99))) <= set(np.concatenate(prompts))


def test_in_several_passes_every_mask_is_filled_once(fitted, triples):
    texts, slots = fitted.encode(triples[1])[:2], [[fitted.tokenizer.mask_token_id] * length for length in (5, 1)]
    missing = []
    for left in (3, 2, 1):
        assert (fitted._fill_once(texts, slots, left) <= 0).all()
        missing.append([row.count(fitted.tokenizer.mask_token_id) for row in slots])
    assert missing == [[3, 0], [1, 0], [0, 0]]


def test_drawn_lengths_are_training_lengths_and_tried_ones_their_quantiles(fitted):
    drawn = fitted._lengths(200)
    assert drawn.shape == (1, 200) and set(drawn[0]) <= set(fitted.lengths) and len(set(drawn[0])) > 3
    likely = InfillingRecoverer(replace(QUICK, length="likelihood", lengths_tried=4))
    likely.lengths = np.arange(1, 101)
    assert likely._lengths(2).tolist() == [[13, 13], [38, 38], [63, 63], [88, 88]]


def test_of_several_lengths_the_likeliest_is_taken(fitted, triples):
    likely = InfillingRecoverer(replace(QUICK, length="likelihood")).fit(triples[0])
    texts = likely.encode(triples[1])
    tried = [likely.fill(texts, lengths)[1] for lengths in likely._lengths(5)]
    chosen = [len(row) for row in likely._ids(likely.recover(triples[1]), 99)]
    assert chosen == [int(likely._lengths(1)[place, 0]) for place in np.argmax(tried, axis=0)]


def test_masks_of_a_training_prompt_are_all_or_at_least_one():
    shown, rng = InfillingRecoverer(replace(QUICK, shown=1.0)), np.random.default_rng(0)
    counts = [shown._hide(6, rng).sum() for _ in range(60)]
    assert min(counts) >= 1 and len(set(counts)) > 3
    assert all(InfillingRecoverer(QUICK)._hide(6, rng).all() for _ in range(3))


def test_what_is_frozen_stays_and_the_rest_is_trained(triples):
    recoverer = InfillingRecoverer(replace(QUICK, kept_layers=2))
    before = {name: weight.clone() for name, weight in recoverer.model.named_parameters()}
    recoverer.fit(triples[0])
    moved = {name for name, weight in recoverer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("layer.1" in name for name in moved) and any("transform" in name for name in moved)
    assert not any("layer.0" in name or "word_embeddings" in name for name in moved)


def test_odd_texts_get_an_answer(fitted, triples):
    odd = triples[1].head(3).assign(original_text=["[MASK]", "word " * 3000, "🙂"], rewritten_text=["[MASK]", "x", "–"])
    answers = fitted.recover(odd)
    assert len(answers) == 3 and all(answer.strip() for answer in answers)


def test_a_prompt_without_known_tokens_gives_the_fallback(triples):
    train = triples[0].head(4).assign(rewrite_prompt="🙂")
    assert set(InfillingRecoverer(QUICK).fit(train).recover(triples[1])) == {FALLBACK}


def tiny_bert(folder):
    """A random BERT with a vocabulary of its own: real files, no knowledge."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the task is to rewrite this a make it . :"
    BertTokenizer(vocab={piece: place for place, piece in enumerate(words.split())}).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words.split()), max_position_embeddings=64, **size)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_a_model_of_one_s_own_is_trained_whole_from_its_folder(tmp_path, triples):
    settings = replace(BERT, model=str(tiny_bert(tmp_path)), steps=2, batch_size=4, max_tokens=48, lengths_tried=2)
    recoverer = InfillingRecoverer(settings)
    before = {name: weight.clone() for name, weight in recoverer.model.named_parameters()}
    assert not recoverer.fresh_head
    assert len(recoverer.fit(triples[0]).recover(triples[1])) == 5
    moved = [name for name, weight in recoverer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert any("word_embeddings" in name for name in moved) and any("layer.0" in name for name in moved)
    with pytest.raises(InputError, match="different vocabularies"):
        InfillingRecoverer(replace(settings, scs_share=0.5)).fit(triples[0])


def test_it_says_what_is_wrong(tmp_path, fitted, triples):
    train, test = triples
    with pytest.raises(InputError, match="length 'short' is unknown; choose one of drawn, likelihood"):
        InfillingRecoverer(replace(QUICK, length="short"))
    with pytest.raises(InputError, match=r"config.json is missing"):
        InfillingRecoverer(replace(QUICK, model=str(tmp_path)))
    with pytest.raises(InputError, match="not fitted"):
        InfillingRecoverer(QUICK).recover(test)
    with pytest.raises(InputError, match="no training triples"):
        InfillingRecoverer(QUICK).fit(train.head(0))
    with pytest.raises(InputError, match="row 2: rewrite_prompt is blank"):
        InfillingRecoverer(QUICK).fit(train.head(3).assign(rewrite_prompt=["a", " ", "b"]))
    with pytest.raises(InputError, match="row 1: rewritten_text is blank"):
        fitted.recover(test.head(1).assign(rewritten_text=" "))
    with pytest.raises(InputError, match="no rows to answer"):
        fitted.recover(test.head(0))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "infilling"),
        ({"length": "likelihood"}, "infilling-likelihood"),
        ({"length": "likelihood", "scs_share": 0.5}, "infilling-scs"),
    ],
)
def test_the_builder_takes_options_and_the_environment_s_settings(tmp_path, monkeypatch, triples, options, name):
    monkeypatch.setenv("PROMPTREC_SETTINGS", '{"InfillingSettings.steps": 1, "InfillingSettings.kept_layers": 1}')
    task = Task(get_profile("local"), triples[0], triples[1], tmp_path, seed=3)
    recoverer = build(task, **options)
    assert recoverer.name == name and recoverer.settings.seed == 3 and len(recoverer.losses) == 1
    assert len(recoverer.recover(triples[1])) == 5
