"""What a search moves in: the objective that judges strings, and the units that strings are made of.

Does not search: see token_search.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from promptrec.errors import InputError
from promptrec.scoring import unit
from promptrec.search_encoders import MAX_TOKENS, PLACEHOLDER, SearchEncoder
from promptrec.token_vectors import TokenVectors, token_vectors

RISE = 1e-6  # fp32 embeddings are not exact beyond this


@dataclass(frozen=True)
class Objective:
    """A weighted set of targets: float32 unit rows [m, d] and weights [m], normalised here to sum 1."""

    targets: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        targets, weights = np.asarray(self.targets, np.float32), np.asarray(self.weights, np.float32)
        if targets.ndim != 2 or not len(targets) or weights.shape != targets.shape[:1]:
            raise InputError(f"objective: targets {targets.shape} need one weight each, weights are {weights.shape}")
        if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
            raise InputError("objective: weights must be finite, not negative, and not all zero")
        if not np.allclose(np.linalg.norm(targets, axis=1), 1, atol=1e-3):
            raise InputError("objective: targets must be unit vectors; divide each row by its length")
        if not weights.all():  # a target without weight costs time and changes nothing
            targets, weights = targets[weights > 0], weights[weights > 0]
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "weights", weights / weights.sum())

    @classmethod
    def mean(cls, targets: np.ndarray) -> Objective:
        """Every target weighs the same: the objective of a mean prompt."""
        return cls(targets, np.ones(len(targets), np.float32))

    def value(self, vectors: np.ndarray, block: int = 1024) -> np.ndarray:
        """Weighted mean SCS of unit vectors [n, d] to the targets, shape [n]."""
        parts = [
            (vectors[at : at + block] @ self.targets.T) ** 3 @ self.weights for at in range(0, len(vectors), block)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def slope(self, vectors: np.ndarray) -> np.ndarray:
        """Gradient of `value` by the vectors, [n, d] (not yet projected on the sphere)."""
        return 3 * ((vectors @ self.targets.T) ** 2 * self.weights) @ self.targets

    def best_vector(self, seed: int = 0, iterations: int = 300) -> tuple[np.ndarray, float]:
        """The best unit vector found [d] and its value: what no string can beat, if the ascent found the optimum.

        Fixed point v <- normalise(slope(v)), from the weighted mean, the heaviest targets, the best one of them, and
        some drawn by weight.
        """
        heavy = self.targets[np.argsort(-self.weights, kind="stable")[:2048]]
        drawn = np.random.default_rng(seed).choice(len(self.targets), size=4, p=_shares(self.weights))
        starts = [self.weights @ self.targets, *heavy[:4], heavy[self.value(heavy).argmax()], *self.targets[drawn]]
        vectors = unit(np.stack(starts))
        best, best_value = vectors[0], -np.inf
        for _ in range(iterations):
            values = self.value(vectors)
            if values.max() > best_value:
                best, best_value = vectors[values.argmax()], float(values.max())
            vectors = unit(self.slope(vectors))
        return best, best_value


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float64) / weights.astype(np.float64).sum()


class Units:
    """What strings are made of at one level: how they split and join, which units may be used, what is allowed."""

    def __init__(
        self,
        encoder: SearchEncoder,
        level: str = "word",
        max_tokens: int = MAX_TOKENS,
        banned: Sequence[str] = (),
        vocabulary: Sequence[str] = (),
    ) -> None:
        self.encoder, self.max_tokens, self.by_word = encoder, max_tokens, level == "word"
        self.banned = {ban.lower() for ban in banned}
        phrases = "|".join(map(re.escape, sorted(self.banned)))
        self._phrases = re.compile(rf"(?<!\w)(?:{phrases})(?!\w)", re.IGNORECASE) if phrases else None
        self._index = {piece: index for index, piece in enumerate(encoder.pieces)}
        self.ids = lru_cache(maxsize=None)(self._ids)
        default = encoder.whole_words if self.by_word else encoder.ordinary_pieces
        wanted = dict.fromkeys(vocabulary or default())
        self.words = [
            unit for unit in wanted if unit.strip() and self.ids(unit) and not self.is_banned(self.join([unit]))
        ]
        if not self.words:
            raise InputError("search: no word of the vocabulary is left; give other words or ban fewer")
        self.vectors = np.stack([self.mean_embedding(self.ids(unit)) for unit in self.words])  # [V, D]

    @cached_property
    def learnt(self) -> TokenVectors:
        """What each token adds to a sentence vector."""
        return token_vectors(self.encoder)

    @cached_property
    def added(self) -> np.ndarray:
        """What each unit adds to a sentence vector, [V, d]."""
        return self.learnt.sums([self.ids(unit) for unit in self.words])

    def mean_embedding(self, ids: Sequence[int]) -> np.ndarray:
        """Mean input embedding [D] of a unit's tokens; that of the placeholder is the mean of all."""
        return self.encoder.placeholder if PLACEHOLDER in ids else self.encoder.embedding_matrix[list(ids)].mean(0)

    def split(self, text: str) -> list[str]:
        return text.split() if self.by_word else self.encoder.tokens(text)

    def join(self, units: Iterable[str]) -> str:
        return " ".join(units) if self.by_word else self.encoder.join(units)

    def _ids(self, unit: str) -> tuple[int, ...]:
        if self.by_word:
            return self.encoder.token_ids(unit)
        return (self._index[unit],) if unit in self._index else ()

    def is_banned(self, text: str) -> bool:
        """Whether a banned word, phrase or piece is in the text as the encoder reads it."""
        if not self.banned:
            return False
        pieces = [self.encoder.pieces[index] for index in self.encoder.token_ids(text)]
        held = {form.lower() for piece in pieces for form in (piece, self.encoder.bare(piece))}
        return not held.isdisjoint(self.banned) or bool(self._phrases.search(text))

    def allows(self, text: str) -> bool:
        """Whether a text may be a result: not blank, within the token budget, nothing banned."""
        return bool(text.strip()) and self.encoder.count_tokens(text) <= self.max_tokens and not self.is_banned(text)

    def check_start(self, text: str) -> None:
        """Raise InputError for a start that could not be a result; an empty start is fine."""
        if self.encoder.count_tokens(text) > self.max_tokens:
            count = self.encoder.count_tokens(text)
            raise InputError(f"search: the start has {count} tokens, over max_tokens {self.max_tokens}: {text[:60]!r}")
        if self.is_banned(text):
            raise InputError(f"search: the start holds something banned; change one of them: {text[:60]!r}")
