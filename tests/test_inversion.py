"""Inversion: the decoder learns to write what a vector stands for, noise is of the size that was asked for, the best is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from promptrec import inversion
from promptrec.data import shipped_triples
from promptrec.embedding import EmbeddingRecoverer
from promptrec.errors import InputError
from promptrec.inference import answer_column
from promptrec.inversion import InversionRecoverer, InversionSettings, PolishedRecoverer
from promptrec.language_model import TINY_GEMMA, load_tokenizer
from promptrec.methods import Task
from promptrec.predictor import Posterior, PredictorSettings
from promptrec.profiles import get_profile
from promptrec.scoring import unit

PROMPTS = [
    "Turn it into a sea shanty.",
    "Make it a weather report",
    "Summarise the text for a child.",
    "write this as a royal decree",
    "Shorten the passage to headlines",
    "Let a pirate tell it!",
]
QUICK = InversionSettings(prefix=2, steps=3, batch_size=8, max_tokens=12, samples=2, noise=0.5, evaluations=8, seed=5)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    """A random GPT-2 of one layer with the shipped tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), load_tokenizer(TINY_GEMMA)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=64, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def directions(count: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, 32)).astype(np.float32))


# --- noise and batches


@pytest.mark.parametrize("cosine", [0.3, 0.6, 0.9, 1.0])
def test_noise_of_a_length_leaves_vectors_at_its_cosine(cosine):
    length = inversion.noise_of(cosine)
    vectors = unit(np.random.default_rng(0).normal(size=(200, 1024)))
    noise = np.random.default_rng(1).normal(size=vectors.shape) * length / 32
    assert (unit(vectors + noise) * vectors).sum(1).mean() == pytest.approx(cosine, abs=0.01)


def test_noisy_vectors_are_unit_vectors_between_untouched_and_the_most():
    vectors = torch.as_tensor(unit(np.random.default_rng(0).normal(size=(400, 1024)))).float()
    drawn = inversion.noisy(vectors, inversion.noise_of(0.5), torch.Generator().manual_seed(0))
    cosine = (drawn * vectors).sum(1)
    assert torch.allclose(drawn.norm(dim=1), torch.ones(400)) and 0.4 < cosine.min() < 0.6 and cosine.max() > 0.99
    assert torch.allclose(inversion.noisy(vectors, 0.0, torch.Generator()), vectors, atol=1e-6)


@pytest.mark.parametrize(("rows", "size", "steps"), [(10, 4, 7), (3, 8, 2), (8, 8, 3), (1, 1, 2)])
def test_batches_are_full_and_go_through_all_rows_before_any_comes_again(rows, size, steps):
    lengths = np.random.default_rng(0).integers(2, 30, rows)
    drawn = inversion.batches(lengths, InversionSettings(steps=steps, batch_size=size))
    assert [len(batch) for batch in drawn] == [size] * steps
    order = [place for batch in drawn for place in batch]
    assert all(
        sorted(order[start : start + rows]) == list(range(rows)) for start in range(0, len(order) - rows + 1, rows)
    )


# --- the decoder


def test_the_loss_of_a_batch_is_that_of_its_rows_whatever_the_padding(toy):
    decoder, vectors = inversion.EmbeddingDecoder(toy, 32, 2).eval(), torch.as_tensor(directions(3))
    rows = [decoder.encode(prompt, 20) for prompt in PROMPTS[:3]]
    assert len({len(row) for row in rows}) > 1 and all(row[-1] == decoder.tokenizer.eos_token_id for row in rows)
    alone = [decoder(vectors[place : place + 1], [row]).item() for place, row in enumerate(rows)]
    expected = np.average(alone, weights=[len(row) for row in rows])
    assert decoder(vectors, rows).item() == pytest.approx(expected, rel=1e-5)


def test_prompts_are_cut_to_the_limit_with_their_end_mark(toy):
    ids = inversion.EmbeddingDecoder(toy, 32, 2).encode("word " * 50, 12)
    assert len(ids) == 12 and ids[-1] == 1


def test_it_learns_to_write_what_each_vector_stands_for(toy):
    settings = replace(QUICK, steps=150, batch_size=6, learning_rate=1e-2, max_tokens=20)
    vectors = directions(len(PROMPTS))
    decoder = inversion.train_decoder(PROMPTS, vectors, toy, settings, inversion.noise_of(0.9))
    near = unit(vectors + 0.02 * np.random.default_rng(1).normal(size=vectors.shape).astype(np.float32))
    expected = [prompt.rstrip() for prompt in PROMPTS]
    assert [texts[0] for texts in decoder.write(near, 20)] == expected
    drawn = decoder.write(vectors[:2], 20, samples=3, temperature=0.1)
    assert drawn == [[expected[0]] * 3, [expected[1]] * 3]


def test_the_tiny_gemma_is_trained_too_and_by_its_seed(monkeypatch):
    vectors, path = directions(len(PROMPTS)), str(TINY_GEMMA)
    one, again = (inversion.train_decoder(PROMPTS, vectors, path, QUICK, 0.5) for _ in range(2))
    other = inversion.train_decoder(PROMPTS, vectors, path, replace(QUICK, seed=6), 0.5)
    assert torch.equal(one.prefix.weight, again.prefix.weight)
    assert not torch.equal(one.prefix.weight, other.prefix.weight)
    assert all(text.strip() for (text,) in one.write(vectors, 8))


def test_no_prompts_are_refused(toy):
    with pytest.raises(InputError, match="no prompts to train the inversion on"):
        inversion.train_decoder([], directions(1)[:0], toy, QUICK, 0.1)


# --- the recoverers


@pytest.fixture(scope="module")
def triples() -> tuple[pd.DataFrame, pd.DataFrame]:
    columns = ["id", "original_text", "rewrite_prompt", "rewritten_text"]
    return tuple(shipped_triples([split]).iloc[::9][columns].head(rows) for split, rows in (("train", 24), ("test", 4)))


@pytest.fixture(scope="module")
def embedding(minilm, text_encoder, triples, tmp_path_factory) -> EmbeddingRecoverer:
    quick = PredictorSettings(folds=2, epochs=4, batch_size=16, hidden=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTREC_CACHE", str(tmp_path_factory.mktemp("predictor")))
        return EmbeddingRecoverer(minilm, settings=quick, encoder=text_encoder).fit(triples[0])


def expected(posterior: Posterior, scorer, texts: list[str]) -> np.ndarray:
    return np.array([posterior.value(row, scorer.encode([text]))[0] for row, text in enumerate(texts)])


def test_the_candidate_with_the_highest_expected_score_is_chosen(word_scorer):
    bank = ["a pirate", "a letter"]
    weights = np.array([[0.9, 0.1], [0.2, 0.8]])
    posterior = Posterior(weights, word_scorer.encode(bank), np.array([0.5, 0.5]))
    assert inversion.choose_written(posterior, [bank, ["a letter", "a pirate", "a"]], word_scorer) == bank


def test_it_answers_every_row_with_its_best_candidate(embedding, minilm, toy, triples):
    test = triples[1].drop(columns="rewrite_prompt")
    recoverer = InversionRecoverer(minilm, embedding, toy, QUICK).fit(triples[1])
    answers, posterior = recoverer.recover(test), embedding.posterior(test)
    candidates = recoverer.write(posterior.vectors)
    assert [len(texts) for texts in candidates] == [1 + QUICK.samples] * 4
    for row, (answer, texts) in enumerate(zip(answers, candidates, strict=True)):
        assert answer in texts and answer.strip()
        assert (
            posterior.value(row, minilm.encode([answer]))[0] >= posterior.value(row, minilm.encode(texts)).max() - 1e-6
        )
    assert recoverer.recover(test) == answers and -1 <= recoverer.cosine <= 1


def test_polishing_never_lowers_what_is_expected(embedding, minilm, triples):
    starts = ["Make it a letter", "Let a pirate tell it", "Shorten it", "Write a poem about the text"]
    table = triples[1].drop(columns="rewrite_prompt").assign(**{answer_column("inversion"): starts})
    polished = PolishedRecoverer("inversion", embedding, QUICK)
    answers, posterior = polished.recover(table), embedding.posterior(table)
    gain = expected(posterior, minilm, answers) - expected(posterior, minilm, starts)
    assert polished.name == "inversion-polished" and (gain > -1e-4).all() and gain.max() > 1e-3
    with pytest.raises(InputError, match="no column answer:inversion"):
        polished.recover(triples[1])


def test_it_says_when_it_cannot_answer(embedding, minilm, toy, triples):
    with pytest.raises(InputError, match="not fitted"):
        InversionRecoverer(minilm, embedding, toy, QUICK).recover(triples[1])
    with pytest.raises(InputError, match="no validation triples"):
        InversionRecoverer(minilm, embedding, toy, QUICK).fit(triples[1].head(0))


def test_a_gpu_gets_a_decoder_of_real_size(monkeypatch):
    local, gpu = (Task(get_profile(name), None, None, Path(), seed=2) for name in ("local", "gpu"))
    assert inversion.settings_of(local) == InversionSettings(seed=2)
    assert inversion.settings_of(gpu) == replace(inversion.REAL_SIZE, seed=2)
    monkeypatch.setenv("PROMPTREC_SETTINGS", '{"InversionSettings.steps": 3}')
    assert inversion.settings_of(local).steps == inversion.settings_of(gpu).steps == 3
