"""Search for the string whose embedding scores best against a weighted set of targets.

value(string) = sum_i w_i * cos(e(string), t_i)**3. With all training prompts as targets the best string is a mean prompt;
with a row's posterior over a prompt bank it is that row's decode; with weighted answers it is an ensemble's blend.

Gradient search ranks every replacement and insertion by one backward pass through the encoder (HotFlip, Ebrahimi et al.
2018; GCG, Zou et al. 2023), encodes the best candidate *strings* exactly, and accepts one only if the objective rises.
Baselines run behind the same interface. Many rows advance in lockstep, so that they share batches and nothing else.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from promptrec.errors import InputError
from promptrec.search_encoders import MAX_TOKENS, PLACEHOLDER, MiniLMEncoder, SearchEncoder, T5Encoder

__all__ = ["Found", "MiniLMEncoder", "Objective", "SearchEncoder", "SearchSettings", "Step", "T5Encoder", "search"]

LEVELS = ("word", "token")
RISE = 1e-6  # fp32 embeddings are not exact beyond this
Edit = tuple[int, int, tuple[str, ...]]  # units[start:stop] become these
Edits = tuple[Edit, ...]  # a candidate


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
        vectors = _unit(np.stack(starts))
        best, best_value = vectors[0], -np.inf
        for _ in range(iterations):
            values = self.value(vectors)
            if values.max() > best_value:
                best, best_value = vectors[values.argmax()], float(values.max())
            vectors = _unit(self.slope(vectors))
        return best, best_value


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float64) / weights.astype(np.float64).sum()


@dataclass(frozen=True)
class SearchSettings:
    """How to search. The budget counts exact encodings of distinct strings."""

    method: str = "gradient"  # or greedy, beam, genetic, random
    level: str = "word"  # "word" stays readable; "token" may use any piece of the vocabulary
    max_tokens: int = MAX_TOKENS  # of the result, special tokens included
    evaluations: int = 2000
    seed: int = 0
    banned: tuple[str, ...] = ()  # words, phrases or pieces, in any case
    vocabulary: tuple[str, ...] = ()  # units to use; empty: the encoder's whole words, or all its pieces
    candidates: int = 32  # strings encoded in a step
    places: int = 4  # units that a step doubles to rank insertions, each one backward pass through one string
    patience: int = 3  # steps without a rise before a climb is stuck
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


class Units:
    """What strings are made of at one level: how they split and join, which units may be used, what is allowed."""

    def __init__(self, encoder: SearchEncoder, settings: SearchSettings) -> None:
        self.encoder, self.max_tokens, self.by_word = encoder, settings.max_tokens, settings.level == "word"
        self.banned = {ban.lower() for ban in settings.banned}
        phrases = "|".join(map(re.escape, sorted(self.banned)))
        self._phrases = re.compile(rf"(?<!\w)(?:{phrases})(?!\w)", re.IGNORECASE) if phrases else None
        self._index = {piece: index for index, piece in enumerate(encoder.pieces)}
        self.ids = lru_cache(maxsize=None)(self._ids)
        default = encoder.whole_words if self.by_word else encoder.ordinary_pieces
        wanted = dict.fromkeys(settings.vocabulary or default())
        self.words = [
            unit for unit in wanted if unit.strip() and self.ids(unit) and not self.is_banned(self.join([unit]))
        ]
        if not self.words:
            raise InputError("search: no word of the vocabulary is left; give other words or ban fewer")
        self.vectors = np.stack([self.mean_embedding(self.ids(unit)) for unit in self.words])  # [V, D]

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


class _Spent(Exception):
    """The row has used its budget, or finds nothing new to try."""


class _Row:
    """One search: its own objective, random numbers, budget, and what it has seen. It knows no other row."""

    def __init__(self, units: Units, objective: Objective, start: str, note: Callable | None, settings: SearchSettings):
        self.units, self.objective, self.settings, self.note = units, objective, settings, note
        self.start = units.split(start)
        self.random = np.random.default_rng(settings.seed)
        self.known: dict[str, float] = {}
        self.exact: set[str] = set()
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

    def values(self, texts: Sequence[str]):
        """Values of the texts [n] (ask with `yield from`); -inf for one not allowed or beyond the budget.

        The highest is exact. The others too, unless the encoder ranks in bfloat16.
        """
        left = self.settings.evaluations - self.evaluations - (not self.units.encoder.ranks_exactly)
        new = [text for text in dict.fromkeys(texts) if text not in self.known and self.units.allows(text)][
            : max(left, 0)
        ]
        self.idle = 0 if new else self.idle + 1
        if left <= 0 or self.idle > 20:
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
        values = self.objective.value((yield kind, texts)).tolist()
        self.known.update(zip(texts, values, strict=True))
        self.exact.update(texts if kind == "encode" or self.units.encoder.ranks_exactly else ())
        self.evaluations += len(texts)

    def _note(self, text: str) -> None:
        value = self.known[text]
        if not self.history or value > self.history[-1].value + RISE:
            self.history.append(Step(self.evaluations, time.perf_counter() - self.began, value, text))
            if self.note:
                self.note(self.history[-1])

    def improve(self, units: list[str], candidates: Sequence[Edits], unite: bool = False):
        """The best of the candidates, or with `unite` of unions of those that rise, if it beats `units`; else `units`."""
        (floor,) = yield from self.values([self.units.join(units)])
        texts = [self.units.join(edited(units, edits)) for edits in candidates]
        values = yield from self.values(texts)
        if unite:
            order = np.argsort(-values, kind="stable").tolist()
            unions = _unions([candidates[index] for index in order if values[index] > floor + RISE])
            texts += [self.units.join(edited(units, edits)) for edits in unions]
            values = (yield from self.values(texts)) if unions else values
        top = int(values.argmax()) if texts else 0
        return self.units.split(texts[top]) if texts and values[top] > floor + RISE else units

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


def edited(units: Sequence[str], edits: Iterable[Edit]) -> list[str]:
    """Units after edits, which are applied from the right so that positions stay true."""
    units = list(units)
    for start, stop, new in sorted(edits, reverse=True):
        units[start:stop] = new
    return units


def swap(units: Sequence[str], first: int, second: int) -> Edits:
    """Two units change places."""
    return ((first, first + 1, (units[second],)), (second, second + 1, (units[first],)))


def _unions(candidates: Iterable[Edits], sizes: Sequence[int] = (2, 3, 4, 6, 8, 12, 16)) -> list[Edits]:
    """Unions of the first 2, 3, ... candidates (best first) that touch different places with different units."""
    union, places, used, count, unions = (), set(), set(), 0, []
    for edits in candidates:
        touched = {(start, stop) for start, stop, _ in edits if stop > start}
        new = {units for _, _, units in edits if units}
        if touched & places or new & used:
            continue
        union, places, used, count = union + edits, places | touched, used | new, count + 1
        if count in sizes:
            unions.append(union)
    return unions


# --- methods: generators that ask for vectors and gradients, and are told


def _gradient(row: _Row):
    """Climb along the encoder's gradient; when stuck, drop some units of the best string and grow again."""
    units, settings = row.start, row.settings
    tally = {kind: np.array([1.0, 4.0]) for kind in ("insert", "double", "replace", "delete", "swap")}  # rises, tries
    for _ in range(settings.restarts + 1):
        stuck = 0
        while stuck < settings.patience:
            moves = _shared_out(row, units, tally, (yield from _ranked(row, units)))
            better = yield from row.improve(units, list(moves), unite=True)
            floor = row.known.get(row.units.join(units), -np.inf) + RISE
            for edits, kind in moves.items():
                tally[kind] = 0.98 * tally[kind] + [
                    row.known.get(row.units.join(edited(units, edits)), -np.inf) > floor,
                    1,
                ]
            stuck = 0 if better != units else stuck + 1
            units = better
        kept = row.random.random(len(row.best)) > row.random.uniform(0.05, 0.4)
        units = [unit for unit, keep in zip(row.best, kept, strict=True) if keep]


def _ranked(row: _Row, units: list[str]):
    """Moves by kind, each kind's best estimate first, from one backward pass through the string and a few copies of it.

    Where g is the gradient at a token x, a unit v in its place is estimated to gain (v - x) . g. The same number ranks
    insertions beside x; and, taken at the second of two x in a copy that doubles x, insertions there. An estimate from a
    real token is far better than one from a mask or a mean embedding, which lead into a corner that no text is in.
    """
    words, count = row.units, len(units)
    ids = [words.ids(unit) for unit in units] or [(PLACEHOLDER,)]
    doubled = row.random.choice(count, min(count, row.settings.places), replace=False).tolist()
    copies = [ids, *([*ids[:at], ids[at], *ids[at:]] for at in doubled)]
    vectors, slopes = yield "gradient", [[index for unit in copy for index in unit] for copy in copies]
    row.gradients += len(copies)
    values = row.objective.value(vectors)
    ends = np.cumsum([0, *map(len, ids)]).tolist()
    old = np.stack([words.mean_embedding(unit) for unit in ids])
    here = [slopes[0][ends[at] : ends[at + 1]].sum(0) for at in range(len(ids))]
    there = [
        slope[ends[at + 1] : 2 * ends[at + 1] - ends[at]].sum(0) for at, slope in zip(doubled, slopes[1:], strict=True)
    ]
    beside = (np.arange(len(ids)) + row.random.integers(2, size=len(ids))).clip(max=count).tolist()
    moves = {
        "insert": _best(row, here, old, np.zeros(len(ids)), [(at, at) for at in beside]),
        "double": _best(row, there, old[doubled], values[1:] - values[0], [(at + 1, at + 1) for at in doubled]),
        "replace": _best(row, here, old, np.zeros(len(ids)), [(at, at + 1) for at in range(count)]),
    }
    if count > 1:
        moves["delete"] = [((at, at + 1, ()),) for at in row.random.permutation(count).tolist()]
        pairs = (row.random.choice(count, 2, replace=False).tolist() for _ in range(row.settings.candidates))
        moves["swap"] = [swap(units, *sorted(pair)) for pair in pairs]
    return moves


def _best(row: _Row, pulls: list, old: np.ndarray, base: np.ndarray, places: list[tuple[int, int]]) -> list[Edits]:
    """Units into places by estimated gain; no unit more than twice, no place with more than a quarter of a step."""
    words, top = row.units, min(row.settings.candidates, len(row.units.words))
    if not places:
        return []
    pulls = np.stack(pulls[: len(places)])
    gains = pulls @ words.vectors.T + (base - (pulls * old).sum(1))[: len(places), None]  # [places, V]
    best = np.argpartition(-gains, top - 1, axis=1)[:, :top]
    place, rank = np.unravel_index(
        np.argsort(-np.take_along_axis(gains, best, 1), axis=None, kind="stable"), best.shape
    )
    chosen, often = [], Counter()
    for at, word in zip(place.tolist(), best[place, rank].tolist(), strict=True):
        if often["place", at] < max(2, row.settings.candidates // 4) and often["unit", word] < 2:
            often.update([("place", at), ("unit", word)])
            chosen.append(((*places[at], (words.words[word],)),))
    return chosen


def _shared_out(
    row: _Row, units: list[str], tally: dict[str, np.ndarray], moves: dict[str, list[Edits]]
) -> dict[Edits, str]:
    """A step's candidates: of each kind the best that are new and allowed, in proportion to how often its moves rose."""
    rates = {kind: tally[kind][0] / tally[kind][1] for kind in moves}
    chosen: dict[Edits, str] = {}
    for kind, ranked in moves.items():
        quota = len(chosen) + max(1, round(row.settings.candidates * rates[kind] / sum(rates.values())))
        for edits in ranked:
            if len(chosen) >= quota:
                break
            text = row.units.join(edited(units, edits))
            if text not in row.known and row.units.allows(text):
                chosen[edits] = kind
    return chosen


def _greedy(row: _Row):
    """Append whichever unit of the whole vocabulary helps most, until none does (4th place)."""
    units, longer = None, row.start
    while longer != units:
        units, every = longer, row.random.permutation(len(row.units.words))
        longer = yield from row.improve(units, [((len(units),) * 2 + ((row.units.words[at],),),) for at in every])


def _beam(row: _Row):
    """Append drawn units to the best few strings of a length, a rise or not (7th place); then from the start again."""
    for _ in range(row.settings.restarts + 1):
        beams = [row.start]
        while beams:
            longer = [[*units, word] for units in beams for word in row.draw(row.settings.candidates)]
            values = yield from row.values([row.units.join(units) for units in longer])
            order = np.argsort(-values, kind="stable")[: row.settings.width]
            beams = [longer[index] for index in order if np.isfinite(values[index])]


def _genetic(row: _Row):
    """Children of two good strings, head of one and tail of the other, each with a random edit."""
    members = [edited(row.start, row.random_edit(row.start)) for _ in range(row.settings.candidates)]
    while True:
        values = yield from row.values([row.units.join(units) for units in members])
        order = np.argsort(-values, kind="stable")[: row.settings.width]
        parents = [members[index] for index in order if np.isfinite(values[index])] or [row.start]
        children = []
        for _ in range(row.settings.candidates):
            head, tail = (parents[index] for index in row.random.integers(len(parents), size=2))
            child = head[: row.random.integers(len(head) + 1)] + tail[row.random.integers(len(tail) + 1) :]
            children.append(edited(child, row.random_edit(child)))
        members = parents + children


def _random(row: _Row):
    """Random edits of the best string, kept if it rises (6th place)."""
    units = row.start
    while True:
        units = yield from row.improve(units, [row.random_edit(units) for _ in range(row.settings.candidates)])


METHODS = {"gradient": _gradient, "greedy": _greedy, "beam": _beam, "genetic": _genetic, "random": _random}


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
    units = Units(encoder, settings)
    for start in starts:
        units.check_start(start)
    notes = [partial(on_step, index) if on_step else None for index in range(len(starts))]
    rows = [_Row(units, *each, settings) for each in zip(objectives, starts, notes, strict=True)]
    known: dict[tuple[str, str], np.ndarray] = {}
    asked = {row: ask for row in rows if (ask := row.go_on(None))}
    while asked:
        kind = Counter(kind for kind, _ in asked.values()).most_common(1)[0][0]
        turn = {row: items for row, (ask, items) in asked.items() if ask == kind}
        answers = _gradients(encoder, turn) if kind == "gradient" else _vectors(encoder, kind, turn, known)
        asked = {row: ask for row, ask in asked.items() if row not in turn}
        asked |= {row: ask for row, answer in answers.items() if (ask := row.go_on(answer))}
    return [row.found() for row in rows]


def _vectors(encoder: SearchEncoder, kind: str, turn: dict[_Row, list[str]], known: dict) -> dict[_Row, np.ndarray]:
    """Each row's vectors [n, d]; what any row asked for before is not encoded again."""
    exact = kind == "encode" or encoder.ranks_exactly
    new = sorted({text for texts in turn.values() for text in texts if (exact, text) not in known})
    known.update(zip([(exact, text) for text in new], encoder.encode(new, exact), strict=True))
    return {row: np.stack([known[exact, text] for text in texts]) for row, texts in turn.items()}


def _gradients(encoder: SearchEncoder, turn: dict[_Row, list[list[int]]]) -> dict[_Row, tuple[np.ndarray, list]]:
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
