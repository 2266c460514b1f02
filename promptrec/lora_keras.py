"""LoRA fine-tuning in Keras on JAX: the TPU way of lora.py, and a Recoverer that answers with the result.

As there, the loss covers the answer only, the checkpoint with the highest SCS on held-out prompt clusters is kept,
and a run that was killed goes on from its last checkpoint. The base is not quantised: sharding makes it fit instead.
Texts are padded to a few lengths, because JAX compiles the training step once for every shape it sees.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.errors import InputError
from promptrec.inference import CURRENT, LanguageModelRecoverer
from promptrec.keras_batches import Encoded, batch_of, epoch_of, training_batches
from promptrec.profiles import Profile
from promptrec.rewriters.keras_gemma import (
    KerasGeneration,
    end_ids,
    generate,
    load_gemma,
    token_ids,
)
from promptrec.tables import full_disk_named, read_json, read_table, write_json, write_table
from promptrec.templates import chat_of
from promptrec.training_run import check_training, claim_folder, fit_texts

ALL_LINEAR = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
ADAPTER = "adapter.lora.h5"


@dataclass(frozen=True)
class KerasLoraSettings:
    """Fine-tuning settings in the words of lora.LoraSettings; the defaults are meant for a 7B model on a TPU v3-8.

    There is no alpha: Keras' adapter file does not hold one, so the update is B A x, as with alpha = rank in peft.
    """

    # --- adapter
    rank: int = 16
    target_layer_names: tuple = ALL_LINEAR
    # --- optimisation
    steps: int = 525
    learning_rate: float = 2e-4
    schedule: str = "cosine"  # or "constant"; both after a linear warm-up
    warmup: float = 0.05  # share of the steps
    batch_size: int = 2
    accumulation: int = 4  # batches to a step
    clip: float = 1.0
    gradient_checkpointing: bool = True
    # --- text
    max_tokens: int = 1024
    # --- watching
    evaluate_every: int = 75
    validation_rows: int = 64
    seed: int = 0
    time_budget: float = 0.0  # seconds; 0: none. Training stops and saves before it is over


V3_8 = KerasLoraSettings(time_budget=8.0 * 3600)


def encode_row(tokenizer, row: pd.Series, chat: str, max_tokens: int) -> Encoded:
    """Request and answer of one triple. Texts too long for `max_tokens` lose words at their ends; the answer none."""
    request, answer = fit_texts(row, chat, partial(token_ids, tokenizer), max_tokens)
    return Encoded((*request, *answer), len(request))


def encode_table(tokenizer, table: pd.DataFrame, chat: str, max_tokens: int) -> list[Encoded]:
    """All rows encoded. Raises InputError for missing columns, blank cells or an unfit tokenizer; no row is dropped."""
    check_training(table)
    end_ids(tokenizer, chat_of(chat).after_model)
    return [encode_row(tokenizer, row, chat, max_tokens) for _, row in table.iterrows()]


def attach_lora(model, settings: KerasLoraSettings) -> None:
    """A fresh adapter on the frozen base, in fp32: kernel + A B, with B = 0 at the start (Hu et al., LoRA, 2021)."""
    unknown = sorted(set(settings.target_layer_names) - set(ALL_LINEAR))
    if unknown or not settings.target_layer_names:
        raise InputError(f"target_layer_names: {', '.join(unknown) or 'none'}; choose from {', '.join(ALL_LINEAR)}")
    import keras

    keras.utils.set_random_seed(settings.seed)
    model.backbone.enable_lora(settings.rank, target_layer_names=list(settings.target_layer_names))


def compile_for_training(model, settings: KerasLoraSettings) -> None:
    """Loss, optimizer (its state is made here, laid out like the adapter) and greedy generation."""
    import keras

    # The default reduction divides by all positions: the loss of a short answer would almost vanish.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    accumulation = settings.accumulation if settings.accumulation > 1 else None
    optimizer = keras.optimizers.Adam(
        learning_rates(settings), global_clipnorm=settings.clip, gradient_accumulation_steps=accumulation
    )
    optimizer.build(model.trainable_variables)
    model.compile(optimizer=optimizer, loss=loss, weighted_metrics=[], sampler="greedy")


def learning_rates(settings: KerasLoraSettings):
    """A linear warm-up, then a cosine to zero or a constant rate. Keras counts batches here, not steps."""
    if settings.schedule not in ("cosine", "constant"):
        raise InputError(f"schedule {settings.schedule!r} is unknown; choose cosine or constant")
    import keras

    warmup = int(settings.warmup * settings.steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else settings.learning_rate,
        max(1, settings.steps - warmup) * settings.accumulation,
        alpha=0.0 if settings.schedule == "cosine" else 1.0,
        warmup_target=settings.learning_rate if warmup else None,
        warmup_steps=warmup * settings.accumulation,
    )


def finetune(
    train: pd.DataFrame,
    validation: pd.DataFrame,
    base_model: str,
    out: str | Path,
    settings: KerasLoraSettings | None = None,
    chat: str = "gemma",
    held_out_scs: Callable[[object, object], float] | None = None,
    shard: bool = True,
) -> pd.DataFrame:
    """Fine-tune and save the best adapter (`out`/adapter.lora.h5); returns the history, as lora.finetune does.

    Checkpoints lie in `out`/checkpoints; started again with the same `out`, training goes on from the last one.
    A finished run is not repeated; a folder that holds a run with other settings or data is refused (InputError).
    `held_out_scs(model, tokenizer)` is called at every evaluation; without it the lowest loss decides.
    """
    settings, out, started = settings or KerasLoraSettings(), Path(out), time.monotonic()
    if claim_folder(out, settings, train, base_model, ADAPTER):
        return read_table(out / "history.csv")
    model, tokenizer = load_gemma(base_model, shard, settings.gradient_checkpointing)
    attach_lora(model, settings)
    compile_for_training(model, settings)
    rows, watched = (encode_table(tokenizer, table, chat, settings.max_tokens) for table in (train, validation))
    history = restore(model, out / "checkpoints")
    deadline = started + (settings.time_budget or math.inf)
    with full_disk_named(out):
        while (step := steps_done(model)) < settings.steps and (not history or time.monotonic() < deadline):
            stop = min(step - step % settings.evaluate_every + settings.evaluate_every, settings.steps)
            loss = fit(model, rows, settings, step, stop, deadline)
            history.append(
                {
                    "step": steps_done(model),
                    "loss": loss,
                    "eval_loss": evaluate(model, watched, settings.batch_size),
                    "scs": held_out_scs(model, tokenizer) if held_out_scs else None,
                    "learning_rate": float(np.asarray(model.optimizer.learning_rate)),
                }
            )
            if is_best(history):
                save_adapter(model, out / ADAPTER)
            save_checkpoint(model, out / "checkpoints", history)
        table = pd.DataFrame(history).astype({"step": np.int64, "scs": float})
        write_table(table, out / "history.csv")
    return table


def steps_done(model) -> int:
    """Training steps so far: the optimizer's own count, which is saved and restored with its state."""
    return int(np.asarray(model.optimizer.iterations))


def fit(model, rows: Sequence[Encoded], settings: KerasLoraSettings, step: int, stop: int, deadline: float) -> float:
    """Train from `step` to `stop`, or until `deadline` (time.monotonic seconds) is past; returns the mean loss."""
    import keras

    def check(batch, logs) -> None:  # between steps only: a step that was begun would be lost
        model.stop_training = (batch + 1) % settings.accumulation == 0 and time.monotonic() > deadline

    start, end = step * settings.accumulation, stop * settings.accumulation
    # Keras' own fit: the one of keras_hub turns its data into a tf.data set, which batches of several shapes are not
    done = keras.Model.fit(
        model,
        training_batches(rows, settings.batch_size, settings.seed, start, end),
        steps_per_epoch=end - start,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=check)],
    )
    return done.history["loss"][-1]


def evaluate(model, rows: Sequence[Encoded], size: int) -> float:
    """Mean cross-entropy over all answer tokens of the rows."""
    losses, tokens = [], []
    for batch in epoch_of(rows, size):
        inputs, following, weights = batch_of(batch, size)
        losses.append(float(model.test_on_batch(inputs, following, weights, return_dict=True)["loss"]))
        tokens.append(weights.sum())
    return float(np.average(losses, weights=tokens))


def is_best(history: Sequence[dict]) -> bool:
    """Whether the last evaluation is better than all before it: by SCS where it was measured, else by loss."""
    values = [row["scs"] if row["scs"] is not None else -row["eval_loss"] for row in history]
    return all(values[-1] > value for value in values[:-1])


def save_adapter(model, path: Path) -> None:
    """Write the adapter atomically: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    model.backbone.save_lora_weights(str(temporary))
    os.replace(temporary, path)


def save_checkpoint(model, folder: Path, history: list[dict], keep: int = 2) -> None:
    """Adapter, optimizer state (arrays, no pickle) and history. Complete once history.json is written, last."""
    path = folder / f"checkpoint-{steps_done(model)}"
    save_adapter(model, path / ADAPTER)
    state: dict[str, np.ndarray] = {}
    model.optimizer.save_own_variables(state)
    np.savez(path / "optimizer.npz", **state)
    write_json(history, path / "history.json")
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, oldest first."""
    found = [path.parent for path in Path(folder).glob("checkpoint-*/history.json")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def restore(model, folder: Path) -> list[dict]:
    """Put the last complete checkpoint into model and optimizer; returns its history, [] where there is none."""
    if not (found := complete_checkpoints(folder)):
        return []
    model.backbone.load_lora_weights(str(found[-1] / ADAPTER))
    with np.load(found[-1] / "optimizer.npz", allow_pickle=False) as state:
        model.optimizer.load_own_variables(state)
    return read_json(found[-1] / "history.json")


def use_adapter(model, adapter: str | Path | None) -> None:
    """Make the model answer with a saved adapter (folder or .lora.h5 file), or without any (None).

    LoRA is switched on where it is off, with the file's rank and targets. Off again means B = 0: the compiled
    functions stay valid, so switching costs no compilation.
    """
    layers = [layer for layer in model.backbone._flatten_layers(include_self=False) if layer.weights]
    if adapter is None:
        for layer in layers:
            if getattr(layer, "lora_enabled", False):
                layer.lora_kernel_b.assign(np.zeros(layer.lora_kernel_b.shape, dtype=np.float32))
        return
    path = adapter_file(adapter)
    rank, adapted = adapted_layers(path)
    if not adapted or adapted[-1] >= len(layers):
        raise InputError(f"{path}: made for another base (layer {adapted[-1:]}); this one has {len(layers)} layers")
    if not any(getattr(layer, "lora_enabled", False) for layer in layers):
        model.backbone.enable_lora(rank, target_layer_names=sorted({layers[number].name for number in adapted}))
        model.compile(sampler="greedy")  # drops what was compiled without LoRA
    carried = [number for number, layer in enumerate(layers) if getattr(layer, "lora_enabled", False)]
    if adapted != carried:
        raise InputError(
            f"{path}: adapts {len(adapted)} layers, the model carries LoRA on {len(carried)}; load it anew"
        )
    try:
        model.backbone.load_lora_weights(str(path))
    except ValueError as error:
        raise InputError(f"{path}: does not fit the model ({str(error).splitlines()[0][:160]})") from None


def adapter_file(adapter: str | Path) -> Path:
    """The .lora.h5 file of an adapter folder (or the file itself). Raises InputError where there is none."""
    path = Path(adapter) / ADAPTER if Path(adapter).is_dir() else Path(adapter)
    if not path.is_file():
        peft = (Path(adapter) / "adapter_model.safetensors").is_file()
        remedy = "convert it with promptrec.adapters.peft_to_keras" if peft else "run Part 2 (promptrec finetune)"
        raise InputError(f"{path}: no such adapter; {remedy} or attach one")
    return path


def adapted_layers(path: Path) -> tuple[int, list[int]]:
    """(rank, numbers of the adapted layers) of a file that save_lora_weights wrote."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return int(file["lora/vars/rank"][()]), sorted(int(name) for name in file["lora"] if name != "vars")
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: not a Keras LoRA file ({str(error).splitlines()[0][:120]})") from None


@dataclass
class KerasRecoverer(LanguageModelRecoverer):
    """A Keras Gemma asked for the prompt: LanguageModelRecoverer's contract, log and resume, another engine.

    `adapter` is a saved adapter (folder or file), None for the base alone, or CURRENT for the weights as they are.
    Recoverers may share one model; each puts its adapter in before it answers.
    """

    def _generate(self, requests: list[str], keep: Callable[[list[int], list[str]], None]) -> list[str]:
        if self.adapter != CURRENT:
            use_adapter(self.model, self.adapter)
        return generate(
            self.model,
            self.tokenizer,
            requests,
            self.settings or KerasGeneration(),
            stop=chat_of(self.chat).after_model,
            description=self.name,
            on_batch=keep,
            stop_after=self.stop_after,
        )


def load_recoverer(
    profile: Profile, name: str, adapter: str | Path | None = None, shots: Sequence = ()
) -> KerasRecoverer:
    """A recoverer on the profile's base model, with or without an adapter."""
    if adapter is not None:
        adapter_file(adapter)  # said before minutes go into loading the base
    model, tokenizer = load_gemma(profile.base_model)
    return KerasRecoverer(model, tokenizer, name, adapter=adapter, shots=shots, chat=profile.chat)
