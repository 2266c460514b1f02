"""Shared fixtures: a clean environment, the MiniLM scorer loaded once, a fast exact scorer, the command line in-process."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # before torch is imported: two busy processes of two threads wait for each other
    )
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when transformers is imported, by whichever test is first
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # tests never reach for the network

import hashlib

import numpy as np
import pytest

from promptrec.scoring import Scorer, get_scorer


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No PROMPTREC_* variable of the developer's shell reaches a test, and none that a test sets outlives it."""
    for name in ("PROFILE", "SETTINGS", "INPUT", "OUT", "NOTEBOOKS", "SCORER_PROCESS", "CACHE"):
        monkeypatch.setenv(f"PROMPTREC_{name}", "")  # registers the variable, so that it is restored afterwards
        monkeypatch.delenv(f"PROMPTREC_{name}")


def pytest_xdist_auto_num_workers() -> int:
    """A process for each core, up to four: each may hold two gigabytes of frameworks."""
    return min(4, os.cpu_count() or 1)


class WordScorer(Scorer):
    """Bags of words as unit vectors (64 dims, hashed): exact, instant, and it counts what it is asked to encode."""

    name = "bag of words (test)"

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[str] = []

    def _encode(self, texts):
        self.encoded += texts
        rows = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                rows[row, hashlib.sha256(word.strip(".,!?:").encode()).digest()[0] % 64] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def word_scorer() -> WordScorer:
    return WordScorer()


@pytest.fixture(scope="session")
def minilm():
    """The embedded MiniLM, loaded once for all tests (and shared with the command line, which caches it too)."""
    return get_scorer("minilm")


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory):
    """MiniLM read at several depths, loaded once for all tests; what it embeds is kept for the session only."""
    from promptrec.text_features import TextEncoder

    return TextEncoder(tmp_path_factory.mktemp("embeddings"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    """A tiny sentence-t5 as a SavedModel and as a sentence-transformers folder, from the same weights."""
    from tiny_t5 import build_tiny_t5

    return build_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """function(*arguments) -> (exit code, stdout, stderr) of the real entry point, run in an empty folder."""
    from promptrec.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTREC_PROFILE", "local")

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["promptrec", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def random_adapter(tmp_path_factory):
    """function(alpha, std) -> folder of an adapter for the tiny Gemma whose numbers are random, none of them zero."""
    import torch

    from promptrec.language_model import TINY_GEMMA, load_model
    from promptrec.lora import LoraSettings, attach_adapter

    def save(alpha: int, std: float):
        torch.manual_seed(0)
        settings = LoraSettings(rank=2, alpha=alpha, quantise=False)
        model = attach_adapter(load_model(TINY_GEMMA, quantise=False), settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=std)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder, safe_serialization=True)
        return folder

    return save


@pytest.fixture(scope="session")
def adapter(random_adapter):
    """An adapter that does something, but little."""
    return random_adapter(alpha=2, std=0.02)


@pytest.fixture
def tuned(adapter):
    """(model, tokenizer): the tiny Gemma with that adapter, to be trained on."""
    from promptrec.language_model import TINY_GEMMA
    from promptrec.rewards import TuningSettings, tunable

    return tunable(TINY_GEMMA, adapter, TuningSettings())


@pytest.fixture(scope="session")
def train():
    """Twenty shipped training triples of different prompts."""
    from promptrec.data import shipped_triples

    return shipped_triples(["train"]).drop_duplicates("rewrite_prompt").head(20)
