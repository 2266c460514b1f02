"""What `make kaggle` builds: metadata that the kaggle client takes, wheels that install offline, sources that suffice."""

import io
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import build_kaggle
import nbformat
import pandas as pd
import pytest
from build_kaggle import PLAN, SOURCE_LIMIT, kernel_metadata, kernel_slug, plain_markdown
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from promptrec.profiles import PROFILES, missing_inputs
from promptrec.series import parts_of

KERNELS = [(profile, part) for profile in PLAN["profiles"] for part in parts_of(PROFILES[profile])]


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


# --- the command


def test_without_a_name_nothing_is_built(run_build, tmp_path):
    for arguments in ((), ("--owner", "a/b")):
        done = run_build("--out", tmp_path / "kaggle", *arguments)
        assert done.returncode == 2 and "pass --owner NAME or set KAGGLE_USERNAME" in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "kaggle").exists()


def test_offline_it_says_which_wheels_are_missing(built):
    done, folder = built
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(f"{name}=={build_kaggle.pins()[name]}" in done.stderr for name in PLAN["wheels"])
    assert f"kaggle kernels push -p {folder}/kaggle-tpu/2-fine-tune-tpu" in done.stdout


def test_a_wheel_that_lies_there_is_not_missing(tmp_path):
    pin = build_kaggle.pins()["hf-xet"]
    (tmp_path / f"hf_xet-{pin}-cp37-abi3-manylinux_2_28_x86_64.whl").touch()
    (tmp_path / "peft-0.0.1-py3-none-any.whl").touch()
    missing = build_kaggle.missing_wheels(tmp_path)
    assert f"hf-xet=={pin}" not in missing and f"peft=={build_kaggle.pins()['peft']}" in missing


# --- wheels


def test_every_requirement_of_a_wheel_is_a_wheel_or_in_the_image():
    known = {canonicalize_name(name) for name in (*PLAN["wheels"], *PLAN["image"])}
    for name in PLAN["wheels"]:
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": "", "python_version": PLAN["python"]}):
                assert canonicalize_name(needed.name) in known, f"{name} needs {line}"


def test_no_library_is_both_brought_along_and_taken_from_the_image():
    assert not set(PLAN["wheels"]) & set(PLAN["image"])
    assert not {"torch", "tensorflow", "jax", "numpy"} & set(PLAN["wheels"])


def test_the_data_set_has_what_the_client_asks_for(built):
    found = json.loads((built[1] / "dataset" / "dataset-metadata.json").read_text())
    owner, slug = found["id"].split("/")
    assert owner == "somebody" and 6 <= len(slug) <= 50 and 6 <= len(found["title"]) <= 50
    assert 20 <= len(found["subtitle"]) <= 80 and len(found["licenses"]) == 1


def test_the_first_cell_installs_the_attached_wheel_offline(built, tmp_path):
    shutil.copytree(built[1] / "dataset", tmp_path / "input" / "datasets" / "somebody" / PLAN["dataset"]["slug"])
    cell = code_of(built[1] / "kaggle-t4x2" / "1-generate-data" / "1-generate-data.ipynb")[0]
    check = "from promptrec.data import shipped_triples; import promptrec; print(promptrec.__file__, len(shipped_triples()))"
    environment = os.environ | {
        "PROMPTREC_INPUT": str(tmp_path / "input"),
        "PIP_TARGET": str(tmp_path / "site"),
        "PYTHONPATH": f"{Path(__file__).parent / 'guard'}:{tmp_path / 'site'}",
        "PROMPTREC_ABSENT": "1",
        "NETWORK_LOG": str(tmp_path / "network"),
    }
    for script in (cell, check):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and int(done.stdout.split()[-1]) > 1000
    assert not (tmp_path / "network").exists()


def test_the_first_cell_says_when_the_data_set_is_not_attached(built, tmp_path):
    cell = code_of(built[1] / "kaggle-tpu" / "3-evaluate" / "3-evaluate.ipynb")[0]
    environment = os.environ | {"PROMPTREC_INPUT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", cell], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"attach the data set {PLAN['dataset']['slug']}" in done.stderr.splitlines()[-1]


# --- kernels


@pytest.mark.parametrize(("profile", "part"), KERNELS)
def test_a_kernel_folder_is_what_the_client_pushes(built, profile, part):
    folder = built[1] / profile / part
    found = json.loads((folder / "kernel-metadata.json").read_text())
    assert found == kernel_metadata("somebody", profile, part)
    assert found["id"] == f"somebody/{found['title'].lower().replace(' ', '-')}"
    assert (folder / found["code_file"]).is_file() and found["enable_internet"] is False
    assert found["enable_gpu"] != found["enable_tpu"]
    assert all(len(model.split("/")) == 5 and model.split("/")[-1].isdigit() for model in found["model_sources"])
    notebook = nbformat.read(folder / found["code_file"], 4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    assert f'"{profile}"' in code_of(folder / found["code_file"])[0]


@pytest.mark.parametrize("profile", PLAN["profiles"])
def test_a_part_attaches_every_part_before_it(profile):
    parts = parts_of(PROFILES[profile])
    attached = [kernel_metadata("somebody", profile, part)["kernel_sources"] for part in parts]
    slugs = [f"somebody/{kernel_slug(profile, part)}" for part in parts]
    assert attached == [[], slugs[:1], slugs[:2]]


@pytest.mark.parametrize("profile", PLAN["profiles"])
def test_what_is_attached_is_what_the_profile_looks_for(profile, tmp_path, monkeypatch):
    """Every hint about a missing input names something that Part 1's kernel attaches."""
    from promptrec.profiles import get_profile

    monkeypatch.setenv("PROMPTREC_INPUT", str(tmp_path))
    found = kernel_metadata("somebody", profile, parts_of(PROFILES[profile])[0])
    sources = found["dataset_sources"] + found["competition_sources"] + found["model_sources"]
    words = {word for source in sources for word in source.split("/")}
    hints = [line for line in missing_inputs(get_profile(profile)) if "attach the Kaggle" in line]
    assert len(hints) == 7
    for hint in hints:
        assert words & {name.strip(",.;") for part in hint.split() for name in (part, *part.split("/"))}, hint


# --- standalone notebooks


def test_imports_are_followed_to_their_end():
    found = build_kaggle.needed_modules("def f():\n    from promptrec.rewriters.rules import RulesRewriter")
    assert {"promptrec", "promptrec.rewriters", "promptrec.rewriters.rule_words", "promptrec.grammar"} <= set(found)
    assert "promptrec.lora" not in found and build_kaggle.needed_modules("import numpy, promptrec_other") == []


def test_standalone_notebooks_stay_below_kaggles_limit(built):
    for profile, part in KERNELS:
        path = built[1] / "standalone" / profile / f"{part}.ipynb"
        assert path.stat().st_size < SOURCE_LIMIT
        assert sum("import" in cell for cell in code_of(path)) >= 3


def test_triples_are_left_out_longest_first_and_only_from_training():
    names = (build_kaggle.TRIPLES, build_kaggle.ORIGINALS)
    files = {name: (build_kaggle.ROOT / name).read_bytes() for name in names}
    fewer = build_kaggle.with_fewer_triples(files, 0.25)
    (whole, _), (part, originals) = (
        [pd.read_csv(io.BytesIO(some[name]), dtype=str) for name in names] for some in (files, fewer)
    )
    trained, kept = (table[table["split"] == "train"] for table in (whole, part))
    assert len(kept) == round(len(trained) / 4) and len(whole) - len(part) == len(trained) - len(kept)
    length = lambda table: table["original_text"].str.len() + table["rewritten_text"].str.len()  # noqa: E731
    assert length(kept).max() <= length(trained[~trained["id"].isin(kept["id"])]).min()
    assert set(originals["text"]) == set(part["original_text"])
    assert build_kaggle.with_fewer_triples({"a.py": b""}, 0.25) == {"a.py": b""}


def test_markdown_is_what_kaggle_shows():
    text = "See {doc}`2-fine-tune`.\n\n```{image} ../x.svg\n:alt: A row of boxes.\n:width: 100%\n```\n\n:::{tip}\nDo.\nNot.\n:::"
    assert plain_markdown(text) == "See *2-fine-tune*.\n\n*Figure: A row of boxes.*\n\n> **Tip.** Do.\n> Not."
