"""Profiles: which one is chosen and why, overrides that are type-checked, settings from the environment."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from promptrec import profiles
from promptrec.errors import InputError
from promptrec.profiles import (
    COMPETITION_TEST,
    CORPORA,
    PROFILES,
    activate,
    attached,
    describe,
    detect,
    find_result,
    get_profile,
    missing_inputs,
    model_name,
    override,
)


@dataclass(frozen=True)
class ToySettings:
    rows: int = 100
    rate: float = 0.5
    name: str = "toy"
    shuffle: bool = True
    layers: tuple = ("q", "v")
    limit: object = None


@pytest.fixture
def machine(monkeypatch):
    """function(*paths): only these device paths and folders exist."""
    for name in ("TPU_WORKER_ID",):
        monkeypatch.delenv(name, raising=False)

    def has(*paths):
        monkeypatch.setattr(profiles.os.path, "isdir", lambda path: path in paths)
        monkeypatch.setattr(profiles.os.path, "exists", lambda path: path in paths)

    return has


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ((), "local"),
        (("/dev/nvidia0",), "gpu"),
        (("/kaggle/working",), "kaggle-t4x2"),
        (("/kaggle/working", "/dev/nvidia0"), "kaggle-t4x2"),
        (("/kaggle/working", "/dev/accel0"), "kaggle-tpu"),
        (("/kaggle/working", "/dev/vfio/0"), "kaggle-tpu"),
        (("/dev/accel0",), "local"),
    ],
)
def test_the_machine_decides_where_nothing_is_said(machine, paths, expected):
    machine(*paths)
    assert detect() == expected
    assert get_profile().name == expected


def test_a_tpu_worker_is_seen_through_its_variable(machine, monkeypatch):
    machine("/kaggle/working")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert detect() == "kaggle-tpu"


def test_an_argument_beats_the_variable_and_the_variable_beats_detection(machine, monkeypatch):
    machine("/dev/nvidia0")
    monkeypatch.setenv("PROMPTREC_PROFILE", "kaggle-tpu")
    assert get_profile().name == "kaggle-tpu"
    assert get_profile("local").name == "local"


@pytest.mark.parametrize("name", ["kaggle", "Local", "gpu "])
def test_an_unknown_profile_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match="choose one of local, gpu, kaggle-t4x2, kaggle-tpu"):
        get_profile(name)


def test_input_root_and_output_folder_can_be_moved(monkeypatch):
    monkeypatch.setenv("PROMPTREC_INPUT", "/mock")
    monkeypatch.setenv("PROMPTREC_OUT", "/elsewhere")
    profile = get_profile("kaggle-t4x2")
    assert profile.scorer_model == "/mock/sentence-t5/tensorflow2/st5-base/1"
    assert profile.base_model.startswith("/mock/gemma/transformers")
    assert (profile.input_root, profile.out) == ("/mock", "/elsewhere")


@pytest.mark.parametrize("name", PROFILES)
def test_no_placeholder_is_left_in_a_filled_profile(name):
    assert "{root}" not in str(dataclasses.asdict(get_profile(name)))


def test_a_profile_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_profile("local").scorer = "t5-tf"


@pytest.mark.parametrize(("name", "hints"), [("kaggle-t4x2", 7), ("kaggle-tpu", 7), ("gpu", 0)])
def test_missing_inputs_say_what_to_attach(monkeypatch, tmp_path, name, hints):
    monkeypatch.setenv("PROMPTREC_INPUT", str(tmp_path))
    lines = missing_inputs(get_profile(name))
    assert len(lines) == hints
    assert all(" is missing; attach the Kaggle " in line for line in lines)


def test_attached_inputs_are_not_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_INPUT", str(tmp_path))
    profile = get_profile("kaggle-t4x2")
    os.makedirs(profile.base_model)
    os.makedirs(profile.scorer_model)
    for path in (*CORPORA, COMPETITION_TEST):
        os.makedirs(tmp_path / path)
    assert missing_inputs(profile) == []


@pytest.mark.parametrize("mount", ["", "datasets/somebody", "models/google", "competitions", "notebooks/somebody"])
def test_inputs_are_found_wherever_kaggle_mounts_them(tmp_path, mount):
    (tmp_path / mount / "emotions").mkdir(parents=True)
    assert attached(tmp_path, "emotions") == tmp_path / mount / "emotions"
    assert attached(tmp_path, "emotions/text.csv") == tmp_path / "emotions" / "text.csv"


def test_the_newest_version_is_taken_where_the_path_leaves_it_open(monkeypatch, tmp_path):
    for version in ("2", "10", "draft"):
        (tmp_path / "models/keras/gemma/keras/gemma_instruct_7b_en" / version).mkdir(parents=True)
    monkeypatch.setenv("PROMPTREC_INPUT", str(tmp_path))
    assert get_profile("kaggle-tpu").base_model.endswith("gemma/keras/gemma_instruct_7b_en/10")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/kaggle/input/gemma/transformers/7b-it/3", "7b-it"),
        ("/kaggle/input/gemma/keras/gemma_instruct_7b_en/2/", "gemma_instruct_7b_en"),
        ("google/gemma-7b-it", "gemma-7b-it"),
        ("tiny-gemma", "tiny-gemma"),
        ("3", "3"),
    ],
)
def test_a_model_is_named_after_itself_and_not_after_its_version(path, name):
    assert model_name(path) == name


def test_a_result_is_taken_from_the_output_first_and_the_inputs_second(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_INPUT", str(tmp_path / "input"))
    monkeypatch.setenv("PROMPTREC_OUT", str(tmp_path / "out"))
    profile = get_profile("kaggle-t4x2")
    with pytest.raises(InputError, match=r"training_data.csv is neither in .*; run Part 1, or attach its output"):
        find_result(profile, "training_data.csv")
    for folder in ("input/part-1", "out"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "training_data.csv").touch()
        assert find_result(profile, "training_data.csv") == tmp_path / folder / "training_data.csv"


ACTIVATE = """
import os, sys
from promptrec.profiles import activate, get_profile
activate(get_profile("kaggle-tpu"))
print(os.environ["KERAS_BACKEND"], os.environ["HF_HUB_OFFLINE"], "keras" in sys.modules, "torch" in sys.modules)
"""


def test_activate_sets_the_backend_and_imports_no_framework(tmp_path):
    clean = {key: value for key, value in os.environ.items() if key not in ("KERAS_BACKEND", "HF_HUB_OFFLINE")}
    environment = clean | {"PROMPTREC_OUT": str(tmp_path / "out")}
    printed = subprocess.check_output([sys.executable, "-c", ACTIVATE], env=environment, text=True)
    assert printed.split() == ["jax", "1", "False", "False"]
    assert not (tmp_path / "out").exists()  # nothing is written before there is something to write


def test_activate_respects_what_the_user_has_set(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("PROMPTREC_OUT", str(tmp_path))
    activate(get_profile("local"))
    assert os.environ["KERAS_BACKEND"] == "torch"


# --- settings


def test_overrides_give_a_changed_copy():
    settings = ToySettings()
    assert override(settings, rows=7, rate=0.25, layers=("k",)) == ToySettings(rows=7, rate=0.25, layers=("k",))
    assert settings == ToySettings()


def test_integers_become_floats_and_lists_become_tuples_where_the_setting_is_one():
    changed = override(ToySettings(), rate=1, layers=["k", "o"])
    assert (changed.rate, type(changed.rate), changed.layers) == (1.0, float, ("k", "o"))


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("rows", "7", "int"),
        ("rows", 7.0, "int"),
        ("rows", True, "int"),
        ("rows", None, "int"),
        ("rate", "0.5", "float"),
        ("rate", True, "float"),
        ("name", 5, "str"),
        ("shuffle", 1, "bool"),
        ("layers", "qv", "tuple"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value, kind):
    with pytest.raises(InputError, match=rf"ToySettings\.{key} must be {kind}, not"):
        override(ToySettings(), **{key: value})


def test_a_setting_without_a_default_type_takes_anything():
    assert override(ToySettings(), limit="all").limit == "all"


def test_unknown_settings_are_named_with_the_known_ones():
    with pytest.raises(InputError, match=r"no setting lr, row; it has layers, limit, name, rate, rows, shuffle"):
        override(ToySettings(), row=7, lr=1)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"rows": 3}', 3),
        ('{"ToySettings.rows": 4}', 4),
        ('{"rows": 3, "ToySettings.rows": 4}', 4),
        ('{"OtherSettings.rows": 9}', 50),
        ('{"of_no_class": 1}', 50),
        ("{}", 50),
    ],
)
def test_environment_settings_are_applied_last(monkeypatch, text, rows):
    monkeypatch.setenv("PROMPTREC_SETTINGS", text)
    assert override(ToySettings(), rows=50).rows == rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rows=3", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("3", "must be a JSON object"),
        ('{"rows": "3"}', "ToySettings.rows must be int"),
        ('{"ToySettings.row": 3}', "ToySettings has no setting row"),
    ],
)
def test_bad_environment_settings_are_refused(monkeypatch, text, reason):
    monkeypatch.setenv("PROMPTREC_SETTINGS", text)
    with pytest.raises(InputError, match=reason):
        override(ToySettings())


def test_describe_echoes_every_setting_on_its_line():
    lines = describe(ToySettings()).splitlines()
    assert [line.split()[0] for line in lines] == ["rows", "rate", "name", "shuffle", "layers", "limit"]
    assert lines[0].endswith("100")
