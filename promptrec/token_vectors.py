"""What each token adds to a sentence vector: a bag of tokens that stands in for an encoder, to rank edits for nothing.

unit(offset + sum of token vectors) is fitted once to an encoder, on prompts with words put in, taken out and replaced. It
knows no order and is right only roughly; but where a string's own vector is known, what an edit adds to it and takes from
it says at once, for every word at every place, which strings are worth encoding. Does not search: see search_moves.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from promptrec.cache import cache_folder, digest, fingerprint, read_arrays, save_arrays
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import unit
from promptrec.tables import progress
from promptrec.text_features import frequent_words

if TYPE_CHECKING:
    from promptrec.search_encoders import SearchEncoder

VERSION = 1  # of what is cached


@dataclass(frozen=True)
class TokenVectorSettings:
    """How token vectors are fitted. What costs is encoding the strings."""

    strings: int = 12_000
    words: int = 3000  # the most frequent ones of the prompts, that edits put in
    longest: int = 40  # words of a string
    steps: int = 600
    batch_size: int = 256
    learning_rate: float = 5e-3
    seed: int = 0


@dataclass(frozen=True)
class TokenVectors:
    """What each token adds [V, d], and what every string starts from [d]; not of unit length."""

    vectors: np.ndarray
    offset: np.ndarray

    def sums(self, units: Sequence[Sequence[int]]) -> np.ndarray:
        """What units of token ids add, [n, d]."""
        width = (len(units), self.vectors.shape[1])
        return np.stack([self.vectors[list(ids)].sum(0) for ids in units]) if units else np.zeros(width, np.float32)


def token_vectors(encoder: SearchEncoder) -> TokenVectors:
    """Those of an encoder: fitted to the shipped prompts' words the first time, then read from the cache."""
    if "_token_vectors" not in vars(encoder):
        key = digest(VERSION, encoder.name, fingerprint(encoder.encode), TokenVectorSettings())
        path = cache_folder() / "token-vectors" / f"{key}.npz"
        if arrays := read_arrays(path):
            found = TokenVectors(**arrays)
        else:
            found = fit_token_vectors(encoder, shipped_prompts()["rewrite_prompt"].tolist())
            save_arrays(path, **vars(found))
        encoder._token_vectors = found
    return encoder._token_vectors


def fit_token_vectors(
    encoder: SearchEncoder, prompts: Sequence[str], settings: TokenVectorSettings | None = None
) -> TokenVectors:
    """Token vectors for the words of prompts: highest mean cosine to the encoder on strings made of them.

    A token that no string held adds nothing.
    """
    import torch
    from torch.nn.functional import normalize

    settings = settings or TokenVectorSettings()
    random = np.random.default_rng(settings.seed)
    words = frequent_words(prompts, settings.words)
    texts = [_altered(prompts, words, settings.longest, random) for _ in range(settings.strings)]
    wanted = torch.from_numpy(_encoded(encoder, texts))
    rows = [encoder.token_ids(text) for text in texts]
    seen, places = np.unique(list(chain.from_iterable(rows)), return_inverse=True)
    rows = torch.from_numpy(places).split([len(row) for row in rows])
    torch.manual_seed(settings.seed)
    table, offset = 0.02 * torch.randn(len(seen), wanted.shape[1]), torch.zeros(wanted.shape[1])
    parameters = [table.requires_grad_(), offset.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, settings.steps)
    for _ in range(settings.steps):
        batch = random.integers(len(rows), size=settings.batch_size).tolist()
        starts = torch.tensor([0, *np.cumsum([len(rows[row]) for row in batch])[:-1]])
        added = torch.nn.functional.embedding_bag(torch.cat([rows[row] for row in batch]), table, starts, mode="sum")
        optimizer.zero_grad()
        (-(normalize(added + offset, dim=-1) * wanted[batch]).sum(-1).mean()).backward()
        optimizer.step()
        schedule.step()
    vectors = np.zeros((len(encoder.pieces), wanted.shape[1]), np.float32)
    vectors[seen] = table.detach().numpy()
    return TokenVectors(vectors, offset.detach().numpy())


def fidelity(found: TokenVectors, encoder: SearchEncoder, texts: Sequence[str]) -> float:
    """Mean cosine of what the tokens add up to with what the encoder says."""
    guessed = unit(found.sums([encoder.token_ids(text) for text in texts]) + found.offset)
    return float((guessed * encoder.encode(texts, exact=False)).sum(1).mean())


def _altered(prompts: Sequence[str], words: Sequence[str], longest: int, random: np.random.Generator) -> str:
    """A few prompts joined, with words put in, taken out and replaced at random: what a search meets on its way."""
    drawn = random.integers(len(prompts), size=random.integers(1, 5))
    units = " ".join(prompts[index] for index in drawn).split()[:longest]
    for _ in range(random.integers(len(units) + 1)):
        at, word = int(random.integers(len(units))), words[random.integers(len(words))]
        start, stop, new = [(at, at, [word]), (at, at + 1, [word]), (at, at + 1, [])][random.integers(3)]
        if new or len(units) > 1:
            units[start:stop] = new
    return " ".join(units[:longest])


def _encoded(encoder: SearchEncoder, texts: Sequence[str], block: int = 512) -> np.ndarray:
    """Vectors [n, d] to rank by, with progress; alike lengths together."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    blocks = progress(range(0, len(order), block), desc="learn what tokens add", unit_scale=block)
    found = [encoder.encode([texts[row] for row in order[at : at + block]], exact=False) for at in blocks]
    return np.concatenate(found)[np.argsort(order)]
