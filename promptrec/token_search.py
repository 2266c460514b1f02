"""Search for the string whose embedding scores best against a weighted set of targets.

value(string) = sum_i w_i * cos(e(string), t_i)**3. With all training prompts as targets the best string is a mean prompt;
with a row's posterior over a prompt bank it is that row's decode; with weighted answers it is an ensemble's blend.

Gradient search ranks every replacement and insertion by one backward pass through the encoder (HotFlip, Ebrahimi et al.
2018; GCG, Zou et al. 2023), encodes the best candidate *strings* exactly, and accepts one only if the objective rises.
Surrogate search ranks them by vectors learnt for each token (token_vectors.py) and needs no backward pass: better where a
row can have a hundred evaluations, not thousands. Baselines run behind the same interface. Many rows advance in lockstep,
so that they share batches and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from promptrec.errors import InputError
from promptrec.search_encoders import MAX_TOKENS, MiniLMEncoder, SearchEncoder, T5Encoder
from promptrec.search_methods import METHODS
from promptrec.search_moves import Edits, edited, swap, unions
from promptrec.search_space import RISE, Objective, Units
from promptrec.tables import progress

__all__ = ["Found", "MiniLMEncoder", "Objective", "SearchEncoder", "SearchSettings", "Step", "T5Encoder", "search"]

LEVELS = ("word", "token")


@dataclass(frozen=True)
class SearchSettings:
    """How to search. The budget counts exact encodings of distinct strings."""

    method: str = "gradient"  # or surrogate, greedy, beam, genetic, random
    level: str = "word"  # "word" stays readable; "token" may use any piece of the vocabulary
    max_tokens: int = MAX_TOKENS  # of the result, special tokens included
    evaluations: int = 16000
    seconds: float = 0.0  # then a row ends with what it has, so that its string depends on the machine; 0: no limit
    seed: int = 0
    banned: tuple[str, ...] = ()  # words, phrases or pieces, in any case
    vocabulary: tuple[str, ...] = ()  # units to use; empty: the encoder's whole words, or all its pieces
    candidates: int = 64  # strings encoded in a step
    places: int = 4  # units that a step doubles to rank insertions, each one backward pass through one string
    patience: int = 10  # steps without a rise before a climb is stuck
    restarts: int = 1000  # how often a stuck search drops some units and grows again
    width: int = 8  # of a beam or a population

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("level", LEVELS)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"search: {name} {getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}"
                )
        for name in ("evaluations", "candidates", "places", "patience", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"search: {name} must be at least 1, not {getattr(self, name)}")
        if not self.seconds >= 0:
            raise InputError(f"search: seconds must be 0 (no limit) or more, not {self.seconds}")
        if not 3 <= self.max_tokens <= MAX_TOKENS:
            raise InputError(
                f"search: max_tokens must be 3 to {MAX_TOKENS} (what the scorer reads), not {self.max_tokens}"
            )


class Step(NamedTuple):
    """A new best string: what it took, what it is worth, and the string."""

    evaluations: int
    seconds: float
    value: float
    text: str


@dataclass(frozen=True)
class Found:
    """The best string and the way to it; `gradients` counts strings sent through a backward pass."""

    text: str
    value: float
    evaluations: int
    gradients: int
    seconds: float
    history: list[Step] = field(default_factory=list)


class _Spent(Exception):
    """The row has used its budget, or finds nothing new to try."""


class SearchRow:
    """One search: its own objective, random numbers, budget, and what it has seen. It knows no other row."""

    def __init__(self, units: Units, objective: Objective, start: str, note: Callable | None, settings: SearchSettings):
        self.units, self.objective, self.settings, self.note = units, objective, settings, note
        self.start = units.split(start)
        self.random = np.random.default_rng(settings.seed)
        self.known: dict[str, float] = {}
        self.vectors: dict[str, np.ndarray] = {}
        self.exact: set[str] = set()
        self.centre, self.around = [], []  # units, and the edits of them tried so far
        self.history: list[Step] = []
        self.evaluations = self.gradients = self.idle = 0
        self.began = time.perf_counter()
        self.moves = self._moves(" ".join(start.split()) and start)

    def _moves(self, start: str):
        if start:
            yield from self.values([start])
        yield from METHODS[self.settings.method](self)

    def go_on(self, answer):
        """Hand the method what it asked for; what it asks for next, or None when it is done."""
        try:
            return self.moves.send(answer)
        except (StopIteration, _Spent):
            self.seconds = time.perf_counter() - self.began
            return None

    def found(self) -> Found:
        """The result. Raises InputError if not even one string was allowed."""
        if not self.history:
            raise InputError("search: no string could be tried; allow more tokens, another vocabulary or fewer bans")
        _, _, value, text = self.history[-1]
        return Found(text, value, self.evaluations, self.gradients, self.seconds, self.history)

    @property
    def best(self) -> list[str]:
        return self.units.split(self.history[-1].text) if self.history else []

    @property
    def late(self) -> bool:
        """Whether the time limit is over and there is something to show for it."""
        spent = time.perf_counter() - self.began
        return bool(self.history) and 0 < self.settings.seconds < spent

    def values(self, texts: Sequence[str]):
        """Values of the texts [n] (ask with `yield from`); -inf for one not allowed or beyond the budget.

        The highest is exact. The others too, unless the encoder ranks in bfloat16.
        """
        left = self.settings.evaluations - self.evaluations - (not self.units.encoder.ranks_exactly)
        new = [text for text in dict.fromkeys(texts) if text not in self.known and self.units.allows(text)][
            : max(left, 0)
        ]
        self.idle = 0 if new else self.idle + 1
        if left <= 0 or self.idle > 20 or self.late:
            raise _Spent
        if new:
            yield from self._look_up("rank", new)
        tried = [text for text in texts if text in self.known]
        while tried and (top := max(tried, key=self.known.__getitem__)) not in self.exact:
            yield from self._look_up("encode", [top])
        if new:
            self._note(top)
        return np.array([self.known.get(text, -np.inf) for text in texts])

    def _look_up(self, kind: str, texts: list[str]):
        """Ask for the texts' vectors, to rank by or exact, at one evaluation each."""
        if self.evaluations >= self.settings.evaluations:
            raise _Spent
        vectors = yield kind, texts
        self.known.update(zip(texts, self.objective.value(vectors).tolist(), strict=True))
        self.vectors.update(zip(texts, vectors, strict=True))
        self.exact.update(texts if kind == "encode" or self.units.encoder.ranks_exactly else ())
        self.evaluations += len(texts)

    def _note(self, text: str) -> None:
        value = self.known[text]
        if not self.history or value > self.history[-1].value + RISE:
            self.history.append(Step(self.evaluations, time.perf_counter() - self.began, value, text))
            if self.note:
                self.note(self.history[-1])

    def improve(self, units: list[str], candidates: Sequence[Edits], unite: bool = False):
        """The best of the candidates, and with `unite` of unions of those tried so far, if it beats `units`; else `units`."""
        (floor,) = yield from self.values([self.units.join(units)])
        texts = [self.units.join(edited(units, edits)) for edits in candidates]
        values = yield from self.values(texts)
        if unite and np.isfinite(floor):
            self.around = candidates if units != self.centre else [*self.around, *candidates]
            self.centre = units
            texts += [self.units.join(edited(units, edits)) for edits in self._unions(units)]
            values = yield from self.values(texts)
        top = int(values.argmax()) if texts else 0
        return self.units.split(texts[top]) if texts and values[top] > floor + RISE else units

    def _unions(self, units: list[str], most: int = 192) -> list[Edits]:
        """Unions of the best edits of these units that were tried so far."""
        text, count = self.units.join(units), self.units.encoder.count_tokens
        tried = {edits: self.units.join(edited(units, edits)) for edits in self.around}
        known = [edits for edits in tried if tried[edits] in self.known]
        best = sorted(known, key=lambda edits: -self.known[tried[edits]])[:most]
        if len(best) < 2:
            return []
        longer = np.array([count(tried[edits]) for edits in best]) - count(text)
        vectors = np.stack([self.vectors[tried[edits]] for edits in best])
        return unions(self.objective, self.vectors[text], best, vectors, longer, self.settings.max_tokens - count(text))

    def draw(self, count: int) -> list[str]:
        """Units of the vocabulary, uniformly."""
        return [self.units.words[index] for index in self.random.integers(len(self.units.words), size=count)]

    def random_edit(self, units: list[str]) -> Edits:
        """Insert, replace, delete or swap somewhere."""
        word, kind = tuple(self.draw(1)), self.random.integers(4)
        if kind == 0 or not units:
            at = int(self.random.integers(len(units) + 1))
            return ((at, at, word),)
        if kind == 1 and len(units) > 1:
            return swap(units, *sorted(self.random.choice(len(units), 2, replace=False).tolist()))
        at = int(self.random.integers(len(units)))
        return ((at, at + 1, word if kind == 2 or len(units) == 1 else ()),)


# --- the one loop


def search_many(
    encoder: SearchEncoder,
    objectives: Sequence[Objective],
    starts: Sequence[str],
    settings: SearchSettings,
    on_step: Callable[[int, Step], None] | None = None,
) -> list[Found]:
    """The best string found for each objective, from its start (which may be empty), in lockstep.

    All rows' gradients share batches, and so do all rows' candidates; no string is encoded twice. A row's result does
    not depend on the other rows. `on_step(row, step)` is called at every new best string.
    """
    if len(objectives) != len(starts):
        raise InputError(f"search: {len(objectives)} objectives for {len(starts)} starts; give one start each")
    units = Units(encoder, settings.level, settings.max_tokens, settings.banned, settings.vocabulary)
    for start in starts:
        units.check_start(start)
    notes = [partial(on_step, index) if on_step else None for index in range(len(starts))]
    rows = [SearchRow(units, *each, settings) for each in zip(objectives, starts, notes, strict=True)]
    known: dict[tuple[str, str], np.ndarray] = {}
    asked = {row: ask for row in rows if (ask := row.go_on(None))}
    total = len(rows) * settings.evaluations
    # who searches once shows a bar of its own
    bar = progress(None, disable=len(rows) == 1, desc="search", total=total, leave=False)
    while asked:
        bar.update(sum(row.evaluations for row in rows) - bar.n)
        kind = Counter(kind for kind, _ in asked.values()).most_common(1)[0][0]
        turn = {row: items for row, (ask, items) in asked.items() if ask == kind}
        answers = _gradients(encoder, turn) if kind == "gradient" else _vectors(encoder, kind, turn, known)
        asked = {row: ask for row, ask in asked.items() if row not in turn}
        asked |= {row: ask for row, answer in answers.items() if (ask := row.go_on(answer))}
    bar.close()
    return [row.found() for row in rows]


def _vectors(
    encoder: SearchEncoder, kind: str, turn: dict[SearchRow, list[str]], known: dict
) -> dict[SearchRow, np.ndarray]:
    """Each row's vectors [n, d]; what any row asked for before is not encoded again."""
    exact = kind == "encode" or encoder.ranks_exactly
    new = sorted({text for texts in turn.values() for text in texts if (exact, text) not in known})
    known.update(zip([(exact, text) for text in new], encoder.encode(new, exact), strict=True))
    return {row: np.stack([known[exact, text] for text in texts]) for row, texts in turn.items()}


def _gradients(
    encoder: SearchEncoder, turn: dict[SearchRow, list[list[int]]]
) -> dict[SearchRow, tuple[np.ndarray, list]]:
    """Each row's values and gradients, from one batched pass."""
    objectives = [row.objective for row, copies in turn.items() for _ in copies]
    values, gradients = encoder.gradient([ids for copies in turn.values() for ids in copies], objectives)
    ends = np.cumsum([0, *map(len, turn.values())]).tolist()
    return {row: (values[a:b], gradients[a:b]) for row, a, b in zip(turn, ends, ends[1:], strict=False)}


def search(
    encoder: SearchEncoder,
    objective: Objective,
    start: str,
    settings: SearchSettings,
    on_step: Callable[[Step], None] | None = None,
) -> Found:
    """The best string found for one objective, from a start (which may be empty). See search_many."""
    note = (lambda _, step: on_step(step)) if on_step else None
    return search_many(encoder, [objective], [start], settings, note)[0]
