"""The comparison: waves, resumption, failures, results; with real methods in processes of their own."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from promptrec import trials
from promptrec.data import shipped_triples
from promptrec.errors import InputError
from promptrec.findings import CLAIMS
from promptrec.methods import METHODS, Method
from promptrec.profiles import get_profile
from promptrec.tables import read_json, write_table
from promptrec.trials import CompareSettings, Trial, in_waves, run_comparison

SMALL = CompareSettings(rows=8, validation_rows=4, seeds=2, jobs=1)


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    """A file of a few shipped triples with their split, of two sources."""
    table = pd.concat([part.head(24) for _, part in shipped_triples().groupby("split")], ignore_index=True)
    table["source"] = ["a", "b"] * (len(table) // 2)
    return write_table(table, tmp_path_factory.mktemp("data") / "triples.csv")


@pytest.fixture(scope="module")
def small_bank():
    """A bank of a few prompts: what is measured here does not depend on its size, the time does."""
    patch = pytest.MonkeyPatch()
    patch.setattr("promptrec.methods.shipped_prompts", lambda: pd.DataFrame({"rewrite_prompt": ["Make it rhyme"]}))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def compared(triples, tmp_path_factory, small_bank):
    """(table, folder) of a comparison of two constants, the mean prompt failing on its settings."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTREC_SETTINGS", json.dumps({"SearchSettings.method": "nothing"}))
        return run_comparison(triples, folder, get_profile("local"), ["constant", "mean-prompt"], SMALL), folder


def test_waves_hold_everything_needed_and_each_needs_only_those_before_it():
    waves = in_waves(METHODS)
    assert sorted(method for wave in waves for method in wave) == sorted(METHODS)
    for place, wave in enumerate(waves):
        earlier = {method for one in waves[:place] for method in one}
        assert all(trials.before(method) <= earlier for method in wave)


def test_a_method_alone_brings_what_it_needs(monkeypatch):
    monkeypatch.setitem(
        METHODS, "joined", Method("choosing", "a test", "inference:build_constant", needs=("few-shot",))
    )
    assert in_waves(["joined"]) == [["few-shot"], ["joined"]]


def test_a_method_that_is_not_random_has_one_seed(tmp_path):
    assert trials.trial_of(tmp_path, "constant", 2).seed == 0
    assert trials.trial_of(tmp_path, "embedding", 2).seed == 2


def test_trials_share_no_accelerator():
    assert trials._jobs(get_profile("local")) >= 1 == trials._jobs(get_profile("gpu"))


def test_the_results_name_every_method_and_source(compared):
    table, folder = compared
    assert set(zip(table["source"], table["method"], strict=True)) == {
        (source, method) for source in "ab" for method in ("best-constant", "constant")
    }
    assert (table["n"] == 4).all() and (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
    assert table.loc[table["method"] == "best-constant", "difference"].eq(0).all()
    written = read_json(folder / "results.json")
    assert written["scorer"] == "MiniLM (proxy)" and len(written["rows"]) == len(table)


def test_a_failed_method_is_named_and_takes_no_other_with_it(compared):
    _, folder = compared
    assert read_json(folder / "results.json")["missing"] == ["mean-prompt, seed 0", "mean-prompt, seed 1"]
    assert "method 'nothing' is unknown" in (folder / "trials" / "mean-prompt-0.failed").read_text()


def test_a_finished_trial_is_not_run_again_and_a_failed_one_is(compared, triples, small_bank, monkeypatch):
    _, folder = compared
    done = {path: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}
    monkeypatch.setenv("PROMPTREC_SETTINGS", json.dumps({"SearchSettings.evaluations": 20}))
    table = run_comparison(triples, folder, get_profile("local"), ["constant", "mean-prompt"], SMALL)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert table.set_index("method").loc["mean-prompt", "seeds"].tolist() == [2, 2]
    assert not list((folder / "trials").glob("*.failed")) and read_json(folder / "results.json")["missing"] == []


def test_a_folder_of_other_rows_is_refused(compared, tmp_path, small_bank):
    other = write_table(shipped_triples().groupby("split").head(12), tmp_path / "other.csv")
    with pytest.raises(InputError, match="holds a comparison of other rows"):
        run_comparison(other, compared[1], get_profile("local"), ["constant"], SMALL)


def test_a_table_without_test_rows_is_refused(tmp_path, small_bank):
    path = write_table(shipped_triples(["train", "validation"]).head(30), tmp_path / "some.csv")
    with pytest.raises(InputError, match=r"no \w+ rows; a comparison needs"):
        run_comparison(path, tmp_path / "out", get_profile("local"), ["constant"], SMALL)


def test_methods_see_neither_prompts_nor_clusters(compared, monkeypatch):
    seen = []

    class Watching:
        def recover(self, table):
            seen.append(set(table.columns))
            return ["Make it rhyme"] * len(table)

    monkeypatch.setattr(Method, "build", lambda self, task: Watching())
    trials.run_trial(Trial(compared[1], "retrieval", 5), get_profile("local"))
    (compared[1] / "trials" / "retrieval-5.json").unlink()
    assert seen and not seen[0] & {"rewrite_prompt", "prompt_cluster", "split", "scs"}


def test_the_command_names_an_unknown_method(triples, tmp_path):
    command = [
        sys.executable,
        "-m",
        "promptrec",
        "compare",
        str(triples),
        "--out",
        str(tmp_path / "o"),
        "--methods",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("promptrec: method 'x' is unknown")


TINY = {
    "SearchSettings.evaluations": 20,
    "PromptingSettings.new_tokens": 4,
    "PromptingSettings.pool": 20,
    "PromptingSettings.text_words": 10,
    "LoraSettings.steps": 2,
    "LoraSettings.batch_size": 2,
    "LoraSettings.rank": 2,
    "LoraSettings.evaluate_every": 2,
    "LoraSettings.validation_rows": 2,
    "InfillingSettings.steps": 2,
    "EncoderDecoderSettings.steps": 2,
    "InversionSettings.steps": 2,
    "InversionSettings.samples": 1,
    "InversionSettings.evaluations": 2,
    "JoiningSettings.clusters": 2,
    "JoiningSettings.evaluations": 5,
    "DPOSettings.fitted_rows": 12,
    "DPOSettings.least_gap": 0.0,
    "DPOSettings.watched_rows": 2,
    **{
        f"{kind}Settings.{name}": value
        for kind in ("PPO", "RLOO", "DPO")
        for name, value in {"steps": 2, "rows": 4, "rows_a_step": 2, "samples": 2, "new_tokens": 4, "words": 8}.items()
    },
}


def test_every_method_runs_in_a_comparison_small_enough_to_wait_for(triples, tmp_path, small_bank, monkeypatch):
    """The whole comparison, every method, one seed; in this process, as the imports would take most of the time."""
    monkeypatch.setenv("PROMPTREC_SETTINGS", json.dumps(TINY))
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "cache"))
    profile, folder = get_profile("local"), tmp_path / "compared"
    rows = trials.prepare(triples, folder, profile, SMALL)
    todo = [Trial(folder, method, 0) for wave in in_waves(METHODS) for method in wave]
    for trial in todo:
        told = trials.run_trial(trial, profile)
        assert all(row["answer"].strip() and -1 <= row["scs"] <= 1 for row in told["answers"]), trial.method
    table = trials.write_results(folder, rows, todo, profile, SMALL)
    assert set(table["method"]) == set(METHODS) and set(table["source"]) == {"a", "b"}
    assert table[["mean", "low", "high", "difference"]].notna().all().all()
    written = read_json(folder / "results.json")
    assert written["missing"] == [] and {one["text"] for one in written["claims"]} == {one.text for one in CLAIMS}
    assert {name.split(",")[0] for name in written["histories"]} >= {
        "ppo-base",
        "ppo-tuned",
        "rloo",
        "dpo",
        "dpo-other",
    }
