"""The mock tree, built once, and the rehearsals that run in it: they start together and share the cores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from kaggle_tree import EIGHT_DEVICES, GEMMA_KERAS, build_inputs, save_keras_preset

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
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
    "KerasLoraSettings.accumulation": 1,
    "KerasLoraSettings.max_tokens": 128,
    "EvaluationSettings.rows": 12,
    "EvaluationSettings.retrieval_rows": 60,
    "EvaluationSettings.embedding_rows": 60,
    "EvaluationSettings.embedding_steps": 6,
    "DecodingSettings.evaluations": 6,
    "EvaluationSettings.new_tokens": 8,
    "EvaluationSettings.longest_text": 15,  # words: eight virtual devices on two cores are slow
    "EvaluationSettings.longest_shot": 40,
    "EvaluationSettings.shots": 1,
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
        self.process.wait(timeout=1200)
        assert self.process.returncode == 0, (self.working / "stderr.txt").read_text()[-3000:]
        return json.loads((self.working / "stdout.txt").read_text().splitlines()[-1])

    def out(self, part: str) -> Path:
        self.seconds()
        return self.working / part

    @property
    def network_log(self) -> Path:
        return self.working / "network.txt"


def start_rehearsal(
    profile: str, inputs: Path, folder: Path, standalone: Path | None = None, **variables: str
) -> Rehearsal:
    """The three notebooks under `profile` (or their standalone edition), in a copy of the tree, without a network."""
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
    command = [sys.executable, HERE / "rehearse.py", profile, folder / "input", working, *filter(None, [standalone])]
    with open(working / "stdout.txt", "w") as out, open(working / "stderr.txt", "w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors, cwd=working)
    return Rehearsal(process, working)


@pytest.fixture(scope="session")
def run_build():
    """function(*arguments, **variables) -> finished process of `make kaggle`'s script, with no owner in its environment."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "KAGGLE_USERNAME"} | variables
        command = [sys.executable, SCRIPTS / "build_kaggle.py", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)

    return run


@pytest.fixture(scope="session")
def built(run_build, tmp_path_factory):
    """(finished process, folder) of a build that fetches nothing."""
    folder = tmp_path_factory.mktemp("build")
    return run_build("--no-download", "--out", folder, KAGGLE_USERNAME="somebody"), folder


@pytest.fixture(scope="session")
def rehearsals(inputs, built, tmp_path_factory):
    """Both Kaggle profiles and the standalone edition, running side by side while other tests go on."""
    running = {
        "kaggle-tpu": start_rehearsal("kaggle-tpu", inputs, tmp_path_factory.mktemp("tpu"), **EIGHT_DEVICES),
        "kaggle-t4x2": start_rehearsal("kaggle-t4x2", inputs, tmp_path_factory.mktemp("t4x2")),
        "standalone": start_rehearsal(
            "kaggle-t4x2", inputs, tmp_path_factory.mktemp("standalone"), built[1] / "standalone" / "kaggle-t4x2"
        ),
    }
    yield running
    for one in running.values():
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="session", autouse=True)
def rehearsals_first(request):
    """Start the rehearsals before the first test of this folder, where any test asks for them."""
    if any("rehearsals" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("rehearsals")
