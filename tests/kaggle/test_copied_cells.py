"""Cells that a person may copy (`# same as promptrec...`) run on their own in a fresh process of the profile."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from kaggle_tree import EIGHT_DEVICES

from promptrec.profiles import PROFILES
from promptrec.series import notebooks_folder, parts_of

SAME = re.compile(r"# same as promptrec[\w.]*\.(\w+)")
PROFILE_VARIABLES = {"kaggle-t4x2": {}, "kaggle-tpu": EIGHT_DEVICES}


def copied_cells() -> list[tuple[str, str, str]]:
    """(profile, name of what is defined, cell) of every marked cell of the parts that the profile runs."""
    return [
        (profile, SAME.search(cell.source)[1], cell.source)
        for profile in PROFILE_VARIABLES
        for part in parts_of(PROFILES[profile])
        for cell in jupytext.read(notebooks_folder() / f"{part}.py").cells
        if cell.cell_type == "code" and SAME.search(cell.source)
    ]


@pytest.mark.parametrize(
    ("profile", "name", "cell"), copied_cells(), ids=lambda value: value if len(value) < 30 else ""
)
def test_a_copied_cell_runs_on_its_own(inputs, tmp_path, profile, name, cell):
    environment = os.environ | {
        "PROMPTREC_PROFILE": profile,
        "PROMPTREC_INPUT": str(inputs),
        "PROMPTREC_OUT": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent / "guard"),
        "NETWORK_LOG": str(tmp_path / "network"),
        "OMP_NUM_THREADS": "1",
        **PROFILE_VARIABLES[profile],
    }
    command = [sys.executable, "-c", f"{cell}\nassert callable({name})"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "network").exists()


def test_every_profile_has_cells_to_copy():
    assert {profile for profile, *_ in copied_cells()} == set(PROFILE_VARIABLES)
    assert {"slice_words", "answer_loss", "scs"} <= {name for _, name, _ in copied_cells()}
