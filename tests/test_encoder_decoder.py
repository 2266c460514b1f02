"""Encoder, bridge, decoder: what crosses each bridge, what is learnt, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from promptrec.data import shipped_triples
from promptrec.encoder_decoder import (
    BERT_GPT2,
    BRIDGES,
    Difference,
    EncoderDecoderRecoverer,
    EncoderDecoderSettings,
    Plain,
    Pooled,
    build,
)
from promptrec.errors import InputError
from promptrec.methods import Task
from promptrec.profiles import get_profile
from promptrec.submission import FALLBACK

QUICK = EncoderDecoderSettings(steps=2, batch_size=4, rows=12, decoder_layers=1, max_tokens=48)


@pytest.fixture(scope="module")
def triples():
    return shipped_triples(["train"]).head(24), shipped_triples(["test"]).head(5)


@pytest.fixture(scope="module", params=BRIDGES)
def fitted(request, triples) -> EncoderDecoderRecoverer:
    return EncoderDecoderRecoverer(replace(QUICK, bridge=request.param)).fit(triples[0])


def states(parts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [3, parts, 6, 12] and masks of 6, 4 and 2 tokens."""
    torch.manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    return torch.randn(3, parts, 6, 12), mask[:, None].repeat(1, parts, 1)


@pytest.mark.parametrize(("kind", "parts", "length"), [(Plain, 1, 6), (Pooled, 1, 1), (Difference, 2, 7)])
def test_padding_does_not_cross_a_bridge(kind, parts, length):
    hidden, mask = states(parts)
    bridge = kind(12)
    context, seen = bridge(hidden, mask)
    assert context.shape == (3, length, 12) and seen.shape == (3, length) and seen.any(1).all()
    other, _ = bridge(torch.where(mask[..., None], hidden, torch.tensor(50.0)), mask)
    assert torch.allclose(context[seen], other[seen], atol=1e-5)


def test_the_pooled_bridge_forgets_the_order_and_the_sequence_keeps_it():
    hidden, mask = states(2)
    hidden, mask = hidden[:1], mask[:1]
    turned = hidden.flip(2)
    pooled, kept = Pooled(12), Difference(12)
    assert torch.allclose(pooled(hidden[:, :1], mask[:, :1])[0], pooled(turned[:, :1], mask[:, :1])[0], atol=1e-6)
    assert torch.allclose(kept(hidden, mask)[0][:, 1:].flip(1), kept(turned, mask)[0][:, 1:], atol=1e-5)
    assert not torch.allclose(kept(hidden, mask)[0], kept(turned, mask)[0], atol=1e-2)


def test_the_difference_comes_first_and_is_zero_where_nothing_changed():
    hidden, mask = states(2)
    same = hidden[:, :1].repeat(1, 2, 1, 1)
    bridge = Difference(12)
    assert bridge(same, mask)[0][:, 0].abs().max() < 1e-6 < bridge(hidden, mask)[0][:, 0].abs().max()


def test_every_bridge_answers_every_row_and_again_the_same(fitted, triples):
    train, test = triples
    answers = fitted.recover(test.drop(columns="rewrite_prompt"))
    assert len(answers) == len(test) and all(answer.strip() for answer in answers)
    again = EncoderDecoderRecoverer(fitted.settings).fit(train)
    assert again.losses == fitted.losses and len(again.losses) == 2
    assert again.recover(test) == answers  # the true prompt is not looked at
    assert EncoderDecoderRecoverer(replace(fitted.settings, seed=1)).fit(train).losses != fitted.losses


@pytest.mark.parametrize("bridge", BRIDGES)
def test_it_learns_the_few_rows_it_is_shown(bridge):
    train = shipped_triples(["train"]).iloc[[0, 40]]
    settings = replace(QUICK, bridge=bridge, steps=60, batch_size=2, learning_rate=2e-3)
    recoverer = EncoderDecoderRecoverer(settings).fit(train)
    assert recoverer.losses[-1] < 0.3 < recoverer.losses[0]
    plain = lambda text: "".join(text.lower().split())  # noqa: E731
    answers, truth = recoverer.recover(train), train["rewrite_prompt"]
    assert [plain(answer) for answer in answers] == [plain(prompt) for prompt in truth]  # told apart by their texts


def test_what_is_read_fits_and_holds_both_texts(fitted, triples):
    ids = fitted._read(triples[1])
    decode = fitted.reader.decode
    if fitted.settings.bridge == "sequence":
        assert ids.shape[:2] == (5, 2) and ids.shape[2] <= 24
        original, rewritten = ids[0]
    else:
        assert ids.shape[:2] == (5, 1) and ids.shape[2] <= 48
        said = decode(ids[0, 0], skip_special_tokens=True)
        assert "rewrite the previous text into" in said and said.endswith("using this prompt :")
        original = rewritten = ids[0, 0]
    for part, column in ((original, "original_text"), (rewritten, "rewritten_text")):
        first = fitted.reader(triples[1][column].iloc[0], add_special_tokens=False)["input_ids"][:8]
        assert decode(first) in decode(part)


def test_a_prompt_s_labels_end_with_the_end_and_are_ignored_beyond(fitted):
    labels = fitted._labels(["make it", "rewrite this as a very long letter to an old friend " * 9])
    assert labels.shape[1] == fitted.settings.longest_prompt and labels[1, -1] == fitted.writer.eos_token_id
    end = labels[0].tolist().index(fitted.writer.eos_token_id)
    assert (labels[0, end + 1 :] == -100).all() and (labels[0, :end] != -100).all()


def test_teacher_forcing_does_not_let_the_decoder_see_ahead(fitted, triples):
    fitted.model.eval()
    ids = fitted._read(triples[1].head(1))
    hidden = fitted._hidden(ids)
    short, long = (fitted._labels([text]) for text in ("make it", "make it"))
    long = torch.cat([long, torch.full((1, 3), -100)], 1)
    with torch.inference_mode():
        losses = [float(fitted._loss(hidden, ids, labels)) for labels in (short, long)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_frozen_encoder_stays_and_a_trained_one_moves(triples):
    frozen = EncoderDecoderRecoverer(QUICK)
    before = {name: weight.clone() for name, weight in frozen.encoder.named_parameters()}
    frozen.fit(triples[0])
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.encoder.named_parameters())
    trained = EncoderDecoderRecoverer(replace(QUICK, train_encoder=True)).fit(triples[0])
    moved = [name for name, weight in trained.encoder.named_parameters() if not torch.equal(weight, before[name])]
    assert any("layer.0" in name for name in moved)


def test_the_small_decoder_begins_with_the_encoder_s_vectors(triples):
    recoverer = EncoderDecoderRecoverer(QUICK)
    decoder, writer = recoverer._small_decoder(triples[0]["rewrite_prompt"].tolist())
    assert len(writer) == decoder.config.vocab_size < len(recoverer.reader) / 50
    for prompt in triples[0]["rewrite_prompt"]:  # cut into the same pieces as by the encoder's tokenizer
        assert writer.tokenize(prompt) == recoverer.reader.tokenize(prompt)
    (piece,) = writer.convert_tokens_to_ids(["the"])
    vectors = recoverer.encoder.get_input_embeddings().weight
    assert torch.equal(decoder.transformer.wte.weight[piece], vectors[recoverer.reader.convert_tokens_to_ids("the")])
    assert decoder.lm_head.weight is decoder.transformer.wte.weight


def test_a_gpt2_of_one_s_own_is_loaded_from_its_folder(tmp_path, triples):
    recoverer = EncoderDecoderRecoverer(QUICK)
    _, writer = recoverer._small_decoder(triples[0]["rewrite_prompt"].tolist())
    writer.bos_token = writer.eos_token = "[SEP]"  # as GPT-2 has it: one mark for both, none for padding
    writer.pad_token = None
    writer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(writer), n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    settings = replace(
        BERT_GPT2, encoder="", decoder=str(tmp_path), steps=2, batch_size=4, max_tokens=48, longest_prompt=12
    )
    answers = EncoderDecoderRecoverer(settings).fit(triples[0]).recover(triples[1])  # widths 384 and 32: projected
    assert len(answers) == 5 and all(answers)


def test_odd_texts_get_an_answer(fitted, triples):
    odd = triples[1].head(3).assign(original_text=["[MASK]", "word " * 3000, "🙂"], rewritten_text=["[SEP]", "x", "–"])
    answers = fitted.recover(odd)
    assert len(answers) == 3 and all(answer.strip() for answer in answers)


def test_an_answer_without_letters_becomes_the_fallback(triples):
    train = triples[0].head(4).assign(rewrite_prompt="7")
    settings = replace(QUICK, steps=20)
    assert set(EncoderDecoderRecoverer(settings).fit(train).recover(triples[1])) == {FALLBACK}


def test_it_says_what_is_wrong(tmp_path, triples):
    train, test = triples
    with pytest.raises(InputError, match="bridge 'rope' is unknown; choose one of none, pooled, sequence"):
        EncoderDecoderRecoverer(replace(QUICK, bridge="rope"))
    for broken in (replace(QUICK, encoder=str(tmp_path)), replace(QUICK, decoder=str(tmp_path))):
        with pytest.raises(InputError, match=r"config.json is missing"):
            EncoderDecoderRecoverer(broken).fit(train)
    new = EncoderDecoderRecoverer(QUICK)
    with pytest.raises(InputError, match="not fitted"):
        new.recover(test)
    with pytest.raises(InputError, match="no training triples"):
        new.fit(train.head(0))
    with pytest.raises(InputError, match="row 2: original_text is blank"):
        new.fit(train.head(3).assign(original_text=["a", np.nan, "b"]))
    with pytest.raises(InputError, match="row 1: rewritten_text is blank"):
        new.fit(train).recover(test.head(1).assign(rewritten_text=" "))


def test_the_builder_takes_options_and_the_environment_s_settings(tmp_path, monkeypatch, triples):
    monkeypatch.setenv("PROMPTREC_SETTINGS", '{"EncoderDecoderSettings.steps": 1, "EncoderDecoderSettings.rows": 6}')
    task = Task(get_profile("local"), triples[0], triples[1], tmp_path, seed=3)
    names = []
    for bridge in BRIDGES:
        recoverer = build(task, bridge=bridge)
        names.append(recoverer.name)
        assert recoverer.settings.seed == 3 and len(recoverer.losses) == 1
    assert names == ["encoder-decoder", "bridge-pooled", "bridge-sequence"]
