"""Loading and answering: digests, pickles, truncated files, order, padding, stops."""

import shutil

import pytest
import torch

from promptrec import language_model
from promptrec.errors import InputError
from promptrec.language_model import TINY_GEMMA, GenerationSettings, generate, load_model, load_tokenizer, token_ids

REQUESTS = [
    f"<start_of_turn>user\nRepeat this text\n\n{'the ferry ' * n}leaves<end_of_turn>\n<start_of_turn>model\n"
    for n in (1, 9, 4)
]


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_GEMMA, quantise=False), load_tokenizer(TINY_GEMMA)


def test_the_shipped_model_is_small_and_checked_by_its_digest(tiny, monkeypatch):
    model, _ = tiny
    assert model.num_parameters() <= 6_000_000
    assert (TINY_GEMMA / "model.safetensors").stat().st_size <= 12_000_000
    monkeypatch.setattr(language_model, "TINY_GEMMA_SHA256", "0" * 64)
    with pytest.raises(InputError, match="SHA-256"):
        load_model(TINY_GEMMA)


def test_tokenizer_keeps_gemmas_turns_whole_and_begins_once(tiny):
    _, tokenizer = tiny
    ids = token_ids(tokenizer, REQUESTS[0])
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert token_ids(tokenizer, "<bos>" + REQUESTS[0]) == ids
    assert len(tokenizer("<start_of_turn>", add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert (
        tokenizer.decode(tokenizer("Zebra #7 \u00e9!\n", add_special_tokens=False)["input_ids"]) == "Zebra #7 \u00e9!\n"
    )


def test_answers_do_not_depend_on_the_batch(tiny):
    settings = [GenerationSettings(max_new_tokens=12, batch_size=size) for size in (1, 2, 3)]
    answers = [generate(*tiny, REQUESTS, one, stop="<end_of_turn>") for one in settings]
    assert answers[0] == answers[1] == answers[2]
    assert not any("<" in answer for answer in answers[0])


def test_a_time_limit_leaves_the_rest_blank(tiny):
    seen = []
    settings = GenerationSettings(max_new_tokens=4, batch_size=1)
    answers = generate(
        *tiny, REQUESTS, settings, on_batch=lambda positions, texts: seen.extend(positions), stop_after=0.0
    )
    assert len(seen) <= 1 and sum(answer != "" for answer in answers) <= 1


def test_out_of_memory_halves_the_batch_and_goes_on(tiny, monkeypatch):
    sizes, real = [], language_model._generate_batch

    def tight(model, tokenizer, rows, settings, stop):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.cuda.OutOfMemoryError
        return real(model, tokenizer, rows, settings, stop)

    monkeypatch.setattr(language_model, "_generate_batch", tight)
    answers = generate(*tiny, REQUESTS, GenerationSettings(max_new_tokens=4, batch_size=3), stop="<end_of_turn>")
    assert sizes == [3, 1, 1, 1] and len(answers) == 3


def test_a_truncated_weights_file_is_one_clear_line(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY_GEMMA, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"attach it again|cannot be loaded"):
        load_model(folder)


def test_a_t4_computes_in_fp16_whatever_torch_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        assert language_model.compute_dtype() is dtype
