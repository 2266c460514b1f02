"""Which parts a profile runs, and that running the series runs them in order and each in its own kernel."""

from dataclasses import replace

import pytest

from promptrec.errors import InputError
from promptrec.profiles import PROFILES, get_profile
from promptrec.series import PARTS, notebooks_folder, parts_of, run_series

PART = """
# %%
import os
from pathlib import Path

out = Path(os.environ["PROMPTREC_OUT"])
Path(out / "order.txt").open("a").write("{part} {{}}\\n".format("seen" in globals()))
seen = True
"""


def test_part_2_is_a_notebook_of_its_own_in_keras():
    assert parts_of(PROFILES["kaggle-tpu"]) == ("1-generate-data", "2-fine-tune-tpu", "3-evaluate")
    assert all(parts_of(PROFILES[name]) == PARTS for name in ("local", "gpu", "kaggle-t4x2"))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_part_has_its_source(profile):
    assert all((notebooks_folder() / f"{part}.py").is_file() for part in parts_of(profile))


@pytest.fixture
def small_parts(tmp_path, monkeypatch):
    for part in {*PARTS, "2-fine-tune-tpu"}:
        (tmp_path / f"{part}.py").write_text(PART.format(part=part))
    monkeypatch.setenv("PROMPTREC_NOTEBOOKS", str(tmp_path))
    return tmp_path


def test_the_series_runs_the_profiles_parts_in_order(small_parts):
    profile = replace(get_profile("local"), rewriter="keras", out=str(small_parts / "out"))
    (small_parts / "out").mkdir()
    assert tuple(run_series(profile)) == parts_of(profile)
    lines = (small_parts / "out" / "order.txt").read_text().splitlines()
    assert lines == [f"{part} False" for part in parts_of(profile)]
    assert {path.stem for path in (small_parts / "out" / "notebooks").iterdir()} == set(parts_of(profile))


def test_a_missing_input_is_named_before_the_first_part(small_parts):
    profile = replace(get_profile("local"), base_model=str(small_parts / "nowhere"), out=str(small_parts / "out"))
    with pytest.raises(InputError, match=r"base model: .*nowhere is missing"):
        run_series(profile)
    assert not (small_parts / "out").exists()
