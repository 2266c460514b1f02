"""The notebooks: sources and committed outputs agree, cells can be copied, the series runs and its artefacts fit."""

import ast
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import pytest
import yaml

from promptrec.data import TRAINING_COLUMNS
from promptrec.series import PARTS
from promptrec.splits import check_split

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").rglob("*.py"))
COMMITTED = [path.with_suffix(".ipynb") for path in SOURCES]
SAME = re.compile(r"#\s*same as (promptrec(?:\.\w+)+)\.(\w+)")
SMALL = {
    "DataSettings.rows": 260,
    "DataSettings.prompts": 200,
    "DataSettings.written": 400,
    "LoraSettings.steps": 8,
    "LoraSettings.evaluate_every": 4,
    "LoraSettings.validation_rows": 8,
    "LoraSettings.rank": 4,
    "EvaluationSettings.rows": 100,
    "EvaluationSettings.retrieval_rows": 300,
    "EvaluationSettings.embedding_rows": 300,
    "EvaluationSettings.embedding_steps": 20,
    "DecodingSettings.evaluations": 6,
}


def names(path: Path) -> str:
    return path.name


def code_cells(path: Path) -> list[str]:
    return [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_committed_notebook_is_derived_from_its_source(source):
    pairs = zip(jupytext.read(source).cells, nbformat.read(source.with_suffix(".ipynb"), 4).cells, strict=True)
    assert all((ours.cell_type, ours.source) == (theirs.cell_type, theirs.source) for ours, theirs in pairs)


@pytest.mark.parametrize("path", COMMITTED, ids=names)
def test_committed_outputs_are_real_clean_and_small(path):
    assert path.stat().st_size <= 300_000
    notebook = nbformat.read(path, 4)
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert len(outputs) >= 10
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", COMMITTED, ids=names)
def test_committed_outputs_name_no_folder_of_the_machine_they_ran_on(path):
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    shown = "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)
    found = re.findall(r"(?<![\w.:<}*)\]])/(?:[\w.-]+/)+[\w.-]+", shown)
    assert [path for path in found if not path.startswith("/kaggle/")] == []


@pytest.mark.parametrize("path", COMMITTED, ids=names)
def test_every_figure_has_alt_text(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), cell.source[:80]
        for image in re.findall(r"```\{image\}.*?```", cell.source, flags=re.DOTALL):
            assert ":alt:" in image
            assert (path.parent / image.split()[1]).is_file()


def test_every_notebook_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {chapter["file"] for part in toc["parts"] for chapter in part["chapters"]}
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in SOURCES} <= listed
    assert all(
        (ROOT / f"{name}{ending}").is_file()
        for name in listed
        for ending in [".ipynb" if "notebooks" in name else ".md"]
    )


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_cells_are_short(source):
    lengths = [len([line for line in cell.splitlines() if line.strip()]) for cell in code_cells(source)]
    assert max(lengths) <= 40 and statistics.median(lengths) <= 8


def copies() -> list[tuple[str, str, str, str]]:
    """(notebook, cell, module, name) of every definition that stands in a notebook and in the package."""
    return [
        (path.name, cell, module, name)
        for path in SOURCES
        for cell in code_cells(path)
        for module, name in SAME.findall(cell)
    ]


def definition(tree: ast.Module, name: str) -> str:
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    assert len(found) == 1, name
    return ast.dump(found[0])


@pytest.mark.parametrize(
    ("notebook", "cell", "module", "name"), copies(), ids=lambda value: value if len(value) < 40 else ""
)
def test_a_copied_definition_equals_the_packages_and_runs_on_its_own(notebook, cell, module, name):
    package = Path(importlib.import_module(module).__file__).read_text()
    assert definition(ast.parse(cell), name) == definition(ast.parse(package), name)
    exec(compile(cell, notebook, "exec"), {"__name__": "a fresh kernel"})


def test_there_are_copied_definitions_in_every_part():
    assert {name for name, *_ in copies()} >= {f"{part}.py" for part in PARTS}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    """The three notebooks, executed as the command line does, at small settings."""
    out = tmp_path_factory.mktemp("series")
    environment = os.environ | {
        "PROMPTREC_SETTINGS": json.dumps(SMALL),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "promptrec.cli", "series", "--profile", "local", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    (out / "stdout.txt").write_text(done.stdout)
    return out


@pytest.mark.timeout(900)
def test_the_series_runs_and_prints_its_table(small_run):
    printed = (small_run / "stdout.txt").read_text()
    assert "fine-tuned" in printed and "best constant" in printed and "submission.csv" in printed


def test_training_data_has_the_schema_and_a_clean_split(small_run):
    table = pd.read_csv(small_run / "training_data.csv", dtype={"id": str})
    assert tuple(table.columns) == TRAINING_COLUMNS and table["id"].is_unique
    assert set(table["split"]) == {"train", "validation", "test"}
    check_split(table)
    manifest = json.loads((small_run / "training_data.csv.manifest.json").read_text())
    assert (
        manifest["rows"] == len(table)
        and manifest["profile"] == "local"
        and "stand-in" in manifest["config"]["rewriter"]
    )


def test_the_adapter_is_in_peft_format(small_run):
    config = json.loads((small_run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (small_run / "adapter" / "adapter_model.safetensors").is_file()


def test_predictions_scores_and_report_fit_together(small_run):
    predictions, scores = (
        pd.read_csv(small_run / name, dtype={"id": str}) for name in ("predictions.csv", "scores.csv")
    )
    assert {"id", "rewrite_prompt", "method"} <= set(predictions) and predictions["rewrite_prompt"].str.strip().ne(
        ""
    ).all()
    assert set(scores["method"]) == set(predictions["method"]) and scores["scs"].between(-1, 1).all()
    report = json.loads((small_run / "report.json").read_text())
    assert "MiniLM (proxy)" in json.dumps(report)
    comparison = pd.read_csv(small_run / "comparison.csv")
    assert {"test_set", "method", "mean", "low", "high", "difference", "difference_low", "difference_high", "n"} <= set(
        comparison
    )


def test_the_submission_is_what_kaggle_takes(small_run):
    submission = pd.read_csv(small_run / "submission.csv")
    assert list(submission.columns) == ["id", "rewrite_prompt"]
    assert submission["id"].is_unique and submission["rewrite_prompt"].str.strip().ne("").all()
