"""A mean prompt: the one string that scores best as the answer to every row, and what it is worth on other prompts.

Half of the prompts, by cluster, are searched with (see token_search.py), the other half judges: a mean prompt overfits
its list. Leaderboard probes may weigh the searched half (see probes.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from promptrec.comparison import bootstrap_means, interval
from promptrec.data import read_prompts, text_id
from promptrec.errors import InputError
from promptrec.inference import Constant
from promptrec.probes import probe_weights, read_probes
from promptrec.profiles import override
from promptrec.scoring import Scorer, unit
from promptrec.search_encoders import SearchEncoder, encoder_of
from promptrec.splits import clusters_of
from promptrec.tables import progress, write_manifest, write_text
from promptrec.token_search import Objective, SearchSettings, Step, search

if TYPE_CHECKING:
    from promptrec.methods import Task

FEWEST_CLUSTERS = 4  # two to search with, two to judge by


def halves(prompts: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(prompt cluster [n], whether it is searched with [n]): half of the clusters, drawn by a hash of their text.

    The clusters are MiniLM's, whatever scores: their threshold is a MiniLM cosine.
    """
    distinct = sorted(set(prompts))
    numbers = clusters_of(distinct).tolist()
    first = dict(zip(reversed(numbers), reversed(distinct), strict=True))
    if len(first) < FEWEST_CLUSTERS:
        many = f"{len(prompts)} prompts in {len(first)} clusters"
        raise InputError(f"mean-prompt: {many} are too few; give at least {FEWEST_CLUSTERS} that differ")
    order = sorted(first, key=lambda number: text_id(str(seed), first[number]))
    clusters = pd.Series(numbers, index=distinct).loc[list(prompts)].to_numpy()
    return clusters, np.isin(clusters, order[: (len(order) + 1) // 2])


def mean_prompt(
    prompts: Sequence[str],
    scorer: Scorer,
    settings: SearchSettings,
    probes: tuple[Sequence[str], np.ndarray] | None = None,
) -> dict:
    """The string found (`text`), mean SCS with interval on both halves, what it took.

    The search starts from whole prompts, joined: that is most of the way, and reads like prompts. `gain` is the paired
    difference to the best constant, one whole prompt, on held-out prompts; `share_of_vector` the held-out score as a
    part of what the searched half's best continuous vector scores there, with an interval. Ctrl-C ends the search
    early: the best string so far is the result, and `stopped` says so.
    """
    encoder = search_encoder(scorer)
    clusters, searched = halves(prompts, settings.seed)
    vectors = scorer.encode(prompts, show_progress=True)
    objective, probed = Objective.mean(vectors[searched]), None
    if probes:
        objective, probed = _weighted(vectors[searched], scorer.encode(probes[0]), probes[1])
    short = _short(sorted(set(compress(prompts, searched))), encoder, settings.max_tokens)
    known = scorer.encode(short)
    constant = short[int(objective.value(known).argmax())]
    found = _search(encoder, objective, joined(short, known, objective, encoder, settings.max_tokens), settings)
    answers = np.stack([*scorer.encode([found["text"], constant]), objective.best_vector(settings.seed)[0]])
    values, held = (vectors @ answers.T) ** 3, ~searched  # [n, 3]
    share = _share(values[held, 0], values[held, 2], clusters[held])
    return (
        found
        | share
        | {
            "train": _measured(values[searched, 0], clusters[searched]),
            "held_out": _measured(values[held, 0], clusters[held]),
            "gain": _measured(values[held, 0] - values[held, 1], clusters[held]),
            "constant": constant,
            "scorer": scorer.name,
            "probes": probed,
        }
    )


def build(task: Task, evaluations: int = 1500) -> Constant:
    """The mean prompt of the task's training prompts, as the answer to every row."""
    encoder, settings = search_encoder(task.scorer), override(SearchSettings(evaluations=evaluations), seed=task.seed)
    objective = Objective.mean(task.scorer.encode(task.train["rewrite_prompt"].tolist()))
    short = _short(sorted(set(task.train["rewrite_prompt"])), encoder, settings.max_tokens)
    start = joined(short, task.scorer.encode(short), objective, encoder, settings.max_tokens)
    return Constant(search(encoder, objective, start, settings).text, name="mean prompt")


def search_encoder(scorer: Scorer) -> SearchEncoder:
    """The scorer's encoder. Raises InputError where it cannot be looked into."""
    encoder = encoder_of(scorer)
    if encoder is None:
        raise InputError(f"mean-prompt: {scorer.name} has no gradient to search by; use --scorer minilm or t5-hf")
    return encoder


def _short(prompts: Sequence[str], encoder: SearchEncoder, max_tokens: int) -> list[str]:
    """The prompts that a search may start from."""
    short = [text for text in prompts if encoder.count_tokens(text) <= max_tokens]
    if not short:
        raise InputError(f"mean-prompt: no prompt has {max_tokens} tokens or fewer; raise --max-tokens")
    return short


def joined(
    prompts: Sequence[str],
    vectors: np.ndarray,
    objective: Objective,
    encoder: SearchEncoder,
    max_tokens: int,
    tried: int = 64,
) -> str:
    """Whole prompts (unit vectors [n, d]) in a row, from the best one on: each the one with which all score best.

    The encoder pools by mean, so the vectors' mean, weighted by length, says which few are worth encoding.
    """
    lengths = np.array([encoder.count_tokens(prompt) for prompt in prompts]) - encoder.count_tokens("")
    values = objective.value(vectors)
    text, value = prompts[int(values.argmax())], values.max()
    while True:
        count = encoder.count_tokens(text)
        short = np.flatnonzero(count + lengths <= max_tokens)
        mixed = unit(count * encoder.encode([text]) + lengths[short, None] * vectors[short])
        order = np.argsort(-objective.value(mixed), kind="stable")[:tried]
        texts = [f"{text} {prompts[index]}" for index in short[order]]
        if not texts:
            return text
        best = texts[int(objective.value(encoder.encode(texts, exact=False)).argmax())]
        reached = objective.value(encoder.encode([best]))[0]
        if reached <= value:
            return text
        text, value = best, reached


def _weighted(vectors: np.ndarray, probes: np.ndarray, scores: np.ndarray) -> tuple[Objective, dict]:
    weights, residual = probe_weights(vectors, probes, scores)
    equal = float(np.sqrt(np.mean((Objective.mean(vectors).value(probes) - scores) ** 2)))
    effective = float(1 / (weights @ weights))  # prompts that carry the weight; few: the scores are not of such prompts
    report = {"n": len(scores), "residual": residual, "residual_before": equal, "effective_prompts": effective}
    return Objective(vectors, weights), report


def _search(encoder: SearchEncoder, objective: Objective, start: str, settings: SearchSettings) -> dict:
    steps, began, evaluations = [], time.perf_counter(), None

    def note(step: Step) -> None:
        steps.append(step)
        bar.set_postfix_str(f"{step.value:.4f} after {step.seconds:.0f} s", refresh=False)
        bar.update(step.evaluations - bar.n)

    with progress(None, total=settings.evaluations, desc=f"search ({encoder.name})") as bar:
        try:
            evaluations = search(encoder, objective, start, settings, note).evaluations
        except KeyboardInterrupt:
            if not steps:
                raise
    return {
        "text": steps[-1].text,
        "evaluations": evaluations or steps[-1].evaluations,
        "seconds": time.perf_counter() - began,
        "seconds_to_best": steps[-1].seconds,
        "curve": [[step.evaluations, round(step.seconds, 2), step.value] for step in steps],
        "stopped": evaluations is None,
    }


def _measured(values: np.ndarray, clusters: np.ndarray) -> dict:
    mean, low, high = interval(values, clusters)
    return {"mean_scs": mean, "low": low, "high": high, "n": len(values)}


def _share(values: np.ndarray, best: np.ndarray, clusters: np.ndarray) -> dict:
    """Mean of the values [n] as a part of the mean of the best vector's, with the interval of the two drawn together."""
    low, high = np.quantile(bootstrap_means(values, clusters) / bootstrap_means(best, clusters), [0.025, 0.975])
    share = float(values.mean() / best.mean())
    return {"share_of_vector": share, "share_interval": [float(low), float(high)]}


def mean_prompt_file(
    path: Path, out: Path, scorer: Scorer, settings: SearchSettings, profile: str, probes: Path | None = None
) -> dict:
    """mean_prompt of a file's prompts: its text goes to `out`, with a manifest. Returns what mean_prompt does."""
    started, prompts, known = time.time(), read_prompts(path), read_probes(probes) if probes else None
    Path(out).parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known before the search
    found = mean_prompt(prompts, scorer, settings, known)
    write_text(found["text"] + "\n", out)
    about = {"profile": profile, "seed": settings.seed, "rows": len(prompts), "settings": settings}
    write_manifest(out, started=started, **about, **found)
    return found


def summary(found: dict) -> str:
    """What mean_prompt returns, as a person reads it."""
    told = "{mean_scs:.4f} [{low:.4f}, {high:.4f}]"
    parts = {name: told.format(**found[name]) for name in ("held_out", "gain", "train")}
    lines = [
        found["text"],
        f"held-out mean SCS {parts['held_out']}  n={found['held_out']['n']}  scorer: {found['scorer']}",
        f"gain over {found['constant']!r} {parts['gain']}; {found['share_of_vector']:.1%} of the best vector's score",
        f"train mean SCS {parts['train']}  n={found['train']['n']}",
        f"{found['evaluations']} evaluations, {found['seconds']:.0f} s, the best one after {found['seconds_to_best']:.0f} s"
        + (" (stopped by hand)" if found["stopped"] else ""),
    ]
    if found["probes"]:
        told = "{n} probes: RMS {residual:.4f} (was {residual_before:.4f}), {effective_prompts:.0f} effective prompts"
        lines.append(told.format(**found["probes"]))
    return "\n".join(lines)
