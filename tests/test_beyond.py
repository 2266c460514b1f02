"""The notebooks beyond the series: they run from top to bottom, small, and with a sentence-t5 where they look for one."""

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from promptrec.profiles import get_profile
from promptrec.series import execute_notebook

BEYOND = Path(__file__).resolve().parents[1] / "notebooks" / "beyond"
SMALL = {
    "MeanPromptSettings.prompts": 90,
    "MeanPromptSettings.evaluations": 60,
    "MeanPromptSettings.short_search": 40,
    "MeanPromptSettings.steps": 2,
    "MeanPromptSettings.sizes": [10],
    "MeanPromptSettings.probes": 4,
    "MetricSettings.prompts": 90,
    "MetricSettings.answers": 3,
    "MetricSettings.drawn": 2,
    "MetricSettings.checked": 4,
    "MetricSettings.pairs": 12,
    "MetricSettings.evaluations": 40,
    "DecodeSettings.train_rows": 60,
    "DecodeSettings.test_rows": 12,
    "DecodeSettings.most_steps": 8,
    "DecodeSettings.searched_rows": 2,
    "DecodeSettings.evaluations": [6, 12],
    "AskingSettings.train_rows": 40,
    "AskingSettings.test_rows": 9,
    "AskingSettings.sampled_rows": 5,
    "AskingSettings.samples": 2,
    "PromptingSettings.new_tokens": 5,
    "PromptingSettings.pool": 30,
    "EnsembleSettings.learn_rows": 40,
    "EnsembleSettings.choose_rows": 12,
    "EnsembleSettings.answer_rows": 10,
    "EnsembleSettings.more_prompts": 60,
    "DemonstrationSettings.train_rows": 40,
    "DemonstrationSettings.test_rows": 8,
    "DemonstrationSettings.steps": 3,
    "DemonstrationSettings.scs_steps": 2,
    "DemonstrationSettings.lengths_tried": 2,
    "ReinforcementSettings.test_rows": 6,
    "ReinforcementSettings.steps": 2,
    "ReinforcementSettings.first_steps": 2,
    "TrainOnSettings.all_rows": 60,
    "TrainOnSettings.few_rows": 12,
    "TrainOnSettings.steps": 2,
    "TrainOnSettings.passes": 3,
    "TrainOnSettings.watched": 6,
    "TrainOnSettings.answered": 4,
    "InversionDemo.inverted_train": 40,
    "InversionDemo.inverted_test": 8,
    "InversionDemo.bank_rows": 40,
    "InversionDemo.decoder_steps": 3,
    "InversionDemo.polished_rows": 2,
    "InversionDemo.evaluations": 6,
    "LoraSettings.rank": 2,
    "LoraSettings.batch_size": 4,
    "DPOSettings.watched_rows": 2,
    "DPOSettings.fitted_rows": 12,
    "DPOSettings.least_gap": 0.0,
    **{
        f"{kind}Settings.{name}": value
        for kind in ("PPO", "RLOO", "DPO")
        for name, value in {"rows": 4, "rows_a_step": 2, "samples": 2, "new_tokens": 4}.items()
    },
}


@pytest.fixture(scope="module")
def sentence_t5(tmp_path_factory) -> Path:
    """The tiny Hugging Face sentence-t5 alone; its SavedModel would cost an import of TensorFlow."""
    from tiny_t5 import _sentence_transformer

    return _sentence_transformer(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """function(notebook, settings) -> (all that it printed or showed as text, its output folder)."""

    def execute(name: str, **settings) -> tuple[str, Path]:
        monkeypatch.setenv("PROMPTREC_SETTINGS", json.dumps(SMALL | settings))
        path = execute_notebook(BEYOND / f"{name}.py", tmp_path / f"{name}.ipynb", get_profile("local"), tmp_path)
        outputs = [out for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
        return "\n".join(out.get("text") or out["data"]["text/plain"] for out in outputs), tmp_path

    return execute


def test_mean_prompts_runs_and_keeps_its_strings(run, sentence_t5):
    printed, out = run("mean-prompts", **{"MeanPromptSettings.sentence_t5": str(sentence_t5)})
    table = pd.read_csv(out / "mean-prompts.csv").set_index("method")
    assert {"best constant", "best vector", "gradient", "greedy", "beam", "genetic", "random"} <= set(table.index)
    assert table["searched"].idxmax() == "best vector"  # no string beats it on the prompts it was made of
    assert table.loc["gradient", "searched"] > table.loc["best constant", "searched"]
    assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
    assert json.loads((out / "mean-prompts.csv.manifest.json").read_text())["config"]["scorer"] == "MiniLM (proxy)"
    assert "sentence-t5 (Hugging Face): equal weights give" in printed and "skipped" not in printed


def test_what_the_metric_rewards_runs_and_reads_the_end_token_in_two_ways(run, sentence_t5):
    printed, out = run("what-the-metric-rewards", **{"MetricSettings.sentence_t5": str(sentence_t5)})
    table = pd.read_csv(out / "vocabulary-scan.csv", keep_default_na=False)
    assert len(table) == 30_522 and (table["exact"] != "").sum() >= 8
    assert "MiniLM (proxy), sentence-t5 (Hugging Face)" in printed and "nearest to </s>" in printed
    assert "'lucrarea': far pairs" in printed and "skipped" not in printed


def test_without_a_sentence_t5_the_metric_notebook_says_what_it_skips(run):
    printed, _ = run("what-the-metric-rewards")
    rows = [line.split() for line in printed.splitlines() if line.startswith("Rewrite this </s>")]
    assert rows[-1][-3:] == ["1", "/", "2"]  # end tokens: SentencePiece reads one, Hugging Face two
    assert printed.count("skipped: no sentence-t5") == 2


def test_from_embedding_to_prompt_runs_with_and_without_the_benchmark(run):
    printed, out = run("from-embedding-to-prompt")
    table = pd.read_csv(out / "embedding-answers.csv")
    assert len(table) == 12 and {"best constant", "minimum Bayes risk", "joined prompts"} <= set(table.columns)
    assert table.notna().all().all() and "joined" in printed and "bank_prompt_by_oracle" in printed
    printed, _ = run("from-embedding-to-prompt", **{"DecodeSettings.benchmark": "none.json"})
    assert "skipped: no none.json" in printed


def test_prompting_and_ensembles_runs_and_shows_the_comparison(run):
    printed, out = run("prompting-and-ensembles")
    table = pd.read_csv(out / "prompting-answers.csv")
    assert len(table) == 9 and table.notna().all().all() and "skipped" not in printed
    assert "trusts:" in printed and "best single part:" in printed and "few-shot-similar" in printed


def test_infilling_encoder_decoders_and_inversion_run(run):
    printed, _ = run("infilling-and-encoder-decoders")
    assert "the expected embedding is nearest to" in printed and "s a row" in printed
    assert {"bridge-pooled", "infilling-likelihood", "inversion-polished"} <= set(printed.split())


def test_preferences_run_from_a_first_adapter_of_their_own(run):
    printed, out = run("preferences-and-reinforcement")
    table = pd.read_csv(out / "preference-answers.csv")
    assert len(table) == 6 and table.notna().all().all()
    assert "first two steps" in printed and {"ppo-base", "dpo-other", "rloo"} <= set(printed.split())


def test_what_to_train_on_runs_every_variant(run):
    printed, out = run("what-to-train-on")
    assert len(pd.read_csv(out / "what-to-train-on.csv")) == 4
    passed = pd.read_csv(out / "many-passes.csv")
    assert passed.groupby("loss on")["passes"].agg(list).to_dict() == {"answer": [1, 2, 3], "whole": [1, 2, 3]}
    assert "tokens are labelled" in printed and "fine-tuned-narrow" in printed
