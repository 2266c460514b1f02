"""How well are prompts recovered without a GPU, what holds it back, and how long does it take?

    python benchmarks/recover.py TEST.jsonl [--train MORE.jsonl ...]

TEST holds triples, and may hold another model's answers in a column `prediction`. The shipped training triples, and then
these and each file of --train, are what the predictor is fitted on; a training prompt, or one of the bank, within cosine
.9 of a test prompt is left out. Written to benchmarks/recover.json: mean SCS of the predicted vector and of the string
found for it, beside the best constant, the nearest prompt, ridge retrieval, the bank's best prompt by an oracle, and the
predictions; the blend with these; what a longer search for each string buys; a learning curve; the scores by what the bank
holds; what training rows of the test rows' own source are worth (prompt clusters held out of TEST, and of each file of
--train); seconds.

The scorer is MiniLM, a proxy; intervals are bootstraps by prompt cluster. The file of results quotes no text.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress, pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.cleaning import clean
from promptrec.comparison import interval
from promptrec.data import load_triples, merge_triples, shipped_triples
from promptrec.embedding import EmbeddingRecoverer, RetrievalRecoverer
from promptrec.errors import InputError
from promptrec.predictor import Posterior, choose
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import Scorer, get_scorer, scs
from promptrec.splits import cluster_prompts, clusters_of, wordings_of
from promptrec.tables import read_table, versions, write_json

SHARES = (0.125, 0.25, 0.5, 1.0)  # of the training prompt clusters, for the learning curve
BUDGETS = (0, 40, 160, 640, 2560)  # strings encoded a row by the search after the joins
COVER = (0.0, 0.5, 0.6, 0.7, 0.9)  # edges: cosine of a true prompt to the bank's nearest


def usable(tables: Sequence[pd.DataFrame], test: Sequence[str]) -> tuple[pd.DataFrame, list[str], int]:
    """Training triples and shipped prompts that are no wording of a test prompt; how many triples were."""
    train, bank = clean(merge_triples(tables))[0], shipped_prompts()["rewrite_prompt"].tolist()
    near = wordings_of(train["rewrite_prompt"], test)
    return train[~near].reset_index(drop=True), list(compress(bank, ~wordings_of(bank, test))), int(near.sum())


class Trial:
    """One test table, the embeddings of its prompts, and how scores on it are told."""

    def __init__(self, test: pd.DataFrame, scorer: Scorer) -> None:
        self.rows, self.scorer = test.drop(columns="prediction", errors="ignore"), scorer
        self.answers = test["prediction"].tolist() if "prediction" in test else []
        self.truth = scorer.encode(test["rewrite_prompt"].tolist())
        self.clusters = cluster_prompts(self.truth)

    def told(self, values: np.ndarray) -> dict:
        """Mean with interval of values [n], and the mean over distinct prompts."""
        mean, low, high = interval(values, self.clusters)
        by_prompt = float(pd.Series(values).groupby(self.rows["rewrite_prompt"].to_numpy()).mean().mean())
        return {"mean": mean, "low": low, "high": high, "by_prompt": by_prompt}

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        return scs(vectors, self.truth)


def answered(trial: Trial, train: pd.DataFrame, bank: Sequence[str]) -> tuple[EmbeddingRecoverer, Posterior, list[str]]:
    """A recoverer fitted to triples, what it believes of the trial's rows, and the strings it found for them."""
    recoverer = EmbeddingRecoverer(trial.scorer, bank).fit(train)
    posterior = recoverer.posterior(trial.rows)
    return recoverer, posterior, recoverer.decode(posterior)


def scored(trial: Trial, posterior: Posterior, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """SCS of the predicted vectors and of strings, [n] each."""
    return trial.scores(posterior.vectors), trial.scores(trial.scorer.encode(texts))


def measure(trial: Trial, train: pd.DataFrame, bank: Sequence[str], budgets: Sequence[int] = ()) -> dict:
    """Everything about one training set."""
    scorer = trial.scorer
    recoverer, posterior, texts = answered(trial, train, bank)
    vector, string, bank_vectors = *scored(trial, posterior, texts), recoverer.vectors
    similar = trial.truth @ bank_vectors.T  # [n, bank]
    # an optimist's constant: the one of the bank that is best on the test rows themselves
    constant = similar[:, (similar**3).mean(0).argmax()] ** 3
    ridge = RetrievalRecoverer(scorer, bank).fit(train)
    found = {
        "train_rows": len(train),
        "bank": len(recoverer.bank),
        "vector": trial.told(vector),
        "string": trial.told(string),
        "lost_in_decoding": trial.told(vector - string),
        "expected_of_vector": float(posterior.expected.mean()),
        "expected_of_string": float(posterior.expected_scs(scorer.encode(texts)).mean()),
        "expected_correlates": float(np.corrcoef(posterior.expected, vector)[0, 1]),
        "bank_prompt_by_bayes_risk": trial.told(trial.scores(bank_vectors[choose(posterior, bank_vectors)])),
        "bank_prompt_nearest": trial.told(trial.scores(bank_vectors[(posterior.vectors @ bank_vectors.T).argmax(1)])),
        "ridge_retrieval": trial.told(trial.scores(scorer.encode(ridge.recover(trial.rows)))),
        "ridge_vector": trial.told(trial.scores(ridge.predict_vectors(trial.rows))),
        "bank_prompt_by_oracle": trial.told(similar.max(1) ** 3),
        "best_constant_in_hindsight": trial.told(constant),
        "words_of_a_string": float(np.mean([len(text.split()) for text in texts])),
        "by_nearest_bank_prompt": by_cover(similar.max(1), {"vector": vector, "string": string}),
        "seconds_of_decoding": recoverer.seconds["decode"],
    }
    if trial.answers:
        found |= blended(trial, recoverer, string)
    if budgets:
        found["by_evaluations"] = by_evaluations(trial, recoverer, posterior, budgets)
    return found


def by_evaluations(
    trial: Trial, recoverer: EmbeddingRecoverer, posterior: Posterior, budgets: Sequence[int], rows: int = 48
) -> dict:
    """What a longer search for each string buys: one row of each of the first clusters, and what their vectors score."""
    chosen = np.sort(np.unique(trial.clusters, return_index=True)[1][:rows])
    part, truth, clusters = posterior.of(chosen), trial.truth[chosen], trial.clusters[chosen]
    spread = lambda vectors: dict(zip(("mean", "low", "high"), interval(scs(vectors, truth), clusters), strict=True))  # noqa: E731
    told, usual = [], recoverer.decoding
    for evaluations in budgets:
        recoverer.decoding, started = replace(usual, evaluations=evaluations), time.perf_counter()
        vectors = trial.scorer.encode(recoverer.decode(part))
        seconds, cosine = time.perf_counter() - started, float((vectors * part.vectors).sum(1).mean())
        row = {"evaluations": evaluations, "cosine": cosine, **spread(vectors), "seconds_a_row": seconds / len(chosen)}
        print(f"{evaluations} evaluations: cosine {cosine:.3f}, {row['mean']:.3f}", flush=True)
        told.append(row)
    recoverer.decoding = usual
    return {"n": len(chosen), "vector": spread(part.vectors), "strings": told}


def blended(trial: Trial, recoverer: EmbeddingRecoverer, string: np.ndarray) -> dict:
    """With another model's answers as evidence and as candidates, against both alone."""
    rows = trial.rows.assign(prediction=trial.answers)
    posterior = recoverer.posterior(rows)
    both = trial.scores(trial.scorer.encode(recoverer.decode(posterior, [[answer] for answer in trial.answers])))
    theirs = trial.scores(trial.scorer.encode(trial.answers))
    return {
        "predictions": trial.told(theirs),
        "string_minus_predictions": trial.told(string - theirs),
        "blend_vector": trial.told(trial.scores(posterior.vectors)),
        "blend_string": trial.told(both),
        "blend_minus_string": trial.told(both - string),
        "blend_minus_predictions": trial.told(both - theirs),
    }


def by_cover(nearest: np.ndarray, scores: dict[str, np.ndarray]) -> list[dict]:
    """Mean scores of rows by how near the bank's nearest prompt is to the true one."""
    rows = []
    for low, high in pairwise(COVER):
        inside = (nearest >= low) & (nearest < high)
        if inside.any():
            means = {name: float(values[inside].mean()) for name, values in scores.items()}
            rows.append({"cosine_from": low, "cosine_to": high, "n": int(inside.sum()), **means})
    return rows


def learning_curve(trial: Trial, train: pd.DataFrame, bank: Sequence[str], seed: int = 0) -> list[dict]:
    """Score of the vector when only a share of the training prompt clusters is fitted on; the bank stays whole."""
    clusters = clusters_of(train["rewrite_prompt"])
    order = np.random.default_rng(seed).permutation(clusters.max() + 1)
    whole, points = [*bank, *train["rewrite_prompt"]], []
    for share in SHARES:
        kept = train[np.isin(clusters, order[: int(share * len(order))])].reset_index(drop=True)
        posterior = EmbeddingRecoverer(trial.scorer, whole).fit(kept).posterior(trial.rows)
        points.append({"train_rows": len(kept), **trial.told(trial.scores(posterior.vectors))})
    return points


def own_source(triples: pd.DataFrame, shipped: pd.DataFrame, scorer: Scorer, seed: int = 0) -> dict:
    """A fifth of the prompt clusters of a source, three rows each at most, with and without its other rows to fit on."""
    triples = clean(triples)[0].reset_index(drop=True)
    clusters = clusters_of(triples["rewrite_prompt"])
    order = np.random.default_rng(seed).permutation(clusters.max() + 1)
    held = np.isin(clusters, order[: max(1, len(order) // 5)])
    test = triples[held].groupby(clusters[held]).head(3).reset_index(drop=True)
    trial, told = Trial(test, scorer), {}
    for name, tables in {"without": [shipped], "with": [shipped, triples[~held]]}.items():
        train, bank, _ = usable(tables, test["rewrite_prompt"])
        vector, string = scored(trial, *answered(trial, train, bank)[1:])
        told[name] = {"train_rows": len(train), "vector": trial.told(vector), "string": trial.told(string)}
    return {"n": len(test), "prompts": int(test["rewrite_prompt"].nunique()), **told}


def timed(train: pd.DataFrame, test: pd.DataFrame, scorer: Scorer, fitted: int, asked: int) -> dict:
    """Seconds to embed and fit on rows never seen, and to answer others, with nothing in the cache."""
    before = os.environ.get("PROMPTREC_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMPTREC_CACHE"] = folder
        try:
            rows = train.head(fitted).reset_index(drop=True)
            started = time.perf_counter()
            recoverer = EmbeddingRecoverer(scorer, shipped_prompts()["rewrite_prompt"]).fit(rows)
            middle = time.perf_counter()
            more = pd.concat([test] * -(-asked // len(test)), ignore_index=True).head(asked)
            more["id"] = [str(number) for number in range(asked)]
            more["rewritten_text"] += [f" {number}" for number in range(asked)]  # no text is known already
            recoverer.recover(more)
            ended = time.perf_counter()
        finally:
            os.environ.pop("PROMPTREC_CACHE") if before is None else os.environ.update(PROMPTREC_CACHE=before)
    return {"fitted_rows": len(rows), "fit": middle - started, "answered_rows": len(more), "answer": ended - middle}


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("test", type=Path, help="triples, perhaps with a column prediction")
    parser.add_argument("--train", type=Path, nargs="*", default=[], help="triples beside the shipped ones")
    parser.add_argument("--rows", type=int, help="of the test table, the first; default: all")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=("budget", "curve", "own", "time"), help="what not to measure"
    )
    parser.add_argument("--fitted", type=int, default=5000, help="training rows that are timed")
    parser.add_argument("--asked", type=int, default=1000, help="rows to answer that are timed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args(arguments)
    scorer, test = get_scorer("minilm"), read_table(given.test).head(given.rows)
    if test.empty:
        raise InputError(f"{given.test}: no rows")
    trial = Trial(test.reset_index(drop=True), scorer)
    shipped, more = shipped_triples(["train"]), [load_triples(path) for path in given.train]
    sets, results = {"shipped": [shipped]} | ({"shipped and more": [shipped, *more]} if more else {}), {}
    for name, tables in sets.items():
        train, bank, left_out = usable(tables, test["rewrite_prompt"])
        budgets = BUDGETS if name == "shipped" and "budget" not in given.skip else ()
        results[name] = {"left_out": left_out} | measure(trial, train, bank, budgets)
        if name == "shipped" and "curve" not in given.skip:
            results[name]["learning_curve"] = learning_curve(trial, train, bank)
        print(name, {key: results[name][key]["mean"] for key in ("vector", "string")}, flush=True)
    sources = {}
    if "own" not in given.skip:
        for path, triples in zip((given.test, *given.train), (load_triples(given.test), *more), strict=True):
            sources[path.stem] = own_source(triples, shipped, scorer)
    report = {
        "scorer": scorer.name,
        "n": len(trial.rows),
        "prompts": int(trial.rows["rewrite_prompt"].nunique()),
        "clusters": int(trial.clusters.max() + 1),
        "interval": "95% bootstrap by prompt cluster",
        "results": results,
        "own_source": sources,
        "seconds": None if "time" in given.skip else timed(train, trial.rows, scorer, given.fitted, given.asked),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
    }
    return write_json(report, given.out)


if __name__ == "__main__":
    print(main())
