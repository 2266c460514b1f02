"""What a comparison found: seeds averaged by row, claims judged by intervals, and the committed results in the book."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from promptrec.errors import InputError
from promptrec.findings import (
    BEST_SINGLE,
    CLAIMS,
    READ,
    Claim,
    comparison_claims,
    comparison_rows,
    contrasts,
    headroom,
    results,
    row_scores,
    sayings,
    seed_scores,
)
from promptrec.methods import METHODS
from promptrec.tables import read_json, write_json


def results_of(rows: pd.DataFrame, finished: list[dict]) -> pd.DataFrame:
    return results(row_scores(seed_scores(rows, finished)), finished)


def test_seeds_are_averaged_by_row_before_the_interval():
    rows = pd.DataFrame({"id": list("abcd"), "split": "test", "source": "s", "prompt_cluster": [0, 1, 2, 3]})

    def trial(method, seed, scs):
        answers = [{"id": one, "answer": "x", "scs": value} for one, value in zip("abcd", scs, strict=True)]
        cost = {
            "fit_seconds": 1,
            "answer_seconds": 2,
            "fit_cpu_seconds": 1,
            "answer_cpu_seconds": 1,
            "memory_mib": 3,
            "history": [],
        }
        return {"method": method, "seed": seed, "answers": answers, **cost}

    base = trial("best-constant", 0, [0.1, 0.1, 0.1, 0.1])
    table = results_of(rows, [base, trial("embedding", 0, [0, 0.4, 0, 0.4]), trial("embedding", 1, [0.4, 0, 0.4, 0])])
    row = table.set_index("method").loc["embedding"]
    assert row["mean"] == pytest.approx(0.2) and row["low"] == pytest.approx(0.2) == row["high"]
    assert row["spread"] == pytest.approx(0) and row["seeds"] == 2
    wide = results_of(rows, [base, trial("embedding", 0, np.full(4, 0.2)), trial("embedding", 1, np.full(4, 0.4))])
    assert wide.set_index("method").loc["embedding", "spread"] == pytest.approx(0.1)


def test_rows_of_the_comparison_can_be_read_by_method(tmp_path):
    rows = [dict.fromkeys(READ, 0) | row for row in ({"method": "constant"}, {"method": "embedding", "mean": 0.2})]
    claims = [{"better": "embedding", "difference": 0.1}, {"better": "constant", "difference": -0.1}]
    path = write_json({"rows": rows, "claims": claims}, tmp_path / "compare.json")
    assert comparison_rows(["embedding", "none"], path)["mean"].tolist() == [0.2]
    assert comparison_claims(["embedding", "none"], path)["difference"].tolist() == [0.1]
    with pytest.raises(InputError, match="run promptrec compare"):
        comparison_rows(path=tmp_path / "nowhere.json")


def test_a_notebook_without_its_clone_has_no_comparison_to_show(tmp_path, monkeypatch):
    monkeypatch.setattr("promptrec.findings.SHOWN", tmp_path / "nowhere.json")
    rows = comparison_rows(["embedding"]).round(4)
    assert len(rows) == 0 and list(rows.columns) == READ
    assert len(comparison_claims(["embedding"]).round(4)) == 0


def scores_of(methods: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {"source": "s", "method": method, "id": str(row), "prompt_cluster": row, "scs": value}
        for method, values in methods.items()
        for row, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_a_claim_is_judged_by_the_interval_of_paired_differences():
    up, down = np.linspace(0.3, 0.6, 12), np.linspace(0.1, 0.4, 12)
    scores = scores_of({"up": up, "down": down, "mixed": up + np.tile([0.3, -0.3], 6)})
    pairs = [("up", "down"), ("down", "up"), ("up", "mixed"), ("up", "absent")]
    told = contrasts(scores, [Claim("x", "y", *pair) for pair in pairs])
    assert [one["verdict"] for one in told] == ["confirmed", "refuted", "not decided at this size"]
    assert told[0]["difference"] == pytest.approx(0.2) and told[0]["n"] == 12


def test_few_clusters_decide_nothing():
    (told,) = contrasts(scores_of({"up": [0.5] * 4, "down": [0.1] * 4}), [Claim("x", "y", "up", "down")])
    assert told["verdict"] == "not decided at this size"


def test_the_best_single_method_is_found_and_is_no_ensemble():
    scores = scores_of({"blend": [0.9] * 12, "mbr": [0.8] * 12, "embedding": [0.3] * 12, "fine-tuned": [0.5] * 12})
    (told,) = contrasts(scores, [Claim("x", "y", "blend", BEST_SINGLE)])
    assert told["worse"] == "fine-tuned" and told["verdict"] == "confirmed"


def test_answers_that_fit_any_row_score_as_much_when_dealt_to_others(word_scorer):
    prompts = ["write a poem", "make it short", "make it short", "say it again"]
    rows = pd.DataFrame(
        {"id": list("abcd"), "split": "test", "source": "s", "prompt_cluster": [0, 1, 1, 2], "rewrite_prompt": prompts}
    )

    def trial(method: str, answers: list[str]) -> dict:
        return {
            "method": method,
            "answers": [{"id": key, "answer": text} for key, text in zip("abcd", answers, strict=True)],
        }

    told = sayings(rows, [trial("right", prompts), trial("same", ["make it short"] * 4)], word_scorer).set_index(
        "method"
    )
    pairs = [(one, other) for one in range(4) for other in range(4) if {one, other} not in ({1, 2}, {one})]
    for name, answers in (("right", prompts), ("same", ["make it short"] * 4)):
        scores = [word_scorer.scs([answers[one]], [prompts[other]])[0] for one, other in pairs]
        assert len(scores) == 10 and told.loc[name, "dealt"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert told["distinct"].tolist() == [0.75, 0.25] and told["words"].tolist() == [3, 3]


def test_an_oracle_chooses_the_best_part_of_every_row_within_a_seed():
    parts = list(METHODS["blend"].needs)
    rows = pd.DataFrame({"id": list("ab"), "split": "test", "source": "s", "prompt_cluster": [0, 1]})

    def trial(method: str, seed: int, values: list[float]) -> dict:
        answers = [{"id": key, "answer": "x", "scs": value} for key, value in zip("ab", values, strict=True)]
        return {"method": method, "seed": seed, "answers": answers}

    finished = [trial(name, seed, [0.0, 0.0]) for name in parts[2:] for seed in (0, 1)]
    finished += [trial(parts[0], 0, [0.9, 0.5]), trial(parts[0], 1, [0.1, 0.5]), trial(parts[1], 0, [0.1, 0.1])]
    finished += [trial(parts[1], 1, [0.9, 0.1]), trial("blend", 0, [0.2, 0.6]), trial("blend", 1, [0.2, 0.6])]
    (told,) = headroom(seed_scores(rows, finished))
    assert told["oracle"] == pytest.approx(0.7) and told["ensemble_mean"] == pytest.approx(0.4)
    assert (told["best_part"], told["best_part_mean"]) == (parts[0], pytest.approx(0.5))
    assert headroom(seed_scores(rows, [one for one in finished if one["method"] != "blend"])) == []


def test_no_finished_trial_is_said():
    with pytest.raises(InputError, match="no trial has finished"):
        seed_scores(pd.DataFrame(), [])


def test_every_claim_is_about_methods_that_exist():
    assert {method for claim in CLAIMS for method in (claim.better, claim.worse)} <= {*METHODS, BEST_SINGLE}


def test_the_page_shows_the_committed_results():
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("draw_comparison", root / "scripts" / "draw_comparison.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    kept = read_json(script.KEPT)
    assert script.TABLES.read_text() == script.tables(kept)
    for source in {row["source"] for row in kept["rows"]}:
        assert (root / "images" / script.figure_name(source)).is_file()
    shown = comparison_rows()
    assert set(shown["method"]) <= set(METHODS) and (shown["n"] > 0).all()
