"""What to fine-tune a causal LM on: the answer or the whole text, all triples or few, of many prompts or of few.

Gan et al. (2024) and others report that a small set beats a large one, that a loss over the whole text overfits, and that
the diversity of the prompts matters. Here each is one change of the same fine-tuning: steps, batches, lengths stay.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from promptrec.errors import InputError
from promptrec.inference import LanguageModelRecoverer, held_out_scs
from promptrec.language_model import generation_settings
from promptrec.lora import T4, LoraSettings, finetune
from promptrec.profiles import preset
from promptrec.prompting import build_prompted

if TYPE_CHECKING:
    from promptrec.methods import Task

COMPARED = LoraSettings(steps=100, batch_size=16, max_tokens=128, evaluate_every=100, validation_rows=16)


def train_adapter(task: Task, folder: str | Path, **changes: object) -> Path:
    """Fine-tune the profile's base model on the task's triples with what all compared adapters share; the folder.

    `changes` are settings of lora.LoraSettings. Where a run evaluates on its way, the best checkpoint by SCS is kept,
    else the last. A finished folder is not trained again.
    """
    profile = task.profile
    settings = preset(profile, COMPARED, T4, seed=task.seed, **changes)
    watched = task.validation.sample(min(len(task.validation), settings.validation_rows), random_state=task.seed)
    measure = None
    if settings.evaluate_every < settings.steps:
        measure = held_out_scs(watched, task.scorer, profile.chat, generation_settings(profile))
    history = finetune(task.train, watched, profile.base_model, folder, settings, profile.chat, measure)
    if (reached := int(history["step"].max())) < settings.steps:
        raise InputError(f"{folder}: its time was over at step {reached} of {settings.steps}; the same call goes on")
    return Path(folder)


def subset(train: pd.DataFrame, groups: np.ndarray, rows: int, clusters: int = 0, seed: int = 0) -> pd.DataFrame:
    """At most `rows` triples drawn at random; with `clusters`, equally many of each of so many prompt clusters.

    groups: prompt cluster of each triple, [n]. Clusters too small for their share are taken last.
    Raises InputError unless there is at least a row for each cluster.
    """
    if rows < max(1, clusters):
        raise InputError(f"{rows} training rows cannot hold {clusters} prompt clusters; allow at least a row each")
    drawn = train.assign(prompt_cluster=groups).sample(frac=1, random_state=seed)
    if clusters:
        share = rows // clusters
        sizes = drawn["prompt_cluster"].value_counts(sort=False).clip(upper=share)
        kept = sizes.sort_values(ascending=False, kind="stable").index[:clusters]
        drawn = drawn[drawn["prompt_cluster"].isin(kept)].groupby("prompt_cluster").head(share)
    return drawn.head(rows).reset_index(drop=True)


def build(
    task: Task,
    variant: str = "",
    loss: str = "answer",
    rows: int = 0,
    clusters: int = 0,
    folder: str | Path | None = None,
) -> LanguageModelRecoverer:
    """The base model with an adapter of its own: another loss, or fewer `rows` (0: all) of few `clusters` (0: any).

    `variant` goes into its name. The adapter is kept in `folder`, by default beside the task's own; a run that was
    stopped goes on there.
    """
    if rows:
        task = replace(task, train=subset(task.train, task.clusters, rows, clusters, task.seed))
    folder = folder or task.adapter.with_name("-".join(filter(None, [task.adapter.name, variant or loss])))
    recoverer = build_prompted(replace(task, adapter=train_adapter(task, folder, loss=loss)), adapted=True)
    return replace(recoverer, name=f"fine-tuned-{variant}" if variant else "fine-tuned")
