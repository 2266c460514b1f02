"""Rehearsals: the three notebooks from top to bottom under the Kaggle profiles, on a mock tree, without a network."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from promptrec.data import TRAINING_COLUMNS
from promptrec.series import PARTS
from promptrec.splits import check_split
from promptrec.submission import FALLBACK

GENERATE, FINE_TUNE, EVALUATE = PARTS
REWRITER = {"kaggle-t4x2": "hf:7b-it", "kaggle-tpu": "keras:gemma_instruct_7b_en"}


@pytest.fixture(params=list(REWRITER))
def profile(request) -> str:
    return request.param


@pytest.fixture
def rehearsal(profile, rehearsals):
    return rehearsals[profile]


@pytest.fixture
def rewriter(profile) -> str:
    return REWRITER[profile]


@pytest.fixture
def t4x2(rehearsals):
    """The rehearsal whose three parts are all notebooks."""
    return rehearsals["kaggle-t4x2"]


def printed(notebook: Path) -> str:
    cells = nbformat.read(notebook, 4).cells
    return "\n".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.timeout(600)
def test_the_three_parts_run(rehearsal):
    assert list(rehearsal.seconds()) == list(PARTS)


def test_nothing_tried_to_reach_the_network(rehearsal):
    rehearsal.seconds()
    assert not rehearsal.network_log.exists(), rehearsal.network_log.read_text()


def test_the_rewriter_worked_on_the_attached_corpora(rehearsal, rewriter):
    table = pd.read_csv(rehearsal.out(GENERATE) / "training_data.csv", dtype={"id": str})
    assert tuple(table.columns) == TRAINING_COLUMNS and table["id"].is_unique
    check_split(table)
    made = table[table["source"] == rewriter]
    assert set(made["split"]) == {"train", "validation", "test"}
    assert {"i feel", "Old To"} & set(made["original_text"].str[:6])
    assert not made["original_text"].str.contains("résistance|==").any()
    manifest = json.loads((rehearsal.out(GENERATE) / "training_data.csv.manifest.json").read_text())
    assert manifest["config"]["rewriter"] == rewriter


def test_each_part_reads_what_the_one_before_wrote(rehearsal):
    rehearsal.seconds()
    attached = rehearsal.working.parent / "input"
    data, adapter = attached / f"promptrec-{GENERATE}/training_data.csv", attached / f"promptrec-{FINE_TUNE}/adapter"
    assert data.is_file() and adapter.is_dir()
    for part in (FINE_TUNE, EVALUATE):
        assert not (rehearsal.out(part) / "training_data.csv").exists()
    assert not (rehearsal.out(EVALUATE) / "adapter").exists()


@pytest.mark.parametrize(
    ("profile", "weights", "steps"),
    [("kaggle-t4x2", "adapter_model.safetensors", 4), ("kaggle-tpu", "adapter.lora.h5", 2)],
)
def test_an_adapter_was_trained_and_its_checkpoint_chosen_by_score(rehearsal, rewriter, weights, steps):
    adapter = rehearsal.out(FINE_TUNE) / "adapter"
    assert (adapter / weights).is_file()
    history = pd.read_csv(adapter / "history.csv")
    assert history["step"].max() == steps and history["scs"].notna().any()
    manifest = json.loads((rehearsal.out(FINE_TUNE) / "adapter.manifest.json").read_text())["config"]
    assert manifest["scorer"] == "sentence-t5 (TensorFlow)" and manifest["base_model"] == rewriter.split(":")[1]


def test_the_submission_answers_exactly_the_competitions_rows(rehearsal):
    submission = pd.read_csv(rehearsal.out(EVALUATE) / "submission.csv")
    test = pd.read_csv(rehearsal.working.parent / "input/llm-prompt-recovery/test.csv")
    assert list(submission.columns) == ["id", "rewrite_prompt"]
    assert submission["id"].tolist() == test["id"].tolist()
    assert submission["rewrite_prompt"].notna().all() and submission["rewrite_prompt"].str.strip().ne("").all()
    blank = test["rewritten_text"].isna().to_numpy()
    assert blank.any() and set(submission.loc[blank, "rewrite_prompt"]) == {FALLBACK}


def test_the_scorer_of_record_scored_and_gemmas_rows_decided(t4x2):
    report = json.loads((t4x2.out(EVALUATE) / "report.json").read_text())
    assert report["scorer"] == "sentence-t5 (TensorFlow)" and report["scorer_of_record"] is True
    assert report["method_chosen_on"] == "hf:7b-it" and "hf:7b-it" in report["test_sets"]
    comparison = pd.read_csv(t4x2.out(EVALUATE) / "comparison.csv")
    methods = {"constant", "best constant", "retrieval", "zero-shot", "few-shot", "fine-tuned"}
    assert set(comparison["scorer"]) == {report["scorer"]} and methods <= set(comparison["method"])


def test_the_keras_model_is_scored_beside_a_constant(rehearsals):
    out = rehearsals["kaggle-tpu"].out(EVALUATE)
    for name in ("constant", "fine-tuned"):
        assert pd.read_csv(out / f"scores-{name}.csv")["scs"].between(-1, 1).all()


@pytest.mark.parametrize(("profile", "parts"), [("kaggle-t4x2", PARTS), ("kaggle-tpu", PARTS[:1])])
def test_the_notebooks_name_their_profile(rehearsal, profile, parts):
    rehearsal.seconds()
    for part in parts:
        assert f"profile: {profile}" in printed(rehearsal.working / f"{part}.ipynb")


# --- the guard itself

TRIES = """
import socket
for family, address in ((socket.AF_INET, ("192.0.2.1", 80)), (socket.AF_INET, ("example.org", 80))):
    with socket.socket(family) as one:
        one.settimeout(2)
        try:
            one.connect(address)
        except OSError as error:
            print(error)
"""


def test_the_guard_refuses_the_network_and_lets_this_machine_through(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = (
            f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]})); print('local is fine')"
        )
        guard = Path(__file__).parent / "guard"
        environment = os.environ | {"PYTHONPATH": str(guard), "NETWORK_LOG": str(tmp_path / "log")}
        command = [sys.executable, "-c", TRIES + own]
        lines = subprocess.check_output(command, env=environment, text=True).splitlines()
    assert lines[2] == "local is fine" and all("the network is off" in line for line in lines[:2])
    assert len((tmp_path / "log").read_text().splitlines()) == 2
