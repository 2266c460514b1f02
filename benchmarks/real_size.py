"""What QLoRA and generation cost at Gemma-7b's true shape: memory, seconds a step, rows a minute, on one CUDA GPU.

    python benchmarks/real_size.py [--shape 7b] [--rows 64] [--steps 6]

The weights are random, of the true shape, written as safetensors and loaded in NF4 as the real ones would be; what they
cost does not depend on their values. The rows are shipped triples, cut at the profile's 1,024 tokens; the tiny
tokenizer splits text into more tokens than Gemma's, so rows are longer here than on Kaggle. Beside our way (answer-only
logits, rows of like length together) the ancestor's: whole-sequence logits, one row at a time, in the order of the
file. Written to benchmarks/real_size.json with the card's name. Without a GPU it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, GemmaConfig

from promptrec.data import shipped_triples
from promptrec.language_model import (
    TINY_GEMMA,
    GenerationSettings,
    generate,
    load_model,
    load_tokenizer,
)
from promptrec.lora import T4, LoraSettings, answer_loss, attach_adapter, encode_table
from promptrec.profiles import quiet_frameworks
from promptrec.tables import versions, write_json
from promptrec.templates import recovery_request

SHAPES = {  # of google/gemma-7b and google/gemma-2b; None: the shipped tiny Gemma itself
    "7b": {},
    "2b": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "tiny": None,
}
T4_BYTES = 15 * 2**30  # what a T4 leaves to a process


def random_model(shape: str, folder: Path) -> Path:
    """A model of the shape with random weights in `folder`, as safetensors, with the tiny Gemma's tokenizer."""
    if SHAPES[shape] is None:
        return TINY_GEMMA
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(GemmaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder, safe_serialization=True)
    del model
    torch.cuda.empty_cache()
    for file in TINY_GEMMA.glob("*"):
        if "token" in file.name:
            shutil.copy(file, folder / file.name)
    return folder


def padded(rows: Sequence[dict], device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [n, t] of encoded rows, padded on the left."""
    return {name: values.to(device) for name, values in collator()(list(rows)).items()}


@cache
def collator() -> DataCollatorForSeq2Seq:
    """Pads on the side that the tokenizer says."""
    return DataCollatorForSeq2Seq(load_tokenizer(TINY_GEMMA), label_pad_token_id=-100)


def whole_loss(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The usual loss: logits of the whole sequence, although only the answer's count."""
    return model(**inputs, use_cache=False).loss


def timed_steps(model, rows: list[dict], settings: LoraSettings, loss: Callable, steps: int) -> dict:
    """Optimizer steps of `accumulation` batches each: median seconds, tokens a second, peak memory. The first is not counted."""
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = new_optimizer(parameters, settings)
    model.train()
    reset_peak()
    seconds, tokens, at = [], 0, 0
    for step in range(steps + 1):
        started = time.perf_counter()
        for _ in range(settings.accumulation):
            batch = [rows[(at + place) % len(rows)] for place in range(settings.batch_size)]
            at += settings.batch_size
            tokens += sum(len(row["input_ids"]) for row in batch) if step else 0
            (loss(model, padded(batch, device)) / settings.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        seconds += [time.perf_counter() - started] if step else []
    seconds.sort()
    told = {"seconds_a_step": seconds[len(seconds) // 2], "tokens_a_second": tokens / sum(seconds)}
    return told | {"rows_a_step": settings.batch_size * settings.accumulation, "steps": steps, **peak()}


def new_optimizer(parameters: list, settings: LoraSettings):
    """The profile's optimizer; plain AdamW where there is no CUDA."""
    if settings.optimizer == "paged_adamw_8bit" and torch.cuda.is_available():
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, settings.learning_rate)
    return torch.optim.AdamW(parameters, settings.learning_rate)


def timed_answers(model, tokenizer, requests: list[str], batch_size: int, new_tokens: int) -> dict:
    """Rows a minute and peak memory of answering; random weights rarely stop, so every answer is of full length."""
    model.eval()
    reset_peak()
    started = time.perf_counter()
    generate(model, tokenizer, requests, GenerationSettings(max_new_tokens=new_tokens, batch_size=batch_size))
    synchronise()
    return {"rows_a_minute": 60 * len(requests) / (time.perf_counter() - started), "rows": len(requests), **peak()}


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict:
    """Peak memory of the tensors and of what the allocator took from the card, in bytes; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(folder: Path, rows: int, steps: int, settings: LoraSettings, new_tokens: int, batch_size: int) -> dict:
    """Training and answering, our way and the ancestor's, with one model."""
    tokenizer, triples = load_tokenizer(folder), shipped_triples(["train"]).head(rows)
    encoded = list(encode_table(tokenizer, triples, "gemma", settings.max_tokens))
    alike = sorted(encoded, key=lambda row: len(row["input_ids"]))
    base = load_model(folder)
    loaded = peak()
    model = attach_adapter(base, settings)
    larger = replace(settings, batch_size=4 * settings.batch_size, accumulation=max(settings.accumulation // 4, 1))
    found = {
        "loaded": loaded,
        "training": {
            "ours": timed_steps(model, encoded, settings, answer_loss, steps),
            "ours, batches four times as large": timed_steps(model, alike, larger, answer_loss, steps),
            "ancestor": timed_steps(model, encoded, settings, whole_loss, steps),
        },
        "tokens_of_a_row": [len(row["input_ids"]) for row in (alike[0], alike[len(alike) // 2], alike[-1])],
    }
    columns = triples[["original_text", "rewritten_text"]].itertuples(index=False)
    requests = [recovery_request(*texts, "gemma") for texts in columns]
    found["answering"] = {
        "ours": timed_answers(model, tokenizer, requests, batch_size, new_tokens),
        "ancestor": timed_answers(model, tokenizer, requests[: max(rows // 8, 2)], 1, new_tokens),
    }
    return found


def fits_t4(found: dict) -> dict[str, bool]:
    """What stays below a single T4's memory by its reserved peak; a pair has two of them, with half of the layers each."""
    each = {**found["training"], **{f"answering, {name}": told for name, told in found["answering"].items()}}
    return {name: told["reserved_bytes"] < T4_BYTES for name, told in each.items() if "reserved_bytes" in told}


def main(arguments: Sequence[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16, help="of answering")
    parser.add_argument("--max-tokens", type=int, default=T4.max_tokens)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and SHAPES[given.shape] is not None:
        print("skipped: real size needs a CUDA GPU with some 24 GB; nothing was written")
        return None
    quiet_frameworks()
    settings = replace(T4, max_tokens=given.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(given.shape, Path(folder))
        found = measure(model, given.rows, given.steps, settings, given.new_tokens, given.batch_size)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {"device": card, "shape": given.shape, "settings": asdict(settings), **found}
    return write_json(report | {"fits_one_t4": fits_t4(found), "versions": versions()}, given.out)


if __name__ == "__main__":
    print(main() or "")
