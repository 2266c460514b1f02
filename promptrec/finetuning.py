"""From a file of triples to an adapter: splits where there are none, settings by profile, held-out SCS, manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from promptrec.cleaning import clean
from promptrec.data import load_triples
from promptrec.distributed import first, from_first, processes
from promptrec.errors import InputError
from promptrec.inference import held_out_scs
from promptrec.profiles import Profile, model_name, override, preset
from promptrec.scoring import Scorer, profile_scorer
from promptrec.splits import check_split, clusters_of, split_components
from promptrec.tables import read_json, write_manifest


def settings_for(profile: Profile, **changes: object) -> object:
    """The profile's fine-tuning settings with changes (type-checked, unknown ones refused)."""
    if profile.in_keras:
        from promptrec.lora_keras import V3_8

        return override(V3_8, **changes)
    from promptrec.lora import T4, LoraSettings

    return preset(profile, LoraSettings(), T4, **changes)


def trainer_for(profile: Profile, watched: pd.DataFrame, scorer: Scorer) -> tuple[Callable, Callable]:
    """(finetune, measure): how the profile fine-tunes, in torch or in Keras, and its SCS on the watched rows."""
    if profile.in_keras:
        from promptrec import lora_keras

        return lora_keras.finetune, held_out_scs(watched, scorer, profile.chat, recoverer=lora_keras.KerasRecoverer)
    from promptrec.language_model import generation_settings
    from promptrec.lora import finetune

    return finetune, held_out_scs(watched, scorer, profile.chat, generation_settings(profile))


def finetune_file(
    path: str | Path, out: str | Path, profile: Profile, seed: int = 0, **changes: object
) -> pd.DataFrame:
    """Fine-tune on a CSV, JSONL or Parquet of triples; returns the history. Resumes when `out` has checkpoints.

    A file with a `split` column (as Part 1 writes it) is used as it is, after a check that no prompt cluster and no
    original is on two sides; others are cleaned, clustered and split here.
    """
    settings, started = settings_for(profile, seed=seed, **changes), time.time()
    table = from_first(lambda: split_triples(path))
    train, validation = (table[table["split"] == split] for split in ("train", "validation"))
    if train.empty or validation.empty:
        raise InputError(
            f"{path}: {len(train)} training and {len(validation)} validation rows; both are needed: add more "
            f"distinct prompts, or mark rows in the column split"
        )
    scorer = profile_scorer(profile)
    watched = validation.sample(min(len(validation), settings.validation_rows), random_state=seed)
    spent = seconds_spent(out)
    finetune, measure = trainer_for(profile, watched, scorer)
    history = finetune(train, watched, profile.base_model, out, settings, profile.chat, measure)
    if not first():
        return history
    write_manifest(
        Path(out),
        started=started - spent,
        profile=profile.name,
        seed=seed,
        rows=len(train),
        settings=settings,
        base_model=model_name(profile.base_model),
        scorer=scorer.name,
        best_scs=float(history["scs"].max()) if history["scs"].notna().any() else None,
        **processes(),
    )
    return history


def seconds_spent(out: str | Path) -> float:
    """What earlier calls of the run in `out` took, by its manifest: a run that was stopped, or is finished."""
    manifest = Path(out).with_name(f"{Path(out).name}.manifest.json")
    known = (Path(out) / "history.csv").is_file() and manifest.is_file()
    return float(read_json(manifest).get("seconds", 0)) if known else 0.0


def split_triples(path: str | Path) -> pd.DataFrame:
    """The triples of a file with prompt_cluster and split, the file's own or, where it has none, made here."""
    table = load_triples(path, keep=["prompt_cluster", "split"])
    split = "split" in table
    table = table if split else clean(table)[0]
    if table.empty:
        raise InputError(f"{path}: no row survives cleaning (blank, refused, unchanged or extreme texts)")
    if not (split and "prompt_cluster" in table):
        table["prompt_cluster"] = clusters_of(table["rewrite_prompt"])
    return check_split(table) if split else table.assign(split=split_components(table))
