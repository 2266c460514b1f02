"""What the small models share: how two texts share the room, how a loss is minimised, in which order rows come."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from promptrec.small_models import frame, optimise, shuffled_batches

SETTINGS = SimpleNamespace(steps=90, batch_size=2, learning_rate=0.1, weight_decay=0.0, seed=0)


@pytest.mark.parametrize(("first", "second"), [(30, 30), (3, 30), (30, 3), (3, 3), (0, 40)])
def test_the_texts_share_the_room_that_the_task_leaves(first, second):
    original, rewritten, between = [1] * first, [2] * second, [9] * 7
    ids = frame(original, rewritten, between, 27)
    assert len(ids) == min(27, first + second + 7) and ids.count(9) == 7
    assert ids == [1] * ids.count(1) + between + [2] * ids.count(2)
    assert ids.count(1) >= min(first, 10) and ids.count(2) >= min(second, 10)


def test_optimise_finds_a_minimum_and_sees_every_row_once_an_epoch():
    weight, seen = torch.nn.Parameter(torch.tensor([3.0])), []

    def loss(batch):
        seen.extend(batch.tolist())
        return ((weight - 1) ** 2).sum()

    losses = optimise([weight], loss, 6, SETTINGS, "toy")
    assert len(losses) == 90 and losses[-1] < 0.01 < losses[0]
    assert sorted(seen[:6]) == sorted(seen[6:12]) == list(range(6)) and seen[:6] != seen[6:12]


@pytest.mark.parametrize(("rows", "size"), [(6, 2), (7, 3), (5, 5), (2, 5)])
def test_batches_are_full_and_hold_every_row_equally_often(rows, size):
    drawn = list(shuffled_batches(rows, size, 2 * rows, seed=3))
    assert [len(batch) for batch in drawn] == [size] * (2 * rows)
    assert (np.bincount(np.concatenate(drawn)) == 2 * size).all()
    assert np.array_equal(drawn, list(shuffled_batches(rows, size, 2 * rows, seed=3)))
    assert not np.array_equal(drawn, list(shuffled_batches(rows, size, 2 * rows, seed=4)))
