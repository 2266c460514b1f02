"""Unions of edits: those that score best if effects add up, compatible, within the room there is."""

import numpy as np
import pytest

from promptrec.scoring import unit
from promptrec.search_moves import edited, swap, unions
from promptrec.search_space import Objective

GOAL = Objective(np.eye(3)[:1], np.ones(1))
BASE = unit(np.array([1.0, 0.0, 0.3]))
SIDE = np.array([[0.0, 0.35, -0.1], [0.0, -0.35, -0.1], [0.0, 0.0, 0.5]])  # two that cancel sideways, one that is bad


def test_edits_apply_from_the_right():
    assert edited(["a", "b", "c"], (*swap(["a", "b", "c"], 0, 2), (1, 1, ("x",)))) == ["c", "x", "b", "a"]


def test_edits_that_fall_alone_are_united_where_their_sides_cancel():
    moved = BASE + SIDE
    assert (GOAL.value(unit(moved)) < GOAL.value(BASE[None])).all()
    edits = [((at, at, (word,)),) for at, word in enumerate("xyz")]
    (pair,) = unions(GOAL, BASE, edits, moved, np.ones(3, int), room=9, sizes=(2,))
    assert pair == edits[0] + edits[1]


@pytest.mark.parametrize(
    "edits",
    [
        [((0, 1, ("x",)),), ((0, 1, ("y",)),)],  # the same place
        [((0, 0, ("x",)),), ((2, 2, ("x",)),)],  # the same unit
    ],
)
def test_edits_that_clash_are_not_united(edits):
    assert unions(GOAL, BASE, edits, BASE + SIDE[:2], np.ones(2, int), room=9) == []


def test_a_union_keeps_to_the_room_that_is_left():
    edits = [((0, 0, ("x",)),), ((1, 1, ("y",)),)]
    assert unions(GOAL, BASE, edits, BASE + SIDE[:2], np.ones(2, int), room=1) == []
    assert unions(GOAL, BASE, edits, BASE + SIDE[:2], np.ones(2, int), room=2) == [edits[0] + edits[1]]
