"""Recoverers by name, built for a profile: what `promptrec recover --method` and the comparison choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from promptrec.cleaning import clean
from promptrec.data import load_triples, merge_triples, shipped_triples
from promptrec.embedding import EmbeddingRecoverer, PredictorSettings, RetrievalRecoverer
from promptrec.errors import InputError
from promptrec.inference import Constant, LanguageModelRecoverer, Recoverer, best_constant, pick_shots
from promptrec.profiles import Profile
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import profile_scorer
from promptrec.splits import cluster_prompts

SHOTS = 3


def training_triples(more: Sequence[str | Path] = ()) -> pd.DataFrame:
    """The shipped training triples (never the held-out ones) and whatever files the user adds, cleaned."""
    return clean(merge_triples([shipped_triples(["train"]), *map(load_triples, more)]))[0]


def default_method(profile: Profile) -> str:
    """The best method the profile can run without the user training anything: measured on held-out shipped triples."""
    return "embedding" if profile.rewriter == "rules" else "few-shot"


def make_recoverer(
    method: str, profile: Profile, train: Sequence[str | Path] = (), adapter: str | Path | None = None, seed: int = 0
) -> Recoverer:
    """The recoverer called `method`, ready to answer. Raises InputError for an unknown name or a missing adapter."""
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[method](profile, train, adapter, seed)


def _constant(profile, train, adapter, seed) -> Recoverer:
    return Constant()


def _best_constant(profile, train, adapter, seed) -> Recoverer:
    prompts = training_triples(train)["rewrite_prompt"].tolist()
    return Constant(best_constant(prompts, profile_scorer(profile)), name="best constant")


def _retrieval(profile, train, adapter, seed) -> Recoverer:
    recoverer = RetrievalRecoverer(profile_scorer(profile), bank=shipped_prompts()["rewrite_prompt"])
    return recoverer.fit(training_triples(train))


def _embedding(profile, train, adapter, seed) -> Recoverer:
    bank = shipped_prompts()["rewrite_prompt"]
    return EmbeddingRecoverer(profile_scorer(profile), bank, PredictorSettings(seed=seed)).fit(training_triples(train))


def _prompted(shots: int) -> Callable[..., Recoverer]:
    def build(profile, train, adapter, seed) -> Recoverer:
        solved = _shots(profile, train, shots, seed) if shots else ()
        name = "few-shot" if shots else "zero-shot"
        if profile.in_keras:
            from promptrec.lora_keras import load_recoverer

            return load_recoverer(profile, name, shots=solved)
        from promptrec.language_model import load_model, load_tokenizer

        model, tokenizer = load_model(profile.base_model), load_tokenizer(profile.base_model)
        return LanguageModelRecoverer(model, tokenizer, name, shots=solved, chat=profile.chat)

    return build


def _shots(profile: Profile, train: Sequence[str | Path], count: int, seed: int):
    triples = training_triples(train)
    clusters = cluster_prompts(profile_scorer(profile).encode(triples["rewrite_prompt"].tolist()))
    return pick_shots(triples.assign(prompt_cluster=clusters), count, seed)


def _fine_tuned(profile, train, adapter, seed) -> Recoverer:
    folder = Path(adapter) if adapter else Path(profile.out) / "adapter"
    if profile.in_keras:
        from promptrec.lora_keras import load_recoverer

        return load_recoverer(profile, "fine-tuned", folder)
    from promptrec.lora import load_adapters

    model, tokenizer = load_adapters(profile.base_model, {"recovery": folder})
    return LanguageModelRecoverer(model, tokenizer, "fine-tuned", adapter="recovery", chat=profile.chat)


METHODS: dict[str, Callable[..., Recoverer]] = {
    "constant": _constant,
    "best-constant": _best_constant,
    "zero-shot": _prompted(0),
    "few-shot": _prompted(SHOTS),
    "fine-tuned": _fine_tuned,
    "retrieval": _retrieval,
    "embedding": _embedding,
}
