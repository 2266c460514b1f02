"""The trainer's own parts: the order of the rows, the time budget, what counts as a checkpoint, the history."""

import random
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm
from transformers import get_scheduler

from promptrec.errors import InputError
from promptrec.lora import T4
from promptrec.profiles import override
from promptrec.sft_trainer import (
    Bar,
    LengthGroupedSampler,
    batch_share,
    last_checkpoint,
    training_arguments,
    training_history,
)


def test_sampler_shows_every_row_once_and_depends_on_seed_and_epoch_only():
    lengths = list(range(50))
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = LengthGroupedSampler(lengths, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        orders[seed, epoch] = list(sampler)
        assert sorted(orders[seed, epoch]) == lengths and list(sampler) == orders[seed, epoch]
    assert len({tuple(order) for order in orders.values()}) == 3


def test_batches_hold_similar_lengths():
    lengths = random.Random(0).choices(range(20, 400), k=256)
    order = list(LengthGroupedSampler(lengths, batch_size=8, seed=0))
    spread = [max(batch) - min(batch) for batch in ([lengths[i] for i in order[s : s + 8]] for s in range(0, 256, 8))]
    assert sum(spread) / len(spread) < 60  # a random order spreads over some 300 tokens


def test_the_newest_complete_checkpoint_counts(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (4, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:  # the last one was being written when the run was killed
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")


def test_the_log_becomes_one_row_a_step():
    log = [{"step": 2, "loss": 3.0, "learning_rate": 0.1}, {"step": 4, "loss": 2.0}, {"step": 4, "eval_loss": 1.5}]
    table = training_history([*log, {"step": 4, "eval_scs": 0.6, "epoch": 1.0}])
    assert table["step"].tolist() == [2, 4]
    assert table.iloc[1][["loss", "eval_loss", "scs"]].tolist() == [2.0, 1.5, pytest.approx(0.6)]
    assert table.iloc[0][["eval_loss", "scs"]].isna().all()


@pytest.mark.parametrize(
    ("step", "processes", "share"),
    [((16, 1), 1, (16, 1)), ((16, 1), 2, (8, 1)), ((1, 8), 8, (1, 1)), ((1, 8), 2, (1, 4)), ((4, 6), 4, (2, 3))],
)
def test_processes_together_take_the_step_of_one(step, processes, share):
    assert batch_share(*step, processes) == share
    assert share[0] * share[1] * processes == step[0] * step[1]


def test_a_step_that_cannot_be_shared_out_is_refused():
    with pytest.raises(InputError, match="3 processes cannot share a step of 8 x 1 rows evenly"):
        batch_share(1, 8, 3)


def test_a_constant_learning_rate_warms_up_where_it_is_asked_to(tmp_path):
    settings = override(T4, optimizer="adamw_torch")
    assert settings.schedule == "constant" and settings.warmup > 0
    arguments = training_arguments(settings, tmp_path)
    rates = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=settings.learning_rate)
    schedule = get_scheduler(arguments.lr_scheduler_type, rates, arguments.warmup_steps, settings.steps)
    assert schedule.get_last_lr() == [0.0]
    for _ in range(arguments.warmup_steps):
        rates.step()
        schedule.step()
    assert schedule.get_last_lr() == [settings.learning_rate]
    assert training_arguments(override(settings, warmup=0.0), tmp_path).lr_scheduler_type == "constant"


def test_the_bar_tells_the_step_and_what_was_logged_last(monkeypatch, capsys):
    monkeypatch.setattr("promptrec.sft_trainer.progress", lambda *given, **options: tqdm(*given, ncols=120, **options))
    bar, state = Bar(), SimpleNamespace(max_steps=8, global_step=2)  # a run that goes on at step 2
    bar.on_train_begin(None, state, None)
    for step, logs in ((3, {"loss": 1.5}), (4, {"eval_loss": 2.25, "eval_runtime": 9.0})):
        state.global_step = step
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs=logs)
    bar.on_train_end(None, state, None)
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert "4/8" in last and "loss=1.500" in last and "eval_loss=2.250" in last and "runtime" not in last
