"""Ways to search for a string: generators that ask a row for vectors and gradients, and are told.

Each climbs one row's objective; who answers them, and in which batches, is not theirs to know: see token_search.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from promptrec.search_moves import edited, ranked_moves, shared_out, summed_moves
from promptrec.search_space import RISE

if TYPE_CHECKING:
    from promptrec.token_search import SearchRow

DROPPED = (0.01, 0.4)  # share of the units that a stuck search drops, from and to


def _gradient(row: SearchRow):
    """Climb along the encoder's gradient."""
    tally = {kind: np.array([1.0, 4.0]) for kind in ("insert", "double", "replace", "delete", "swap")}  # rises, tries

    def step(units: list[str]):
        moves = shared_out(row, units, tally, (yield from ranked_moves(row, units)))
        better = yield from row.improve(units, list(moves), unite=True)
        floor = row.known.get(row.units.join(units), -np.inf) + RISE
        for edits, kind in moves.items():
            rose = row.known.get(row.units.join(edited(units, edits)), -np.inf) > floor
            tally[kind] = 0.98 * tally[kind] + [rose, 1]
        return better

    yield from _climb(row, step)


def _surrogate(row: SearchRow):
    """Climb by what tokens add up to: as many strings rise as by the gradient, and no backward pass is paid."""

    def step(units: list[str]):
        if units:
            yield from row.values([row.units.join(units)])
        return (yield from row.improve(units, summed_moves(row, units), unite=True))

    yield from _climb(row, step)


def _climb(row: SearchRow, step: Callable):
    """Step by step from the start; when stuck, drop a few units of the best string and grow again."""
    units, settings = row.start, row.settings
    for _ in range(settings.restarts + 1):
        stuck = 0
        while stuck < settings.patience:
            better = yield from step(units)
            stuck = 0 if better != units else stuck + 1
            units = better
        # a small drop finds its way back, a large one leaves the hill
        share = np.exp(row.random.uniform(*np.log(DROPPED)))
        kept = row.random.random(len(row.best)) > share
        units = [unit for unit, keep in zip(row.best, kept, strict=True) if keep]


def _greedy(row: SearchRow):
    """Append whichever unit of the whole vocabulary helps most, until none does (4th place)."""
    units, longer = None, row.start
    while longer != units:
        units, every = longer, row.random.permutation(len(row.units.words))
        longer = yield from row.improve(units, [((len(units),) * 2 + ((row.units.words[at],),),) for at in every])


def _beam(row: SearchRow):
    """Append drawn units to the best few strings of a length, a rise or not (7th place); then from the start again."""
    for _ in range(row.settings.restarts + 1):
        beams = [row.start]
        while beams:
            longer = [[*units, word] for units in beams for word in row.draw(row.settings.candidates)]
            values = yield from row.values([row.units.join(units) for units in longer])
            order = np.argsort(-values, kind="stable")[: row.settings.width]
            beams = [longer[index] for index in order if np.isfinite(values[index])]


def _genetic(row: SearchRow):
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


def _random(row: SearchRow):
    """Random edits of the best string, kept if it rises (6th place)."""
    units = row.start
    while True:
        units = yield from row.improve(units, [row.random_edit(units) for _ in range(row.settings.candidates)])


METHODS = {
    "gradient": _gradient,
    "surrogate": _surrogate,
    "greedy": _greedy,
    "beam": _beam,
    "genetic": _genetic,
    "random": _random,
}
