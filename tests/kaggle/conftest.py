"""The mock tree, built once, and the rehearsals that run in it: both start together, on a core each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from kaggle_tree import GEMMA_KERAS, build_inputs, save_keras_preset

HERE = Path(__file__).parent
SMALL = {
    "DataSettings.rows": 48,
    "DataSettings.prompts": 60,
    "GenerationSettings.max_new_tokens": 24,
    "LoraSettings.steps": 4,
    "LoraSettings.evaluate_every": 2,
    "LoraSettings.validation_rows": 6,
    "LoraSettings.rank": 4,
    "LoraSettings.max_tokens": 192,
    "KerasGeneration.max_new_tokens": 8,
    "KerasGeneration.batch_size": 8,
    "KerasLoraSettings.steps": 2,
    "KerasLoraSettings.evaluate_every": 2,
    "KerasLoraSettings.validation_rows": 2,
    "KerasLoraSettings.rank": 2,
    "KerasLoraSettings.batch_size": 2,
    "KerasLoraSettings.max_tokens": 128,
    "EvaluationSettings.rows": 12,
    "EvaluationSettings.retrieval_rows": 60,
    "EvaluationSettings.new_tokens": 8,
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_t5) -> Path:
    """/kaggle/input with everything attached; not to be written to."""
    root = build_inputs(tmp_path_factory.mktemp("kaggle") / "input", tiny_t5.saved_model)
    save_keras_preset(root / GEMMA_KERAS)
    return root


@pytest.fixture
def attached_inputs(inputs, tmp_path, monkeypatch) -> Path:
    """A copy of the tree to break, with the profiles pointed at it."""
    root = Path(shutil.copytree(inputs, tmp_path / "input"))
    monkeypatch.setenv("PROMPTREC_INPUT", str(root))
    monkeypatch.setenv("PROMPTREC_OUT", str(tmp_path / "working"))
    return root


@dataclass
class Rehearsal:
    """A running or finished rehearsal of one profile; `out(part)` waits for it."""

    process: subprocess.Popen
    working: Path

    def seconds(self) -> dict[str, float]:
        self.process.wait(timeout=600)
        assert self.process.returncode == 0, (self.working / "stderr.txt").read_text()[-3000:]
        return json.loads((self.working / "stdout.txt").read_text().splitlines()[-1])

    def out(self, part: str) -> Path:
        self.seconds()
        return self.working / part

    @property
    def network_log(self) -> Path:
        return self.working / "network.txt"


def start_rehearsal(profile: str, inputs: Path, folder: Path, **variables: str) -> Rehearsal:
    """The three notebooks under `profile`, in a copy of the tree, without a network."""
    shutil.copytree(inputs, folder / "input")
    working = folder / "working"
    working.mkdir()
    environment = os.environ | {
        "PROMPTREC_INPUT": str(folder / "input"),
        "PROMPTREC_SETTINGS": json.dumps(SMALL),
        "PYTHONPATH": str(HERE / "guard"),
        "NETWORK_LOG": str(working / "network.txt"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PROMPTREC_SCORER_PROCESS": "1",  # as on Kaggle, where the accelerator is taken
        **variables,
    }
    command = [sys.executable, str(HERE / "rehearse.py"), profile, str(folder / "input"), str(working)]
    with open(working / "stdout.txt", "w") as out, open(working / "stderr.txt", "w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors, cwd=working)
    return Rehearsal(process, working)


@pytest.fixture(scope="session")
def rehearsals(inputs, tmp_path_factory):
    """Both Kaggle profiles, running side by side while the other tests of this folder go on."""
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    running = {
        "kaggle-t4x2": start_rehearsal("kaggle-t4x2", inputs, tmp_path_factory.mktemp("t4x2")),
        "kaggle-tpu": start_rehearsal("kaggle-tpu", inputs, tmp_path_factory.mktemp("tpu"), **eight),
    }
    yield running
    for one in running.values():
        one.process.kill()
        one.process.wait()
