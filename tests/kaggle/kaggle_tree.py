"""A mock of Kaggle's /kaggle/input: the real paths and formats, tiny models, a few rows written for these tests."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pandas as pd
import yaml

from promptrec.language_model import TINY_GEMMA

TEXTS = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text(encoding="utf-8"))
GEMMA_HF = "gemma/transformers/7b-it/3"
GEMMA_KERAS = "gemma/keras/gemma_instruct_7b_en/2"
SENTENCE_T5 = "sentence-t5/tensorflow2/st5-base/1"
EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}  # for a TPU
TO_KERAS = """
import sys
import keras_hub
keras_hub.models.GemmaCausalLM.from_preset(sys.argv[1]).save_to_preset(sys.argv[2])
"""


def save_keras_preset(folder: Path) -> None:
    """The tiny Gemma as the Keras preset that Kaggle hands out, written in a process of its own (JAX stays out of ours)."""
    folder.mkdir(parents=True)
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TO_KERAS, str(TINY_GEMMA), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def build_inputs(root: Path, saved_model: Path) -> Path:
    """Everything but the Keras preset, at the paths where Kaggle mounts it."""
    shutil.copytree(TINY_GEMMA, root / GEMMA_HF)
    shutil.copytree(saved_model, root / SENTENCE_T5)
    _write_plots(root / "wikipedia-movie-plots")
    _write_books(root / "wikibooks-dataset")
    _write_tweets(root / "emotions")
    _write_competition(root / "llm-prompt-recovery")
    return root


def _write_plots(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {
            "Release Year": 1950 + number,
            "Title": row["title"],
            "Origin/Ethnicity": "British",
            "Director": "Unknown",
            "Cast": None,
            "Genre": "drama",
            "Wiki Page": f"https://en.wikipedia.org/wiki/{row['title'].replace(' ', '_')}",
            "Plot": row["text"],
        }
        for number, row in enumerate(TEXTS["plots"])
    ]
    pd.DataFrame(rows).to_csv(folder / "wiki_movie_plots_deduped.csv", index=False)


def _write_books(folder: Path) -> None:
    """One table a language; `abstract` is what the series reads."""
    folder.mkdir()
    rows = [
        {
            "title": f"Wikibooks: {row['title']}",
            "url": f"https://en.wikibooks.org/wiki/{row['title'].replace(' ', '_')}",
            "abstract": row["text"],
            "body_text": row["text"],
            "body_html": f"<p>{row['text']}</p>",
        }
        for row in TEXTS["books"]
    ]
    with closing(sqlite3.connect(folder / "wikibooks.sqlite")) as connection:
        for language in ("en", "de"):
            pd.DataFrame(rows).to_sql(language, connection, index=False)
        connection.commit()


def _write_tweets(folder: Path) -> None:
    folder.mkdir()
    pd.DataFrame({"text": [row["text"] for row in TEXTS["tweets"]], "label": 1}).to_csv(folder / "text.csv")


def _write_competition(folder: Path) -> None:
    folder.mkdir()
    for name in ("train", "test"):
        pd.DataFrame(TEXTS[name]).to_csv(folder / f"{name}.csv", index=False)
    sample = pd.DataFrame({"id": [row["id"] for row in TEXTS["test"]], "rewrite_prompt": "Improve that text."})
    sample.to_csv(folder / "sample_submission.csv", index=False)
