"""What a comparison found: a table of methods, reported claims put to the test, and the rows that the book shows.

Knows finished trials only, as trials.py writes them: {"method", "seed", "answers": [{"id", "answer", "scs"}], costs}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.comparison import compare, interval
from promptrec.errors import InputError
from promptrec.methods import METHODS
from promptrec.scoring import Scorer
from promptrec.tables import read_json

SHOWN = Path(__file__).parents[1] / "benchmarks" / "compare.json"  # the comparison that the book shows
BASELINE = "best-constant"
READ = ["source", "method", "mean", "low", "high", "difference", "difference_low", "difference_high", "n", "seeds"]
SPOKEN = {"promptrec": "hand-written"}  # sources as the book calls them
CLOCKS = ("seconds", "cpu_seconds")
FEWEST_CLUSTERS = 10  # a bootstrap over fewer decides nothing
BEST_SINGLE = "the best single method"


@dataclass(frozen=True)
class Claim:
    """A finding reported elsewhere, as two methods of which one should score more."""

    text: str
    source_of_claim: str
    better: str
    worse: str


CLAIMS = (
    Claim("fine-tuning beats few-shot prompting", "cma1114", "fine-tuned", "few-shot"),
    Claim("few-shot prompting beats zero-shot", "cma1114", "few-shot", "zero-shot"),
    Claim("a small training set beats a large one", "Gan et al.", "fine-tuned-small", "fine-tuned"),
    Claim(
        "diverse training prompts beat few, repeated ones",
        "cma1114",
        "fine-tuned-small",
        "fine-tuned-narrow",
    ),
    Claim("loss on the answer beats loss on the whole text", "cma1114", "fine-tuned", "fine-tuned-whole"),
    Claim("PPO lifts a base model", "Gan et al. found it flat", "ppo-base", "zero-shot"),
    Claim("PPO lifts a fine-tuned model", "open idea", "ppo-tuned", "fine-tuned"),
    Claim("RLOO lifts a fine-tuned model", "open idea", "rloo", "fine-tuned"),
    Claim("DPO on its own ranked answers lifts a fine-tuned model", "Gormann", "dpo", "fine-tuned"),
    Claim("own answers make better DPO pairs than another model's", "Gormann", "dpo", "dpo-other"),
    Claim("a length chosen by likelihood beats a drawn one", "open idea", "infilling-likelihood", "infilling"),
    Claim("a bridge that keeps the sequence beats a pooled one", "open idea", "bridge-sequence", "bridge-pooled"),
    Claim("contrastive likelihood beats plain likelihood", "open idea", "contrastive-likelihood", "forward-likelihood"),
    Claim("a model is a poor judge: agreement chooses better", "cma1114", "agreement", "judge"),
    Claim("token search improves an inverted prompt", "open idea", "inversion-polished", "inversion"),
    Claim("the blend beats the best single method", "open idea", "blend", BEST_SINGLE),
)


def seed_scores(rows: pd.DataFrame, finished: Sequence[dict]) -> pd.DataFrame:
    """SCS of every trial on every test row: source, method, seed, id, prompt_cluster, scs."""
    if not finished:
        raise InputError("no trial has finished; the .failed files beside the trials say why")
    test = rows.loc[rows["split"] == "test", ["id", "source", "prompt_cluster"]].replace({"source": SPOKEN})
    answers = [pd.DataFrame(one["answers"]).assign(method=one["method"], seed=one["seed"]) for one in finished]
    scores = test.merge(pd.concat(answers), on="id")
    return scores[["source", "method", "seed", "id", "prompt_cluster", "scs"]]


def row_scores(by_seed: pd.DataFrame) -> pd.DataFrame:
    """SCS of every method on every test row, averaged over its seeds: source, method, id, prompt_cluster, scs."""
    return by_seed.groupby(["source", "method", "id", "prompt_cluster"], as_index=False)["scs"].mean()


def results(scores: pd.DataFrame, finished: Sequence[dict]) -> pd.DataFrame:
    """One row for each source of the test rows and method, best first: mean SCS with interval, difference, cost.

    `scores` as row_scores gives them: the seeds of a method are averaged by test row before rows are resampled by
    prompt cluster.
    """
    trials = pd.DataFrame(finished)
    costs = trials.groupby("method").agg(
        seeds=("seed", "nunique"),
        **{f"{part}_{kind}": (f"{part}_{kind}", "mean") for part in ("fit", "answer") for kind in CLOCKS},
        memory_mib=("memory_mib", "max"),
    )
    costs["family"] = [METHODS[method].family for method in costs.index]
    costs["idea"] = [METHODS[method].source for method in costs.index]
    tables = []
    for source, part in scores.groupby("source"):
        table = compare(part, BASELINE).merge(costs, on="method").assign(source=source)
        tables.append(table.merge(_spread(set(part["id"]), finished), on="method"))
    return pd.concat(tables, ignore_index=True)


def _spread(asked: set, finished: Sequence[dict]) -> pd.Series:
    """Standard deviation of the seeds' means over the rows `asked`, by method."""
    means = [(one["method"], np.mean([row["scs"] for row in one["answers"] if row["id"] in asked])) for one in finished]
    return pd.DataFrame(means, columns=["method", "spread"]).groupby("method")["spread"].std(ddof=0)


def sayings(rows: pd.DataFrame, finished: Sequence[dict], scorer: Scorer) -> pd.DataFrame:
    """What the answers are like, for each source and method: `distinct` (their share), `words` (median), `dealt`.

    `dealt` is the mean SCS of the same answers dealt to rows of other prompt clusters: what they score whatever the row.
    What a method gained by looking at a row is its mean SCS beyond that.
    """
    test = rows.loc[rows["split"] == "test", ["id", "source", "prompt_cluster", "rewrite_prompt"]].replace(
        {"source": SPOKEN}
    )
    told = []
    for one in finished:
        for source, part in test.merge(pd.DataFrame(one["answers"])[["id", "answer"]], on="id").groupby("source"):
            answers, prompts = (scorer.encode(part[name].tolist()) for name in ("answer", "rewrite_prompt"))
            clusters = part["prompt_cluster"].to_numpy()
            others = clusters[:, None] != clusters
            dealt = ((answers @ prompts.T) ** 3)[others].mean() if others.any() else np.nan
            words = part["answer"].str.split().str.len().median()
            shares = {"distinct": part["answer"].nunique() / len(part), "words": words, "dealt": float(dealt)}
            told.append({"source": source, "method": one["method"]} | shares)
    table = pd.DataFrame(told).groupby(["source", "method"], as_index=False).mean()
    return table.astype({"dealt": object}).where(table.notna(), None)  # JSON knows no NaN


def contrasts(scores: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> list[dict]:
    """What was claimed elsewhere, put to the test: paired differences on the same rows, of methods that have answered.

    `scores` as row_scores gives them. A claim is confirmed or refuted where the interval excludes zero.
    """
    told = []
    for source, part in scores.groupby("source"):
        wide = part.pivot(index=["id", "prompt_cluster"], columns="method", values="scs")
        single = [method for method in wide if method in METHODS and METHODS[method].family != "ensembles"]
        best = wide[single].mean().idxmax() if single else None
        meant = [replace(claim, worse=best) if best and claim.worse == BEST_SINGLE else claim for claim in claims]
        for claim in meant:
            if {claim.better, claim.worse} <= set(wide):
                clusters = wide.index.get_level_values("prompt_cluster")
                mean, low, high = interval((wide[claim.better] - wide[claim.worse]).to_numpy(), clusters)
                open_ = low <= 0 <= high or clusters.nunique() < FEWEST_CLUSTERS
                verdict = "not decided at this size" if open_ else "confirmed" if low > 0 else "refuted"
                means = {"better_mean": wide[claim.better].mean(), "worse_mean": wide[claim.worse].mean()}
                found = means | {"difference": mean, "low": low, "high": high, "n": len(wide), "verdict": verdict}
                told.append({"source": source, **asdict(claim), **found})
    return told


def headroom(by_seed: pd.DataFrame, ensemble: str = "blend") -> list[dict]:
    """For each source, what choosing among an ensemble's parts could reach at most: the best part on every single row.

    `by_seed` as seed_scores gives it: the best is taken within a seed, then seeds are averaged; a method without seeds
    counts in each. Beside this oracle, the mean SCS of the best part and of the ensemble.
    """
    told, parts = [], list(METHODS[ensemble].needs)
    for source, part in by_seed[by_seed["method"].isin([ensemble, *parts])].groupby("source"):
        wide = part.pivot(index=["id", "prompt_cluster", "seed"], columns="method", values="scs")
        if {ensemble, *parts} <= set(wide):
            wide = wide.fillna(wide.groupby("id").transform("first"))
            oracle = wide[parts].max(axis=1).groupby(["id", "prompt_cluster"]).mean()
            mean, low, high = interval(oracle.to_numpy(), oracle.index.get_level_values("prompt_cluster"))
            best = wide[parts].mean().idxmax()
            told.append(
                {"source": source, "ensemble": ensemble, "parts": parts, "best_part": best}
                | {"best_part_mean": wide[best].mean(), "ensemble_mean": wide[ensemble].mean()}
                | {"oracle": mean, "low": low, "high": high}
            )
    return told


def comparison_rows(methods: Sequence[str] = (), path: str | Path | None = None) -> pd.DataFrame:
    """Rows of a comparison's results, of some methods or all; default: the comparison that the book shows."""
    table = _kept("rows", path).reindex(columns=READ)
    return table[table["method"].isin(methods)].reset_index(drop=True) if methods else table


def comparison_claims(methods: Sequence[str], path: str | Path | None = None) -> pd.DataFrame:
    """What the comparison says of claims that one of the methods is the better one."""
    table = _kept("claims", path)
    return table[table["better"].isin(methods)].reset_index(drop=True) if len(table) else table


def _kept(part: str, path: str | Path | None) -> pd.DataFrame:
    """A part of a comparison's results; nothing of SHOWN where there is no clone, as in a notebook on Kaggle."""
    if path is None and not SHOWN.is_file():
        return pd.DataFrame()
    path = Path(path or SHOWN)
    if not path.is_file():
        raise InputError(f"{path}: no comparison there; run promptrec compare")
    return pd.DataFrame(read_json(path).get(part, []))


def summary(table: pd.DataFrame) -> str:
    """The results as a person reads them on a terminal."""
    told = table.assign(
        scs=[f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in table.itertuples(index=False)],
        gain=[f"{row.difference:+.3f}" for row in table.itertuples(index=False)],
        cpu_seconds=(table["fit_cpu_seconds"] + table["answer_cpu_seconds"]).round(1),
    )
    return told[["source", "method", "scs", "gain", "n", "seeds", "cpu_seconds"]].to_string(index=False)
