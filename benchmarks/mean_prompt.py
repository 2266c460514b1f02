"""How good is a mean prompt, and what does searching along the gradient save?

    python benchmarks/mean_prompt.py PROMPTS.txt     # or no file: the shipped prompts

Two measurements, written to benchmarks/mean_prompt.json. `mean_prompt`: the string that `promptrec mean-prompt` finds,
as a part of what the best continuous vector scores, on prompt clusters that the search did not see. `comparison`: from
one start and over one small vocabulary, how many encoder evaluations gradient search needs for what exhaustive greedy
ends with, and what the other methods reach with as many as gradient search had.

The scorer is MiniLM, a proxy. The file of results quotes no prompt, and no string that holds pieces of prompts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from promptrec.data import read_prompts
from promptrec.errors import InputError
from promptrec.mean_prompt import halves, mean_prompt, search_encoder
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import Scorer, get_scorer
from promptrec.search_encoders import SearchEncoder
from promptrec.tables import versions, write_json
from promptrec.text_features import words
from promptrec.token_search import METHODS, Objective, SearchSettings, Step, search

BACKWARD = 3  # evaluations that a string's forward and backward pass count as
POINTS = 60  # of a curve


def measure_mean_prompt(prompts: Sequence[str], scorer: Scorer, settings: SearchSettings) -> dict:
    """What `promptrec mean-prompt` finds and what it took; embedding the prompts and joining the start included."""
    encoder, began = search_encoder(scorer), time.perf_counter()
    before = encoder.gradients
    found = mean_prompt(prompts, scorer, settings)
    seconds = time.perf_counter() - began
    told = ("evaluations", "train", "held_out", "gain", "share_of_vector", "share_interval")
    return {
        "settings": asdict(settings),
        "seconds": seconds,
        "seconds_of_search": found["seconds"],
        "gradients": encoder.gradients - before,
        **{name: found[name] for name in told},
        "tokens": encoder.count_tokens(found["text"]),
        "curve": thinned(found["curve"]),  # evaluations, seconds, value
    }


def compare_methods(prompts: Sequence[str], scorer: Scorer, settings: SearchSettings, size: int) -> dict:
    """Greedy to its end, then every method with `settings.evaluations`, over the searched half's `size` most used words.

    All start from the searched half's best constant, one whole prompt.
    """
    encoder, (_, searched) = search_encoder(scorer), halves(prompts, settings.seed)
    vectors = scorer.encode(prompts)
    objective, held_out = Objective.mean(vectors[searched]), Objective.mean(vectors[~searched])
    mine = [prompt for prompt, chosen in zip(prompts, searched, strict=True) if chosen]
    start = mine[int(objective.value(vectors[searched]).argmax())]
    used = Counter(word for prompt in mine for word in words(prompt) if word[0] != "'")
    settings = replace(settings, vocabulary=tuple(word for word, _ in used.most_common(size)))
    endless = replace(settings, method="greedy", evaluations=10**9)
    exhaustive = run(encoder, objective, held_out, start, endless)
    runs = {method: run(encoder, objective, held_out, start, replace(settings, method=method)) for method in METHODS}
    reached = next((point for point in runs["gradient"]["curve"] if point[3] >= exhaustive["value"]), None)
    spent = reached and reached[0] + BACKWARD * reached[1]
    for each in (exhaustive, *runs.values()):
        each["curve"] = thinned(each["curve"])  # evaluations, gradients, seconds, value
    return {
        "vocabulary": len(settings.vocabulary),
        "best_vector": objective.best_vector(settings.seed)[1],
        "evaluations_each": settings.evaluations,
        "evaluations_of_a_gradient": BACKWARD,
        "exhaustive_greedy": exhaustive,
        "gradient_reaches_it_after": reached and {"evaluations": reached[0], "gradients": reached[1], "both": spent},
        "times_fewer": spent and exhaustive["evaluations"] / spent,
        "methods": runs,
    }


def run(
    encoder: SearchEncoder, objective: Objective, held_out: Objective, start: str, settings: SearchSettings
) -> dict:
    """One search: both values, what it took, and its curve of [evaluations, gradients, seconds, value]."""
    curve, before = [], encoder.gradients

    def note(step: Step) -> None:
        curve.append([step.evaluations, encoder.gradients - before, round(step.seconds, 2), step.value])

    found = search(encoder, objective, start, settings, note)
    print(
        f"{settings.method}: {found.value:.4f}, {found.evaluations} evaluations, {found.gradients} gradients",
        flush=True,
    )
    return {
        "value": found.value,
        "held_out": float(held_out.value(encoder.encode([found.text]))[0]),
        "evaluations": found.evaluations,
        "gradients": found.gradients,
        "seconds": found.seconds,
        "curve": curve,
    }


def thinned(curve: list) -> list:
    """At most POINTS of a curve's points, the first and the last among them."""
    if len(curve) <= POINTS:
        return curve
    return [curve[index] for index in np.linspace(0, len(curve) - 1, POINTS).round().astype(int)]


def main(arguments: Sequence[str] | None = None) -> Path:
    defaults = SearchSettings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, nargs="?", help="one prompt a line; default: the shipped ones")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--level", default=defaults.level, help="word or token, of the mean prompt")
    parser.add_argument("--evaluations", type=int, default=defaults.evaluations, help="of the mean prompt")
    parser.add_argument("--compared", type=int, default=2000, help="evaluations of each method that is compared")
    parser.add_argument("--vocabulary", type=int, default=2000, help="words that the compared methods choose from")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    prompts = read_prompts(given.prompts) if given.prompts else shipped_prompts()["rewrite_prompt"].tolist()
    settings, scorer = (
        SearchSettings(level=given.level, evaluations=given.evaluations, seed=given.seed),
        get_scorer("minilm"),
    )
    found = measure_mean_prompt(prompts, scorer, settings)
    print(
        f"mean prompt: {found['share_of_vector']:.1%} of the best vector's score, {found['seconds']:.0f} s", flush=True
    )
    clusters, searched = halves(prompts, given.seed)
    compared = replace(settings, level="word", evaluations=given.compared, candidates=16, places=2)
    report = {
        "scorer": scorer.name,
        "prompts": "given" if given.prompts else "shipped",
        "n": len(prompts),
        "clusters": len(set(clusters.tolist())),
        "searched": int(searched.sum()),
        "machine": {"cores": os.cpu_count(), "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())},
        "mean_prompt": found,
        "comparison": compare_methods(prompts, scorer, compared, given.vocabulary),
        "versions": versions(),
    }
    return write_json(report, given.out)


if __name__ == "__main__":
    try:
        print(main())
    except InputError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
