"""Training batches in the few shapes that JAX compiles for: rows of one length bucket, short batches filled up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from promptrec.rewriters.keras_gemma import bucket_of, padded


@dataclass(frozen=True)
class Encoded:
    """One triple as token ids; the answer begins at position `answer`, and only from there on the loss counts."""

    ids: tuple[int, ...]
    answer: int


def batch_of(rows: Sequence[Encoded], size: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(inputs, next token ids, weights), each [size, bucket]: weight 1 where the next token belongs to an answer.

    A short batch is filled up with rows of weight 0, so that its shape is one that is compiled already.
    """
    width = bucket_of(max(len(row.ids) for row in rows) - 1)
    filled = [*rows, *[rows[0]] * (size - len(rows))]
    ids, mask = padded([row.ids[:-1] for row in filled], width)
    following, _ = padded([row.ids[1:] for row in filled], width)
    weights = np.zeros((size, width), dtype=np.float32)
    for number, row in enumerate(rows):
        weights[number, row.answer - 1 : len(row.ids) - 1] = 1
    return {"token_ids": ids, "padding_mask": mask}, following, weights


def epoch_of(rows: Sequence[Encoded], size: int, rng: np.random.Generator | None = None) -> list[list[Encoded]]:
    """Every row once, in batches of rows of one bucket; shuffled where there is an `rng`."""
    order = range(len(rows)) if rng is None else rng.permutation(len(rows))
    buckets: dict[int, list[Encoded]] = {}
    for number in order:
        buckets.setdefault(bucket_of(len(rows[number].ids) - 1), []).append(rows[number])
    batches = [bucket[start : start + size] for bucket in buckets.values() for start in range(0, len(bucket), size)]
    return batches if rng is None else [batches[number] for number in rng.permutation(len(batches))]


def training_batches(rows: Sequence[Encoded], size: int, seed: int, start: int, stop: int) -> Iterator[tuple]:
    """Batches number `start` to `stop`. They depend on (seed, epoch) alone, wherever a run was interrupted."""
    endless = (batch for epoch in count() for batch in epoch_of(rows, size, np.random.default_rng([seed, epoch])))
    for batch in islice(endless, start, stop):
        yield batch_of(batch, size)
