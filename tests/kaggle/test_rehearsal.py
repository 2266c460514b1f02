"""Rehearsals: the three notebooks from top to bottom under the Kaggle profiles, on a mock tree, without a network."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from promptrec.data import TRAINING_COLUMNS
from promptrec.profiles import PROFILES
from promptrec.series import PARTS, parts_of
from promptrec.splits import check_split
from promptrec.submission import FALLBACK

GENERATE, _, EVALUATE = PARTS
PROFILE = {"kaggle-t4x2": "kaggle-t4x2", "kaggle-tpu": "kaggle-tpu", "standalone": "kaggle-t4x2"}
REWRITER = {"kaggle-t4x2": "hf:7b-it", "kaggle-tpu": "keras:gemma_instruct_7b_en"}
ADAPTER = {"kaggle-t4x2": ("adapter_model.safetensors", 4), "kaggle-tpu": ("adapter.lora.h5", 2)}  # file, steps


@pytest.fixture(params=list(PROFILE))
def rehearsal(request, rehearsals):
    """Each of the rehearsals, with its profile, parts and rewriter on it."""
    one = rehearsals[request.param]
    one.profile = PROFILE[request.param]
    one.parts, one.rewriter = parts_of(PROFILES[one.profile]), REWRITER[one.profile]
    return one


def printed(notebook: Path) -> str:
    cells = nbformat.read(notebook, 4).cells
    return "\n".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.timeout(1200)
def test_the_three_parts_run(rehearsal):
    assert tuple(rehearsal.seconds()) == rehearsal.parts


def test_nothing_tried_to_reach_the_network(rehearsal):
    rehearsal.seconds()
    assert not rehearsal.network_log.exists(), rehearsal.network_log.read_text()


def test_the_rewriter_worked_on_the_attached_corpora(rehearsal):
    table = pd.read_csv(rehearsal.out(GENERATE) / "training_data.csv", dtype={"id": str})
    assert tuple(table.columns) == TRAINING_COLUMNS and table["id"].is_unique
    check_split(table)
    made = table[table["source"] == rehearsal.rewriter]
    assert set(made["split"]) == {"train", "validation", "test"}
    assert {"i feel", "Old To"} & set(made["original_text"].str[:6])
    assert not made["original_text"].str.contains("résistance|==").any()
    manifest = json.loads((rehearsal.out(GENERATE) / "training_data.csv.manifest.json").read_text())
    assert manifest["config"]["rewriter"] == rehearsal.rewriter


def test_each_part_reads_what_the_one_before_wrote(rehearsal):
    rehearsal.seconds()
    attached = rehearsal.working.parent / "input"
    generate, fine_tune, evaluate = rehearsal.parts
    assert (attached / f"promptrec-{generate}/training_data.csv").is_file()
    assert (attached / f"promptrec-{fine_tune}/adapter").is_dir()
    for part in (fine_tune, evaluate):
        assert not (rehearsal.out(part) / "training_data.csv").exists()
    assert not (rehearsal.out(evaluate) / "adapter").exists()


def test_an_adapter_was_trained_and_its_checkpoint_chosen_by_score(rehearsal):
    folder, (weights, steps) = rehearsal.out(rehearsal.parts[1]), ADAPTER[rehearsal.profile]
    adapter = folder / "adapter"
    assert (adapter / weights).is_file()
    history = pd.read_csv(adapter / "history.csv")
    assert history["step"].max() == steps and history["scs"].notna().any()
    manifest = json.loads((folder / "adapter.manifest.json").read_text())["config"]
    assert manifest["scorer"] == "sentence-t5 (TensorFlow)"
    assert manifest["base_model"] == rehearsal.rewriter.split(":")[1]


def test_the_submission_answers_exactly_the_competitions_rows(rehearsal):
    submission = pd.read_csv(rehearsal.out(EVALUATE) / "submission.csv")
    test = pd.read_csv(rehearsal.working.parent / "input/llm-prompt-recovery/test.csv")
    assert list(submission.columns) == ["id", "rewrite_prompt"]
    assert submission["id"].tolist() == test["id"].tolist()
    assert submission["rewrite_prompt"].notna().all() and submission["rewrite_prompt"].str.strip().ne("").all()
    blank = test["rewritten_text"].isna().to_numpy()
    assert blank.any() and set(submission.loc[blank, "rewrite_prompt"]) == {FALLBACK}


def test_the_scorer_of_record_scored_and_gemmas_rows_decided(rehearsal):
    report = json.loads((rehearsal.out(EVALUATE) / "report.json").read_text())
    assert report["scorer"] == "sentence-t5 (TensorFlow)" and report["scorer_of_record"] is True
    assert report["method_chosen_on"] == rehearsal.rewriter and rehearsal.rewriter in report["test_sets"]
    comparison = pd.read_csv(rehearsal.out(EVALUATE) / "comparison.csv")
    methods = {"constant", "best constant", "retrieval", "embedding", "zero-shot", "few-shot", "fine-tuned"}
    assert set(comparison["scorer"]) == {report["scorer"]} and methods <= set(comparison["method"])


def test_the_notebooks_name_their_profile(rehearsal):
    rehearsal.seconds()
    for part in rehearsal.parts:
        assert f"profile: {rehearsal.profile}" in printed(rehearsal.working / f"{part}.ipynb")


def test_weights_lay_on_eight_devices(rehearsals):
    rehearsals["kaggle-tpu"].seconds()
    shown = printed(rehearsals["kaggle-tpu"].working / "2-fine-tune-tpu.ipynb")
    assert "8 devices:" in shown
    whole, share = map(float, re.search(r"all weights ([\d.]+) MB, on each device ([\d.]+) MB", shown).groups())
    assert share < whole / 6


def test_standalone_notebooks_ran_their_own_sources(rehearsals):
    one = rehearsals["standalone"]
    one.seconds()
    for part in PARTS:
        own = one.working / part / "promptrec"
        assert f"promptrec from {own}" in printed(one.working / f"{part}.ipynb") and (own / "profiles.py").is_file()


# --- the guard itself

HERE = Path(__file__).parent
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
        environment = os.environ | {"PYTHONPATH": str(HERE / "guard"), "NETWORK_LOG": str(tmp_path / "log")}
        command = [sys.executable, "-c", TRIES + own]
        lines = subprocess.check_output(command, env=environment, text=True).splitlines()
    assert lines[2] == "local is fine" and all("the network is off" in line for line in lines[:2])
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_the_guard_hides_the_installed_package(tmp_path):
    command = [sys.executable, "-c", "import promptrec"]
    for absent, code in (({}, 0), ({"PROMPTREC_ABSENT": "1"}, 1)):
        environment = os.environ | {"PYTHONPATH": str(HERE / "guard")} | absent
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == code
    assert "ModuleNotFoundError: No module named 'promptrec'" in done.stderr
