"""python rehearse.py PROFILE INPUTS WORKING [NOTEBOOKS]: the series as on Kaggle, each part a session of its own.

Every part has an empty working folder and is run in it; what it left is attached to the next ones below INPUTS, Part 1's
table with its shortest rows only, as two cores are slow. Prints the seconds. NOTEBOOKS is a folder of standalone
notebooks: their kernels cannot import the promptrec of this clone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from promptrec.profiles import activate, get_profile
from promptrec.series import PARTS, execute_notebook, notebooks_folder, parts_of
from promptrec.tables import read_table, write_table

ROWS = 16  # of each source on each side


def shorten(path: Path) -> None:
    """Keep the shortest rows of each source and split: on virtual devices every token and every length costs."""
    table = read_table(path)
    lengths = table["original_text"].str.len() + table["rewritten_text"].str.len()
    write_table(table.iloc[lengths.argsort(kind="stable")].groupby(["source", "split"]).head(ROWS), path)


def rehearse(name: str, inputs: Path, working: Path, standalone: Path | None) -> None:
    profile, seconds = activate(get_profile(name)), {}
    if standalone:
        os.environ["PROMPTREC_ABSENT"] = "1"
    for part in parts_of(profile):
        started, folder = time.monotonic(), working / part
        folder.mkdir()
        source = standalone / f"{part}.ipynb" if standalone else notebooks_folder() / f"{part}.py"
        own = Path(shutil.copy(source, folder))  # a kernel starts where its notebook lies
        execute_notebook(own, working / f"{part}.ipynb", profile, folder)
        attached = shutil.copytree(folder, inputs / f"promptrec-{part}")
        if part == PARTS[0]:
            shorten(attached / "training_data.csv")
        seconds[part] = round(time.monotonic() - started, 1)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    rehearse(sys.argv[1], *map(Path, sys.argv[2:4]), Path(sys.argv[4]) if sys.argv[4:] else None)
