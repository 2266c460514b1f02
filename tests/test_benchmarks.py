"""The benchmarks run, small, on shipped prompts, and write what they promise."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest

from promptrec.data import shipped_triples
from promptrec.prompt_bank import shipped_prompts

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    prompts = shipped_prompts()["rewrite_prompt"].tolist()[::120]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    sizes = ["--evaluations", "40", "--compared", "60", "--vocabulary", "25"]
    out = benchmark("mean_prompt").main([str(folder / "prompts.txt"), "--out", str(folder / "out.json"), *sizes])
    text = out.read_text(encoding="utf-8")
    assert not any(prompt in text for prompt in prompts)
    return json.loads(text) | {"given": len(prompts)}


def test_the_report_says_what_was_measured_and_on_what(report):
    assert report["n"] == report["given"] and 4 <= report["clusters"] <= report["n"] > report["searched"]
    assert report["scorer"] == "MiniLM (proxy)" and report["machine"]["cores"] > 0 and "torch" in report["versions"]
    found = report["mean_prompt"]
    assert found["settings"]["evaluations"] == 40 >= found["evaluations"] and found["gradients"] > 0
    assert found["seconds"] > found["seconds_of_search"] > 0
    assert found["held_out"]["low"] <= found["held_out"]["mean_scs"] <= found["held_out"]["high"]
    assert found["share_interval"][0] <= found["share_of_vector"] <= found["share_interval"][1]
    assert found["curve"][-1][2] == pytest.approx(found["train"]["mean_scs"], abs=1e-5)


def test_methods_are_compared_from_one_start_with_as_many_evaluations(report):
    compared = report["comparison"]
    assert set(compared["methods"]) == {"gradient", "surrogate", "greedy", "beam", "genetic", "random"}
    runs = [compared["exhaustive_greedy"], *compared["methods"].values()]
    assert len({run["curve"][0][3] for run in runs}) == 1
    for run in compared["methods"].values():
        assert run["evaluations"] <= compared["evaluations_each"] and run["curve"][-1][3] == run["value"]
    exhaustive = compared["exhaustive_greedy"]
    assert exhaustive["evaluations"] >= compared["vocabulary"] and exhaustive["value"] <= compared["best_vector"] + 1e-6
    if reached := compared["gradient_reaches_it_after"]:
        assert compared["times_fewer"] == pytest.approx(exhaustive["evaluations"] / reached["both"])
        assert reached["both"] == reached["evaluations"] + 3 * reached["gradients"]


@pytest.fixture(scope="module")
def recovery(tmp_path_factory):
    """Few training rows, and test rows of which one has a prompt of the training rows."""
    folder, module = tmp_path_factory.mktemp("recovery"), benchmark("recover")
    train, test = (shipped_triples([split]).iloc[::9].head(rows) for split, rows in (("train", 40), ("test", 12)))
    test = pd.concat([test, train.head(1)]).drop(columns="prompt_cluster")
    test["prediction"] = ["Improve the text", *test["rewrite_prompt"].tolist()[1:]]
    test.to_json(folder / "test.jsonl", orient="records", lines=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTREC_CACHE", str(folder / "cache"))
        patch.setattr(module, "shipped_triples", lambda _: train)
        patch.setattr(module, "BUDGETS", (0, 20))
        out = module.main(
            [str(folder / "test.jsonl"), "--out", str(folder / "out.json"), "--fitted", "30", "--asked", "20"]
        )
    text = out.read_text(encoding="utf-8")
    assert not any(prompt in text for prompt in test["rewrite_prompt"] if len(prompt) > 20)
    return json.loads(text)


def test_recovery_is_measured_without_the_prompts_that_are_asked_for(recovery):
    found = recovery["results"]["shipped"]
    assert recovery["n"] == 13 and found["left_out"] == 1 and found["train_rows"] <= 39
    for name in ("vector", "string", "bank_prompt_by_oracle", "predictions", "blend_string", "ridge_retrieval"):
        assert found[name]["low"] <= found[name]["mean"] <= found[name]["high"], name
    assert found["bank_prompt_by_oracle"]["mean"] >= found["bank_prompt_nearest"]["mean"]
    assert found["bank_prompt_by_oracle"]["mean"] >= found["best_constant_in_hindsight"]["mean"]
    assert found["lost_in_decoding"]["mean"] == pytest.approx(found["vector"]["mean"] - found["string"]["mean"])
    assert found["predictions"]["mean"] > 0.9  # they are the true prompts, but for the first
    assert sum(row["n"] for row in found["by_nearest_bank_prompt"]) == 13


def test_the_curve_grows_to_the_whole_and_seconds_are_of_rows_never_seen(recovery):
    rows = [point["train_rows"] for point in recovery["results"]["shipped"]["learning_curve"]]
    assert rows == sorted(rows) and rows[0] < rows[-1] == recovery["results"]["shipped"]["train_rows"]
    assert recovery["seconds"]["answered_rows"] == 20 and recovery["seconds"]["fit"] > 0 < recovery["seconds"]["answer"]


def test_a_longer_search_comes_nearer_to_the_vector(recovery):
    told = recovery["results"]["shipped"]["by_evaluations"]
    joined, searched = told["strings"]
    assert (joined["evaluations"], searched["evaluations"]) == (0, 20) and 0 < told["n"] <= 13
    assert joined["cosine"] < searched["cosine"] <= 1 and "by_evaluations" not in recovery["results"]


def test_rows_of_the_own_source_are_held_out_by_prompt_cluster(recovery):
    told = recovery["own_source"]["test"]
    assert 0 < told["n"] < 13 and told["with"]["train_rows"] > told["without"]["train_rows"]
    assert told["with"]["vector"]["low"] <= told["with"]["vector"]["mean"] <= told["with"]["vector"]["high"]


def test_the_real_size_benchmark_runs_on_the_tiny_model_and_skips_without_a_gpu(tmp_path, capsys):
    module = benchmark("real_size")
    sizes = ["--rows", "6", "--steps", "1", "--new-tokens", "2", "--batch-size", "3", "--max-tokens", "96"]
    out = module.main(["--shape", "tiny", "--out", str(tmp_path / "tiny.json"), *sizes])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["training"]) == {"ours", "ours, batches four times as large", "ancestor"}
    for told in report["training"].values():
        assert told["seconds_a_step"] > 0 < told["tokens_a_second"] and told["rows_a_step"] == 8
    assert report["answering"]["ours"]["rows_a_minute"] > 0 < report["answering"]["ancestor"]["rows_a_minute"]
    assert report["tokens_of_a_row"][-1] <= 96 and report["settings"]["quantise"]
    if not module.torch.cuda.is_available():
        assert module.main(["--out", str(tmp_path / "large.json")]) is None
        assert "needs a CUDA GPU" in capsys.readouterr().out and not (tmp_path / "large.json").exists()
