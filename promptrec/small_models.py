"""Small torch models of our own, and how they are loaded and trained: what infilling and encoder-decoders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

from promptrec.data import TEXT_COLUMNS, check_cells
from promptrec.errors import InputError
from promptrec.language_model import check_model_directory, compute_dtype
from promptrec.profiles import attach_hint, quiet_frameworks
from promptrec.tables import progress
from promptrec.text_features import native_bfloat16

IGNORED = -100  # label of a position that the loss does not see


def frame(original: list[int], rewritten: list[int], between: list[int], room: int) -> list[int]:
    """Token ids of original, `between` and rewritten; the texts are cut from their ends until all fits into `room`.

    A text that needs less than half of what is left leaves the rest to the other one.
    """
    left = max(room - len(between), 0)
    first = min(len(original), max(left // 2, left - len(rewritten)))
    return [*original[:first], *between, *rewritten[: left - first]]


def device() -> torch.device:
    """Where small models are trained: the first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """Matrix products in bfloat16 where the machine has it itself, as they are elsewhere; weights stay in fp32."""
    at = device().type
    fast = compute_dtype() == torch.bfloat16 if at == "cuda" else native_bfloat16()
    return torch.autocast(at, torch.bfloat16) if fast else nullcontext()


def shuffled_batches(rows: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """`steps` batches of `size` row numbers: all rows in random order, then again in another."""
    rng, waiting = np.random.default_rng(seed), np.empty(0, int)
    for _ in range(steps):
        while len(waiting) < size:
            waiting = np.concatenate([waiting, rng.permutation(rows)])
        yield waiting[:size]
        waiting = waiting[size:]


def optimise(
    parameters: Sequence[torch.nn.Parameter], loss: Callable[[np.ndarray], torch.Tensor], rows: int, settings, name: str
) -> list[float]:
    """Minimise `loss(batch)`, batch = row numbers, with AdamW and a one-cycle rate; the loss at every step.

    `settings` has steps, batch_size, learning_rate, weight_decay and seed. Rows are shuffled anew in every epoch.
    """
    losses, size = [], min(settings.batch_size, rows)
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    total = settings.steps + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=total, pct_start=max(0.1, 1.1 / total)
    )
    for batch in progress(shuffled_batches(rows, size, settings.steps, settings.seed), total=settings.steps, desc=name):
        with autocast():
            value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(value.detach()))
    return losses


def load(kind: type, path: str | Path, **options: object) -> tuple:
    """(model or what `options` make of it, tokenizer) from a folder or a name. Raises InputError where there is none."""
    quiet_frameworks()
    check_model_directory(path)
    try:
        return kind.from_pretrained(path, use_safetensors=True, **options), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        hint = attach_hint(path, "attach its folder")
        raise InputError(f"{path}: cannot be loaded ({str(error).splitlines()[0][:120]}); {hint}") from None


def check_training_texts(train: pd.DataFrame) -> None:
    """Raise InputError unless there are training triples, every text of them filled."""
    if train.empty:
        raise InputError("no training triples to fit on")
    check_cells(train[list(TEXT_COLUMNS)], TEXT_COLUMNS, "the training triples")
