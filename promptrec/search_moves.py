"""What a search may try next: edits of a string's units, ranked by the encoder's gradient or by what tokens add up to.

Does not decide: see token_search.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from promptrec.scoring import unit
from promptrec.search_encoders import PLACEHOLDER

if TYPE_CHECKING:
    from promptrec.search_space import Objective
    from promptrec.token_search import SearchRow

Edit = tuple[int, int, tuple[str, ...]]  # units[start:stop] become these
Edits = tuple[Edit, ...]  # a candidate


def edited(units: Sequence[str], edits: Iterable[Edit]) -> list[str]:
    """Units after edits, which are applied from the right so that positions stay true."""
    units = list(units)
    for start, stop, new in sorted(edits, reverse=True):
        units[start:stop] = new
    return units


def swap(units: Sequence[str], first: int, second: int) -> Edits:
    """Two units change places."""
    return ((first, first + 1, (units[second],)), (second, second + 1, (units[first],)))


def unions(
    objective: Objective,
    base: np.ndarray,
    candidates: Sequence[Edits],
    vectors: np.ndarray,
    longer: np.ndarray,
    room: int,
    sizes: Sequence[int] = (2, 3, 4, 6, 8, 12, 16),
) -> list[Edits]:
    """Unions of candidates that should score best together, if what each does to the embedding [d] adds up.

    Greedy, from the candidates' own embeddings [n, d]. Most edits move the string a little towards the objective and more
    to some side; several whose sides cancel rise where none of them does. Edits of one union touch different places with
    different units, and make the string at most `room` tokens longer (each edit by `longer` [n]).
    """
    steps, total, free, reached = vectors - base, base, np.ones(len(candidates), bool), -np.inf
    touched = [{(start, stop) for start, stop, _ in edits if stop > start} for edits in candidates]
    brought = [{units for _, _, units in edits if units} for edits in candidates]
    union, found = (), []
    for count in range(1, sizes[-1] + 1):
        values = np.where(free & (longer <= room), objective.value(unit(total + steps)), -np.inf)
        top = int(values.argmax())
        if values[top] <= reached:
            break
        reached, total, room, union = values[top], total + steps[top], room - longer[top], union + candidates[top]
        free &= [not (touched[top] & other or brought[top] & new) for other, new in zip(touched, brought, strict=True)]
        free[top] = False
        if count in sizes:
            found.append(union)
    return found


def ranked_moves(row: SearchRow, units: list[str]):
    """Moves by kind, each kind's best estimate first, from one backward pass through the string and a few copies of it.

    Where g is the gradient at a token x, a unit v in its place is estimated to gain (v - x) . g. The same number ranks
    insertions beside x; and, taken at the second of two x in a copy that doubles x, insertions there. An estimate from a
    real token is far better than one from a mask or a mean embedding, which lead into a corner that no text is in.
    """
    words, count = row.units, len(units)
    ids = [words.ids(each) for each in units] or [(PLACEHOLDER,)]
    doubled = row.random.choice(count, min(count, row.settings.places), replace=False).tolist()
    copies = [ids, *([*ids[:at], ids[at], *ids[at:]] for at in doubled)]
    vectors, slopes = yield "gradient", [[index for token_ids in copy for index in token_ids] for copy in copies]
    row.gradients += len(copies)
    values = row.objective.value(vectors)
    ends = np.cumsum([0, *map(len, ids)]).tolist()
    old = np.stack([words.mean_embedding(each) for each in ids])
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


def _best(row: SearchRow, pulls: list, old: np.ndarray, base: np.ndarray, places: list[tuple[int, int]]) -> list[Edits]:
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


def summed_moves(row: SearchRow, units: list[str], often: int = 2) -> list[Edits]:
    """The moves whose sum of token vectors points best along the objective, best first; no pass through the encoder.

    Of a place and of a unit at most `often`, as what is estimated alike mostly scores alike.
    """
    words, chosen, tally = row.units, [], Counter()
    for kind, emptied, word in _by_estimate(_summed_gains(row, units), 8 * row.settings.candidates):
        if len(chosen) == row.settings.candidates:
            break
        place = int(row.random.integers(len(units) + 1)) if kind == "insert" else emptied  # a sum knows no order
        new = () if kind == "delete" else (words.words[word],)
        edits = ((place, place + (kind != "insert"), new),)
        text = words.join(edited(units, edits))
        seldom = tally[new] < often or not new
        if seldom and tally[kind, place] < often and text not in row.known and words.allows(text):
            tally.update([new, (kind, place)])
            chosen.append(edits)
    return chosen


def _summed_gains(row: SearchRow, units: list[str]) -> dict[str, np.ndarray]:
    """For each kind of move the estimated cosine with the objective's slope, [places, V]; [places, 1] of deletions.

    Where the string's vector is known, the estimate starts from it: only what an edit adds and takes away is estimated.
    """
    words, learnt = row.units, row.units.learnt
    held, added = learnt.sums([words.ids(each) for each in units]), words.added  # [n, d], [V, d]
    base = held.sum(0) + learnt.offset
    known = row.vectors.get(words.join(units))
    base = base if known is None else known * np.linalg.norm(base)
    aim = unit(row.objective.slope(unit(base)[None]))[0]
    without = base - held  # [n, d], each place emptied
    gains = {"insert": _along(aim, base[None], added), "replace": _along(aim, without, added)}
    if len(units) > 1:
        gains["delete"] = (without @ aim / np.linalg.norm(without, axis=1))[:, None]
    return gains


def _by_estimate(gains: dict[str, np.ndarray], top: int) -> list[tuple[str, int, int]]:
    """(kind, place, word) of the `top` best moves of each kind, the best of all first."""
    ranked = []
    for kind, table in gains.items():
        flat = table.ravel()
        best = np.argpartition(-flat, min(top, flat.size - 1))[:top] if flat.size else []
        ranked += [(flat[index], kind, *divmod(int(index), table.shape[1])) for index in best]
    return [move for _, *move in sorted(ranked, key=lambda move: -move[0])]


def _along(aim: np.ndarray, bases: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Cosine [n, V] with the aim [d] of each base [n, d] after each addition [V, d]."""
    squares = (bases**2).sum(1)[:, None] + 2 * bases @ added.T + (added**2).sum(1)
    return ((bases @ aim)[:, None] + added @ aim) / np.sqrt(np.maximum(squares, 1e-9))


def shared_out(
    row: SearchRow, units: list[str], tally: dict[str, np.ndarray], moves: dict[str, list[Edits]]
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
