"""TRL's trainer as the LoRA runs need it: rows of like length together, the answer's loss, SCS at every evaluation.

Knows no adapter and no quantisation; lora.py hands it a model and the loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import gcd
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from promptrec.distributed import gather, world
from promptrec.errors import InputError
from promptrec.language_model import compute_dtype
from promptrec.tables import progress

if TYPE_CHECKING:
    from promptrec.lora import LoraSettings


class LengthGroupedSampler(Sampler):
    """Shuffled rows whose batches hold texts of similar length, so that little is spent on padding.

    The order depends on (seed, epoch) alone; a run resumed in its third epoch sees the rows as the uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 16) -> None:
        self.lengths, self.batch_size, self.seed, self.pool, self.epoch = np.asarray(lengths), batch_size, seed, pool, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order, size = rng.permutation(len(self.lengths)), self.batch_size * self.pool
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        ordered = np.concatenate([pool[np.argsort(-self.lengths[pool], kind="stable")] for pool in pools])
        batches = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        full = len(self.lengths) // self.batch_size  # a last, shorter batch stays last
        order = [*rng.permutation(full), *range(full, len(batches))]
        return iter(np.concatenate([batches[number] for number in order]).tolist())


class AnswerOnlyTrainer(SFTTrainer):
    """TRL's SFTTrainer with a loss of our own and SCS on held-out prompts as an evaluation metric.

    `loss(model, inputs, count)` becomes the model's forward: DDP, FSDP and DeepSpeed gather weights and reduce
    gradients around a forward pass, and of a loss computed beside it they would see nothing.
    `rows_a_group` rows of like length lie together; it does not depend on the number of processes, nor does the order.
    """

    def __init__(
        self,
        *args,
        loss: Callable,
        rows_a_group: int,
        held_out_scs: Callable[[PreTrainedModel], float] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.held_out_scs, self.rows_a_group = held_out_scs, rows_a_group
        self.model.forward = MethodType(loss, self.model)
        self.model_accepts_loss_kwargs = True  # num_items_in_batch reaches compute_loss

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        return LengthGroupedSampler(lengths, self.rows_a_group, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(inputs, num_items_in_batch)
        if num_items_in_batch is not None:  # the answer tokens of all processes, over which DDP takes the mean
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super(SFTTrainer, self).log(logs, *args, **kwargs)  # SFTTrainer's own adds metrics from whole-sequence logits

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.held_out_scs is not None:
            self.model.eval()
            metrics["eval_scs"] = self.held_out_scs(self.model)
            self.log({"eval_scs": metrics["eval_scs"]})
        if self.args.use_cpu:
            # Evaluation packs 4-bit weights into a layout without gradients, on CPUs that know bf16. Reading them as a
            # state unpacks them; saving a checkpoint does so, too, but only in the process that saves.
            self.model.state_dict()
        return metrics


class Bar(TrainerCallback):
    """A progress bar over the steps with what was logged last; silent where there is no terminal."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress(None, desc="fine-tune", total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told |= {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss", "eval_scs") if name in logs}
        self.bar.set_postfix(self.told)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class TimeBudget(TrainerCallback):
    """Stops training, after saving, before a notebook session is cut off; all processes at the same step."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started = seconds, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.seconds and any(gather([time.monotonic() - self.started > self.seconds])):
            control.should_save = control.should_evaluate = control.should_training_stop = True
        return control


def batch_share(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """(batch size, accumulation) of each process, so that together they take the step that one would take.

    Fewer batches to a step first, then smaller ones. Raises InputError where a step cannot be shared out evenly.
    """
    fewer = gcd(accumulation, processes)
    smaller, rest = divmod(batch_size, processes // fewer)
    if rest:
        raise InputError(
            f"{processes} processes cannot share a step of {accumulation} x {batch_size} rows evenly; "
            f"use fewer, or another batch_size"
        )
    return smaller, accumulation // fewer


def training_arguments(settings: LoraSettings, folder: Path, by_scs: bool = True) -> SFTConfig:
    """The settings in the trainer's terms, shared out among the processes of this run."""
    on_gpu = torch.cuda.is_available()
    constant = (
        settings.schedule == "constant" and settings.warmup > 0
    )  # transformers' own constant one does not warm up
    batch_size, accumulation = batch_share(settings.batch_size, settings.accumulation, world())
    return SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=f"{settings.schedule}_with_warmup" if constant else settings.schedule,
        warmup_steps=int(settings.warmup * settings.steps),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=settings.clip,
        optim=settings.optimizer,
        gradient_checkpointing=settings.gradient_checkpointing,
        ddp_find_unused_parameters=False,
        eval_strategy="steps",
        save_strategy="steps",
        logging_steps=max(1, settings.evaluate_every // 5),
        eval_steps=settings.evaluate_every,
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_scs" if by_scs else "eval_loss",
        greater_is_better=by_scs,
        use_cpu=not on_gpu,
        fp16=on_gpu and compute_dtype() == torch.float16,
        bf16=on_gpu and compute_dtype() == torch.bfloat16,
        report_to=settings.report_to,
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, or None. A checkpoint is complete once its trainer state is written (last)."""
    complete = [path for path in Path(folder).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def training_history(log: Sequence[dict]) -> pd.DataFrame:
    """The trainer's log as one row a step: step, loss, eval_loss, scs, learning_rate (NaN where not measured)."""
    names = {"loss": "loss", "eval_loss": "eval_loss", "eval_scs": "scs", "learning_rate": "learning_rate"}
    rows: dict[int, dict] = {}
    for entry in log:
        rows.setdefault(entry["step"], {}).update({ours: entry[key] for key, ours in names.items() if key in entry})
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(names.values())).sort_index()
    return table.rename_axis("step").reset_index().astype({"step": np.int64})
