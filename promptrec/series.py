"""Run the notebooks as a person would with *Run all*, and keep what they show.

The percent scripts in notebooks/ are the source; executed .ipynb files are derived from them here and nowhere else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from promptrec.errors import InputError
from promptrec.plot_style import alt_into_cells
from promptrec.profiles import Profile, missing_inputs
from promptrec.tables import full_disk_named, progress, read_table

PARTS = ("1-generate-data", "2-fine-tune", "3-evaluate")
IN_KERAS = {"2-fine-tune": "2-fine-tune-tpu"}  # what runs in a part's place where the models run in Keras
_ERASE = re.compile(r"\x1b\[[0-9;]*m")


def notebooks_folder() -> Path:
    """Where the percent sources lie: beside the package in a clone, or the folder in PROMPTREC_NOTEBOOKS."""
    folder = Path(os.environ.get("PROMPTREC_NOTEBOOKS", Path(__file__).parents[1] / "notebooks"))
    if not (folder / f"{PARTS[0]}.py").is_file():
        raise InputError(f"{folder}: the notebooks are not there; run from a clone or set PROMPTREC_NOTEBOOKS")
    return folder


def parts_of(profile: Profile) -> tuple[str, ...]:
    """The three parts as the profile runs them: Part 2 is a notebook of its own in torch and in Keras."""
    return tuple(IN_KERAS.get(part, part) for part in PARTS) if profile.in_keras else PARTS


def run_series(profile: Profile, parts: Sequence[str] = ()) -> dict[str, float]:
    """Execute the parts (default: the profile's three) in order; executed notebooks land in <out>/notebooks.

    Returns seconds by part.

    Raises InputError, with the notebook's own last line, when a part fails; what was finished before stays. An input that
    any part lacks is named before the first one starts.
    """
    if unknown := sorted(set(parts) - set(parts_of(profile))):
        raise InputError(f"part {unknown[0]!r} is unknown; choose one of {', '.join(parts_of(profile))}")
    if missing := missing_inputs(profile):
        raise InputError(f"{len(missing)} input(s) missing: {'; '.join(missing)}")
    out = Path(profile.out).resolve()
    seconds = {}
    for part in progress(parts or parts_of(profile), desc="series"):
        started = time.time()
        print(f"running {part} (profile {profile.name}) ...", flush=True)
        execute_notebook(notebooks_folder() / f"{part}.py", out / "notebooks" / f"{part}.ipynb", profile, out)
        seconds[part] = round(time.time() - started, 1)
    return seconds


def execute_notebook(source: Path, target: Path, profile: Profile, out: Path) -> Path:
    """Execute one percent script from top to bottom in a fresh kernel and save it with its outputs."""
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    environment = os.environ | {
        "PROMPTREC_PROFILE": profile.name,
        "PROMPTREC_OUT": str(out),
        "PROMPTREC_INPUT": str(Path(profile.input_root).resolve()),
    }
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(source.parent)}},
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        _save(notebook, target)
        raise InputError(
            f"{source.name}: {_ERASE.sub('', f'{error.ename}: {error.evalue}').splitlines()[0]} (see {target})"
        ) from None
    except DeadKernelError:
        _save(notebook, target)
        raise InputError(f"{source.name}: its kernel died, most likely for want of memory (see {target})") from None
    return _save(tidy(notebook), target)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave out what changes from run to run without saying anything: widget state, timings, stderr, paths of this machine."""
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    alt_into_cells(notebook)
    return notebook


def _save(notebook: nbformat.NotebookNode, target: Path) -> Path:
    with full_disk_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.from_dict(notebook), target)
    return target


def summary(profile: Profile) -> str:
    """The comparison table of a finished series and where everything lies."""
    out = Path(profile.out)
    table = read_table(out / "comparison.csv")
    files = [
        name
        for name in (
            "training_data.csv",
            "adapter",
            "predictions.csv",
            "scores.csv",
            "report.json",
            "submission.csv",
            "notebooks",
        )
        if (out / name).exists()
    ]
    lines = [
        table.to_string(index=False, float_format=lambda value: f"{value:.3f}"),
        "",
        f"in {out.resolve()}:",
        *(f"  {name}" for name in files),
    ]
    return "\n".join(lines)
