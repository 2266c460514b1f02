"""A causal language model in torch: where it lies, how it is loaded (NF4 or not), how it answers in batches.

Used by fine-tuning, by inference and by the torch rewriter; knows neither prompts nor tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from promptrec.distributed import local_rank, sharded, world
from promptrec.errors import InputError
from promptrec.profiles import ASSETS, Profile, attach_hint, preset
from promptrec.tables import check_digest, progress

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
TINY_GEMMA = ASSETS / "tiny-gemma"
TINY_GEMMA_SHA256 = "d8bcc4fe167ab53babcd9aab04f30fd8d46c5a23acd164fd84729fb6a36fbddf"


def compute_dtype() -> torch.dtype:
    """bf16 from compute capability 8.0, fp16 on older cards, fp32 on a CPU.

    A T4 (7.5) has no native bf16 although torch.cuda.is_bf16_supported() says True: it emulates.
    """
    if not torch.cuda.is_available():
        return torch.float32
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return torch.bfloat16 if oldest >= (8, 0) else torch.float16


def nf4_config() -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation (Dettmers et al., QLoRA, 2023).

    FSDP shares out floating-point tensors only: for it the 4-bit values lie in tensors of the compute type.
    """
    storage = {"bnb_4bit_quant_storage": compute_dtype()} if sharded() else {}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
        **storage,
    )


def check_model_directory(path: str | Path) -> None:
    """Raise InputError, saying what to attach, unless a local path holds a Hugging Face model in safetensors."""
    directory = Path(path)
    local = directory.is_absolute() or str(path).startswith(".") or directory.exists()
    if not local:
        return  # a hub name; the library reports what it cannot reach
    hint = attach_hint(path, "check the path")
    if not (directory / "config.json").is_file():
        raise InputError(f"{path}: no model there (config.json is missing); {hint}")
    if not list(directory.glob("*.safetensors")):
        raise InputError(f"{path}: no .safetensors file; pickled weights are not loaded: convert them first")
    if directory.resolve() == TINY_GEMMA.resolve():
        check_digest(directory / "model.safetensors", TINY_GEMMA_SHA256)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _hint(path: str | Path) -> str:
    return attach_hint(path, "give a local copy of the model, in safetensors")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left (generation continues the last token), with its own pad token."""
    check_model_directory(path)
    directory = Path(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        hint = attach_hint(path, "copy the tokenizer's files, too")  # transformers would make up an empty vocabulary
        raise InputError(f"{path}: no tokenizer there ({' and '.join(TOKENIZER_FILES)} are missing); {hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the tokenizer cannot be loaded ({_reason(error)}); {_hint(path)}") from None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.unk_token  # pad = eos would mask the end of every answer
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(path: str | Path, quantise: bool = True) -> PreTrainedModel:
    """A causal LM for inference or as a base for adapters; safetensors only.

    One process spreads it over the GPUs there are; of several, each has it on its own GPU.
    """
    check_model_directory(path)
    options = {"quantization_config": nf4_config()} if quantise else {}
    if torch.cuda.is_available():
        alone = world() == 1 and torch.cuda.device_count() > 1
        options["device_map"] = "balanced" if alone else {"": local_rank()}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=compute_dtype(), use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: the model cannot be loaded ({_reason(error)}); {_hint(path)}") from None
    except Exception as error:  # safetensors raises its own class for a truncated file
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path}: a weights file is damaged ({error}); copy or attach it again") from None
    return model.eval()


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated."""

    max_new_tokens: int = 32
    batch_size: int = 64  # halved when memory runs out
    temperature: float = 0.0  # 0: greedy
    seed: int = 0


def generation_settings(profile: Profile, **changes: object) -> GenerationSettings:
    """The profile's settings with changes: a 7B model has no room for the cache of 64 long rows."""
    return preset(profile, GenerationSettings(), GenerationSettings(batch_size=16), **changes)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, begin: bool = True) -> list[int]:
    """Ids of a full prompt, beginning-of-sequence included once (Gemma is badly wrong without it).

    `begin` = False: of a text that goes on from another, as an answer does.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids if not begin or bos is None or ids[:1] == [bos] else [bos, *ids]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    settings: GenerationSettings | None = None,
    stop: str = "",
    description: str = "generate",
    on_batch: Callable[[list[int], list[str]], None] | None = None,
    stop_after: float | None = None,
) -> list[str]:
    """Answers to `requests`, in their order; batched and sorted by length so that little is spent on padding.

    `stop` is text that ends an answer (besides EOS). `on_batch(positions, answers)` is called as batches finish.
    After `stop_after` seconds the remaining answers are empty strings. Out of memory halves the batch.
    """
    settings = settings or GenerationSettings()
    if settings.temperature:  # greedy answers draw nothing, and training that watches them goes on drawing
        torch.manual_seed(settings.seed)
    encoded = [token_ids(tokenizer, request) for request in requests]
    order = sorted(range(len(encoded)), key=lambda position: len(encoded[position]), reverse=True)
    answers, batch_size = [""] * len(encoded), settings.batch_size
    bar, started = progress(None, total=len(order), desc=description), time.monotonic()
    while order and not (stop_after is not None and time.monotonic() - started > stop_after):
        positions = order[:batch_size]
        try:
            texts = _generate_batch(model, tokenizer, [encoded[p] for p in positions], settings, stop)
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            torch.cuda.empty_cache()
            continue
        for position, text in zip(positions, texts, strict=True):
            answers[position] = text
        if on_batch:
            on_batch(positions, texts)
        order = order[len(positions) :]
        bar.update(len(positions))
    return answers


def _generate_batch(model, tokenizer, rows: list[list[int]], settings: GenerationSettings, stop: str) -> list[str]:
    padded = left_padded(tokenizer, rows, model.device)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature, "top_k": 0}
        if settings.temperature
        else {"do_sample": False}
    )
    with torch.inference_mode():
        output = model.generate(
            **padded,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=[tokenizer.eos_token_id, *stop_ids(tokenizer, stop)],
            **sampling,
        )
    texts = tokenizer.batch_decode(output[:, padded["input_ids"].shape[1] :], skip_special_tokens=False)
    return [until_end(text, tokenizer, stop) for text in texts]


def left_padded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], device: torch.device
) -> BatchEncoding:
    """Rows of token ids as input_ids and attention_mask [n, t], filled up on the left: generation continues the last token."""
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(device)


def stop_ids(tokenizer: PreTrainedTokenizerBase, stop: str) -> list[int]:
    """Id of the text that ends an answer, where it is one token; none where it is plain text.

    Raises InputError when a mark such as <end_of_turn> is not one token: the tokenizer knows no chat, and the model would
    read and write noise without a word of warning.
    """
    ids = tokenizer(stop, add_special_tokens=False)["input_ids"] if stop else []
    if len(ids) > 1 and stop.startswith("<"):
        path = tokenizer.name_or_path
        hint = attach_hint(path, "use an instruction-tuned model with its own tokenizer files")
        raise InputError(f"{path}: the tokenizer has no chat mark {stop}; {hint}")
    return ids if len(ids) == 1 else []


def until_end(text: str, tokenizer: PreTrainedTokenizerBase, stop: str) -> str:
    """A decoded answer up to the mark that ends it, or up to the padding."""
    for mark in filter(None, (stop, tokenizer.eos_token, tokenizer.pad_token)):
        text = text.split(mark)[0]
    return text.strip()


def answer_log_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 32,
) -> np.ndarray:
    """Mean log-probability (nats) of each answer's tokens after its request, [n].

    Request and answer are encoded apart and joined, as in training. Logits are computed at the answers' positions only.
    Raises InputError for an answer without tokens.
    """
    encoded = [token_ids(tokenizer, text) for text in requests]
    endings = [token_ids(tokenizer, text, begin=False) for text in answers]
    if not all(endings):
        raise InputError(f"answer {endings.index([]) + 1} has no tokens: nothing to be likely")
    rows = [(begun, ended) for begun, ended in zip(encoded, endings, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: sum(map(len, rows[row])), reverse=True)  # little padding
    found = np.zeros(len(rows))
    for start in progress(range(0, len(order), batch_size), desc="likelihood of answers"):
        batch = order[start : start + batch_size]
        found[batch] = _log_likelihoods(model, tokenizer.pad_token_id, [rows[row] for row in batch])
    return found


def _log_likelihoods(model, pad: int, rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """Mean log-probability of the second part of each row after the first, [n]. Padded on the left: answers end together."""
    width, kept = max(len(begun) + len(ended) for begun, ended in rows), max(len(ended) for _, ended in rows)
    lengths = torch.tensor([[len(begun) + len(ended), len(ended)] for begun, ended in rows], device=model.device)
    ids = [[pad] * (width - len(begun) - len(ended)) + begun + ended for begun, ended in rows]
    ids = torch.tensor(ids, device=model.device)  # [n, width]
    left = torch.arange(width, 0, -1, device=model.device)  # tokens from here to the end
    mask = (left <= lengths[:, :1]).long()
    answered = left[-kept:] <= lengths[:, 1:]  # [n, kept]
    with torch.inference_mode():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=kept + 1,
            use_cache=False,
        ).logits[:, :-1]  # [n, kept, vocabulary]
    nats = torch.zeros(answered.shape, device=logits.device)
    nats[answered] = -F.cross_entropy(logits[answered].float(), ids[:, -kept:][answered], reduction="none")
    return (nats.sum(1) / lengths[:, 1]).double().cpu().numpy()
