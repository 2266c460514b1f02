"""The mock tree with one thing broken at a time: each fault is one clear line that says where and what to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from kaggle_tree import GEMMA_HF, GEMMA_KERAS, SENTENCE_T5, TEXTS

from promptrec.data import load_originals, profile_sources, shipped_triples
from promptrec.errors import InputError
from promptrec.language_model import generate, load_model, load_tokenizer
from promptrec.lora import encode_table
from promptrec.profiles import COMPETITION_TEST, CORPORA, get_profile
from promptrec.rewriting import get_rewriter
from promptrec.scoring import profile_scorer
from promptrec.series import execute_notebook
from promptrec.submission import read_test
from promptrec.tables import full_disk_named
from promptrec.templates import recovery_request

T4X2, TPU = "kaggle-t4x2", "kaggle-tpu"
MODEL = {
    T4X2: (GEMMA_HF, "google/gemma, Transformers"),
    TPU: (str(Path(GEMMA_KERAS).parent), "(now keras/gemma), Keras"),  # whatever its version
}
REMOVED = {
    SENTENCE_T5: ("google/sentence-t5", profile_scorer),
    CORPORA[0]: ("jrobischon/wikipedia-movie-plots", lambda profile: load_originals(profile_sources(profile))),
    CORPORA[1]: ("dhruvildave/wikibooks-dataset", lambda profile: load_originals(profile_sources(profile))),
    CORPORA[2]: ("nelgiriyewithana/emotions", lambda profile: load_originals(profile_sources(profile))),
    COMPETITION_TEST: ("competition llm-prompt-recovery", read_test),
}
CASES = [(name, path) for name, (model, _) in MODEL.items() for path in (model, *REMOVED)]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def refusal(function, *arguments) -> str:
    """The line with which `function` refuses its input."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


# --- one input removed at a time


def test_a_whole_tree_misses_nothing(attached_inputs, cli):
    for name in MODEL:
        code, out, err = cli("doctor", "--profile", name)
        assert (code, err) == (0, "") and "missing    nothing" in out


@pytest.mark.parametrize(("name", "path"), CASES)
def test_who_needs_a_missing_input_says_what_to_attach(attached_inputs, name, path):
    remove(attached_inputs / path)
    hint, needs = REMOVED.get(path, (MODEL[name][1], get_rewriter))
    line = refusal(needs, get_profile(name))
    assert str(attached_inputs / path) in line and "attach the Kaggle" in line and hint in line


@pytest.mark.parametrize(("name", "path"), CASES)
def test_doctor_and_series_name_a_missing_input_before_anything_starts(attached_inputs, cli, name, path):
    remove(attached_inputs / path)
    for command in ("doctor", "series"):
        code, _, err = cli(command, "--profile", name)
        assert (code, err.count("\n")) == (2, 1) and "missing; attach the Kaggle " in err
    assert not (attached_inputs.parent / "working").exists()


def test_no_competition_is_no_fault_off_kaggle(attached_inputs):
    assert len(read_test(get_profile("local"))) == len(TEXTS["test"])
    remove(attached_inputs / COMPETITION_TEST)
    assert read_test(get_profile("local")) is None


def test_parts_that_have_not_run_are_named(attached_inputs):
    from promptrec.profiles import find_result

    for profile in map(get_profile, MODEL):
        assert "run Part 1, or attach its output" in refusal(find_result, profile, "training_data.csv")
        assert "run Part 2, or attach its output" in refusal(find_result, profile, "adapter")


# --- models that are not whole


def test_truncated_weights(attached_inputs):
    weights = attached_inputs / GEMMA_HF / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 2**20])
    line = refusal(load_model, get_profile(T4X2).base_model)
    assert GEMMA_HF in line and "copy or attach it again" in line


LOAD_PRESET = """
import sys
from promptrec.errors import InputError
from promptrec.rewriters.keras_gemma import load_gemma
try:
    load_gemma(sys.argv[1], shard=False)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("damaged", ["model.weights.h5", "assets/tokenizer/vocabulary.spm"])
def test_a_damaged_keras_preset(attached_inputs, damaged):
    file = attached_inputs / GEMMA_KERAS / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LOAD_PRESET, str(attached_inputs / GEMMA_KERAS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    (line,) = done.stdout.splitlines()
    assert GEMMA_KERAS in line and "copy or attach it again" in line, done.stderr[-2000:]


def test_a_shard_that_is_not_there(attached_inputs):
    folder = attached_inputs / GEMMA_HF
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert GEMMA_HF in refusal(load_model, get_profile(T4X2).base_model)


def test_a_model_without_its_tokenizer(attached_inputs):
    for path in (attached_inputs / GEMMA_HF).glob("tokenizer*"):
        path.unlink()
    line = refusal(load_tokenizer, get_profile(T4X2).base_model)
    assert GEMMA_HF in line and "no tokenizer there (tokenizer.json and tokenizer.model are missing); attach" in line


def without_turns(folder: Path) -> Path:
    """Take the marks of the chat out of a tokenizer, as a base model's or a converted one may lack them."""
    tokenizer, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, settings = json.loads(tokenizer.read_text()), json.loads(config.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if "turn" not in token["content"]]
    for mark in ("<start_of_turn>", "<end_of_turn>"):
        content["model"]["vocab"][mark.replace("turn", "talk")] = content["model"]["vocab"].pop(mark)
    settings["extra_special_tokens"] = []
    tokenizer.write_text(json.dumps(content))
    config.write_text(json.dumps(settings))
    return folder


def test_a_tokenizer_without_the_marks_of_the_chat(attached_inputs):
    folder = without_turns(attached_inputs / GEMMA_HF)
    tokenizer = load_tokenizer(folder)
    request = recovery_request("The ferry leaves at nine.", "Off she goes at nine!")
    expected = "the tokenizer has no chat mark <end_of_turn>; attach the Kaggle model google/gemma, Transformers"
    asked = refusal(generate, load_model(folder, False), tokenizer, [request], None, "<end_of_turn>")
    assert expected in asked
    trained = refusal(encode_table, tokenizer, shipped_triples().head(2), "gemma", 256)
    assert expected in trained


def test_a_tokenizer_without_a_chat_template_is_enough(attached_inputs):
    tokenizer = load_tokenizer(attached_inputs / GEMMA_HF)
    assert tokenizer.chat_template is None  # the series brings its own turns: see templates.py
    rows = encode_table(tokenizer, shipped_triples().head(2), "gemma", 256)
    assert tokenizer.decode(rows[0]["input_ids"][:2]) == "<bos><start_of_turn>"


@pytest.mark.parametrize("process", ["0", "1"])
def test_a_saved_model_that_is_something_else(attached_inputs, monkeypatch, process):
    import tensorflow as tf

    class Numbers(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="x")])
        def __call__(self, x):
            return [tf.cast(x, tf.float32)[:, None]]

    monkeypatch.setenv("PROMPTREC_SCORER_PROCESS", process)
    shutil.rmtree(attached_inputs / SENTENCE_T5)
    tf.saved_model.save(Numbers(), str(attached_inputs / SENTENCE_T5))
    line = refusal(lambda: profile_scorer(get_profile(T4X2)).encode(["one", "two"]))
    assert SENTENCE_T5 in line and "cannot be called on strings" in line and "is this sentence-t5?" in line


def test_a_saved_model_without_its_variables(attached_inputs):
    shutil.rmtree(attached_inputs / SENTENCE_T5 / "variables")
    assert "not a TensorFlow SavedModel" in refusal(profile_scorer, get_profile(T4X2))


def test_corpora_of_another_shape(attached_inputs):
    profile = get_profile(T4X2)
    plots = attached_inputs / CORPORA[0]
    good = plots.read_text()
    plots.write_text(good.replace("Plot", "Summary", 1))
    assert "no column Plot; it has Release Year" in refusal(load_originals, profile_sources(profile))
    plots.write_text(good)
    (attached_inputs / CORPORA[1]).write_bytes(b"this is no database" * 100)
    assert "not a SQLite database" in refusal(load_originals, profile_sources(profile))


# --- the competition's file


def rewrite_test(root: Path, **columns) -> None:
    pd.DataFrame(TEXTS["test"]).assign(**columns).to_csv(root / COMPETITION_TEST, index=False)


def test_repeated_and_missing_ids_are_named_by_their_row(attached_inputs):
    rewrite_test(attached_inputs, id=[1, 2, 2, 3])
    assert f"{COMPETITION_TEST}: row 3: id '2' is missing or occurs twice" in refusal(read_test, get_profile(T4X2))
    rewrite_test(attached_inputs, id=["a", "", "b", "c"])
    assert f"{COMPETITION_TEST}: row 2: id" in refusal(read_test, get_profile(T4X2))


def test_blank_texts_are_kept_for_the_fallback(attached_inputs):
    rewrite_test(attached_inputs, original_text=["", None, "  ", "A text."], rewritten_text="")
    assert len(read_test(get_profile(T4X2))) == 4


def test_a_test_file_without_rows_or_columns(attached_inputs):
    path = attached_inputs / COMPETITION_TEST
    path.write_text("id,original_text,rewritten_text\n")
    assert "the table has no rows" in refusal(read_test, get_profile(T4X2))
    path.write_text("id,original_text\n1,A text.\n")
    assert "no column rewritten_text; it has id, original_text" in refusal(read_test, get_profile(T4X2))


# --- a full disk

SMALL_DISK = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from promptrec.cli import main
main()
"""


def test_a_disk_that_fills_up_in_training(tmp_path):
    triples = shipped_triples(["train", "validation"]).groupby("split").head(40)
    triples.drop(columns=["kind", "taxonomy", "lead_in"]).to_csv(tmp_path / "t.csv", index=False)
    small = {"steps": 1, "evaluate_every": 1, "validation_rows": 2, "rank": 4, "max_tokens": 128}
    settings = json.dumps({f"LoraSettings.{name}": value for name, value in small.items()})
    command = [sys.executable, "-c", SMALL_DISK, "40000", "finetune", "t.csv", "--out", "adapter"]
    environment = os.environ | {"PROMPTREC_PROFILE": "local", "PROMPTREC_SETTINGS": settings}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "promptrec: adapter: no space left on the disk; free some and start again" in done.stderr.splitlines()[-1]


def test_a_full_disk_in_whatever_words(tmp_path):
    def fail(error: Exception) -> None:
        with full_disk_named(tmp_path / "x"):
            raise error

    said = [
        OSError(28, "No space left on device"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 500096 vs 499984"),  # torch.save
    ]
    for error in said:
        assert refusal(fail, error).startswith(f"{tmp_path / 'x'}: no space left on the disk")
    for error in (OSError(5, "Input/output error"), RuntimeError("shapes differ")):
        with pytest.raises(type(error), match=str(error).split("] ")[-1]):
            fail(error)


# --- what a notebook says

PART = """
# %%
from promptrec.language_model import load_model
from promptrec.profiles import activate, get_profile

load_model(activate(get_profile()).base_model)
"""
KILLED = """
# %%
import os, signal

os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_fault_within_a_notebook_is_its_last_line(attached_inputs, tmp_path):
    weights = attached_inputs / GEMMA_HF / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 2**20])
    (tmp_path / "part.py").write_text(PART)
    arguments = (tmp_path / "part.py", tmp_path / "part.ipynb", get_profile(T4X2), tmp_path / "working")
    line = refusal(execute_notebook, *arguments)
    assert line.startswith(f"part.py: InputError: {attached_inputs / GEMMA_HF}: ") and "attach it again" in line
    assert not (tmp_path / "working").exists()


def test_a_kernel_that_is_killed_is_one_line(attached_inputs, tmp_path):
    (tmp_path / "part.py").write_text(KILLED)
    arguments = (tmp_path / "part.py", tmp_path / "part.ipynb", get_profile(T4X2), tmp_path / "working")
    assert "part.py: its kernel died" in refusal(execute_notebook, *arguments)
