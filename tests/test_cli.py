"""The command line: what is wrong is one line and exit code 2, with nothing written; what is right works."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from easy_triples import easy

from promptrec.data import load_triples
from promptrec.decoding import DecodingSettings
from promptrec.embedding import EmbeddingRecoverer
from promptrec.predictor import PredictorSettings
from promptrec.prompt_bank import grammar_prompts
from promptrec.scoring import get_scorer
from promptrec.submission import FALLBACK
from promptrec.tables import read_jsonl, read_table, write_table

TRIPLES = pd.DataFrame(
    {
        "id": ["a", "b", "c"],
        "original_text": ["The ferry leaves at nine.", "The bakery is shut.", "The garden is wet."],
        "rewrite_prompt": ["Make it a sea shanty", "Make it a telegram", "Make it a weather forecast"],
        "rewritten_text": ["Oh, she sails at nine, boys!", "BAKERY SHUT STOP", "Showers in the garden tonight."],
    }
)


@pytest.fixture
def inputs(tmp_path):
    """Good and bad inputs in the folder that the command runs in."""
    write_table(TRIPLES, tmp_path / "in.csv")
    write_table(TRIPLES, tmp_path / "rows.csv")
    write_table(TRIPLES.assign(rewrite_prompt=grammar_prompts(3, seed=0)["rewrite_prompt"]), tmp_path / "grammar.csv")
    write_table(TRIPLES[["id", "rewrite_prompt"]], tmp_path / "truth.csv")
    write_table(TRIPLES.assign(rewritten_text=["x", " ", "y"]), tmp_path / "blank.csv")
    write_table(TRIPLES.assign(id="a"), tmp_path / "twice.csv")
    write_table(TRIPLES.assign(original_text="word " * 100_000), tmp_path / "long.csv")
    write_table(TRIPLES.assign(rewrite_prompt=["x", None, "y"]), tmp_path / "null.jsonl")
    write_table(TRIPLES.assign(id=["a", "b", "z"]), tmp_path / "other.csv")
    write_table(TRIPLES.head(2), tmp_path / "short.csv")
    write_table(TRIPLES.assign(split="train", prompt_cluster=[0, 1, 2]), tmp_path / "train-only.csv")
    write_table(TRIPLES.assign(split=["train", "test", "train"], prompt_cluster=0), tmp_path / "leaking.csv")
    write_table(TRIPLES.assign(split="training"), tmp_path / "spelt.csv")
    (tmp_path / "listed.jsonl").write_text('{"id": ["a"], "original_text": "x", "rewritten_text": "y"}\n')
    (tmp_path / "ragged.csv").write_text("original_text,rewritten_text\na text, and more,its rewrite\n")
    (tmp_path / "header.csv").write_text("id,original_text,rewrite_prompt,rewritten_text\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin.csv").write_bytes("id,original_text,rewritten_text\n1,caf\xe9,x\n".encode("latin-1"))
    (tmp_path / "torn.jsonl").write_text('{"id": "a", "orig')
    (tmp_path / "log.jsonl").write_text(
        '{"id": "a", "original_text": "0", "rewrite_prompt": "other", "rewritten_text": "x", "rewriter": "rules (stand-in)"}\n'
    )
    (tmp_path / "folder.csv").mkdir()
    return tmp_path


def files_in(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD = {
    # what stands on the command line
    "bogus": "No such command 'bogus'",
    "score in.csv": "Missing argument 'truth'",
    "score in.csv truth.csv --scorrer minilm": "No such option: --scorrer",
    "recover in.csv": "Missing option '--out'",
    "recover in.csv --out": "requires an argument",
    "recover in.csv --out p.csv --seed one": "Invalid value for '--seed'",
    "recover in.csv --out p.csv --seed -1": "Invalid value for '--seed'",
    "recover in.csv --out p.csv --profile laptop": "profile 'laptop' is unknown; choose one of",
    "recover in.csv --out p.csv --method magic": "method 'magic' is unknown; choose one of constant",
    "recover in.csv --out p.csv --seed 4294967296": "Invalid value for '--seed'",
    "recover in.csv --out in.csv --method constant": "--out in.csv: is a file that is read; name another",
    "recover in.csv --out other.csv --method best-constant --train other.csv": "is a file that is read",
    "recover in.csv --out p.csv --method best-constant --train spelt.csv": "no row has split 'train' (found: 'training')",
    "recover listed.jsonl --out p.csv --method constant": "row 1: id is a list",
    "score in.csv truth.csv --scorer t5-hf --scorer-model nobody/nothing": "no such folder, nor to be had from the hub",
    "recover in.csv --out p.xlsx": "name a file ending in .csv or .jsonl or .parquet",
    "rewrite in.csv --out p.csv": "name a file ending in .jsonl",
    "rewrite in.csv --out p.jsonl --shard 2/2": "write INDEX/COUNT",
    "rewrite in.csv --out p.jsonl --shard half": "write INDEX/COUNT",
    "score in.csv truth.csv --scorer bleu": "scorer 'bleu' is unknown",
    "score in.csv truth.csv --scorer t5-tf": "needs a model path",
    "score in.csv truth.csv --scorer t5-hf --scorer-model nowhere": "spiece.model is missing",
    "score in.csv truth.csv --scorer t5-tf --scorer-model /nowhere": "/nowhere: no such directory",
    "doctor --profile kaggle-t4x2": "7 input(s) missing",
    "series --part 4-celebrate": "part '4-celebrate' is unknown; choose one of 1-generate-data",
    "compare in.csv --out o --methods constant,magic": "method 'magic' is unknown; choose one of constant",
    "compare in.csv --out o --seeds 0": "Invalid value for '--seeds'",
    # what stands in the files
    "recover nowhere.csv --out p.csv --method constant": "nowhere.csv: no such file",
    "recover folder.csv --out p.csv --method constant": "folder.csv: is a folder",
    "recover ragged.csv --out p.csv --method constant": "ragged.csv: its rows have more cells than the header names",
    "recover empty.csv --out p.csv --method constant": "empty.csv: the file is empty",
    "recover header.csv --out p.csv --method constant": "header.csv: the table has no rows",
    "recover latin.csv --out p.csv --method constant": "latin.csv: not UTF-8",
    "recover torn.jsonl --out p.csv --method constant": "torn.jsonl: line 1 is not valid JSON",
    "recover truth.csv --out p.csv --method constant": "truth.csv: no column original_text, rewritten_text",
    "recover blank.csv --out p.csv --method constant": "blank.csv: row 2: rewritten_text is blank",
    "recover twice.csv --out p.csv --method constant": "twice.csv: id 'a' occurs twice",
    "recover long.csv --out p.csv --method constant": "long.csv: row 1: original_text has 100,000 words",
    "recover in.csv --out p.csv --method best-constant --train truth.csv": "truth.csv: no column original_text",
    "recover in.csv --out p.csv --method fine-tuned --adapter nowhere": "nowhere",
    "rewrite header.csv --out p.jsonl": "header.csv: the table has no rows",
    "rewrite null.jsonl --out p.jsonl": "row 2: rewrite_prompt is blank",
    "rewrite in.csv --out unknown.jsonl": "'Make it a sea shanty' is not a prompt of the grammar",
    "rewrite grammar.csv --out log.jsonl": "id 'a' was rewritten with another original_text",
    "score null.jsonl truth.csv": "predictions: id 'b' has a blank rewrite_prompt",
    "score twice.csv truth.csv": "predictions: row 2: id 'a' is missing or occurs twice",
    "score other.csv truth.csv": "predictions: id 'z' is not in the truth",
    "score short.csv truth.csv": "predictions: no row for id 'c'",
    "score in.csv null.jsonl": "truth: id 'b' has a blank",
    "finetune train-only.csv --out adapter": "3 training and 0 validation rows; both are needed",
    "finetune spelt.csv --out adapter": "split: 'training' is none of train, validation, test",
    "finetune leaking.csv --out adapter": "prompt_cluster '0' lies in 2 splits",
    "compare nowhere.csv --out o --methods constant": "nowhere.csv: no such file",
    "compare truth.csv --out o --methods constant": "truth.csv: no column original_text",
    "compare train-only.csv --out o --methods constant": "train-only.csv: no validation rows",
    # where the result should go
    "compare in.csv --out in.csv --methods constant": "--out in.csv: is a file; name a folder",
    "compare rows.csv --out . --methods constant": "--out rows.csv: is a file that is read",
    "recover in.csv --out folder.csv --method constant": "--out folder.csv: is a folder",
    "recover in.csv --out in.csv/p.csv --method constant": "choose another place",
    "rewrite grammar.csv --out in.csv/p.jsonl": "choose another place",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(cli, inputs, line, minilm):
    before = files_in(inputs)
    code, out, err = cli(*line.split())
    assert code == 2
    assert err.startswith("promptrec: ") and err.count("\n") == 1 and err.endswith("\n")
    assert BAD[line] in err and "Traceback" not in out + err
    assert files_in(inputs) == before


def test_bad_settings_of_the_environment_are_bad_input_too(cli, inputs, monkeypatch):
    monkeypatch.setenv("PROMPTREC_PROFILE", "mainframe")
    code, _, err = cli("doctor")
    assert (code, err.count("\n")) == (2, 1) and "profile 'mainframe' is unknown" in err


def test_a_full_disk_is_one_line_and_what_was_answered_is_kept(cli, inputs, monkeypatch):
    import errno

    before = files_in(inputs)

    def full(table, target, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        code, _, err = cli("recover", "in.csv", "--out", "p.csv", "--method", "constant")
    assert (code, err) == (2, "promptrec: output: No space left on device; choose another place or free space\n")
    assert files_in(inputs).keys() - before.keys() == {"p.csv.part-0.jsonl"}
    assert cli("recover", "in.csv", "--out", "p.csv", "--method", "constant")[0] == 0
    assert files_in(inputs).keys() - before.keys() == {"p.csv", "p.csv.manifest.json"}


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(cli, inputs, monkeypatch):
    monkeypatch.setattr("promptrec.methods.make_recoverer", lambda *arguments: pytest.fail("it began"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != inputs)
    code, _, err = cli("recover", "in.csv", "--out", "new/p.csv")
    assert code == 2 and f"--out new/p.csv: nothing can be written to {inputs}; choose another place" in err


def test_a_stopped_recovery_keeps_its_answers_and_other_files_do_not_go_on_with_them(cli, inputs, monkeypatch):
    write_table(TRIPLES.assign(rewrite_prompt="Make it rhyme"), inputs / "more.csv")
    line = ("recover", "in.csv", "--out", "p.csv", "--method", "best-constant", "--train", "more.csv")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("promptrec.tables.write_table", killed)
        assert cli(*line)[0] == 130
    assert read_jsonl(inputs / "p.csv.part-0.jsonl")[0]["id"] == "a"
    write_table(TRIPLES.assign(rewrite_prompt="Make it short"), inputs / "more.csv")  # another file by the same name
    code, _, err = cli(*line)
    assert code == 2 and "id 'a' was answered with another run; name a new --out file" in err
    write_table(TRIPLES.assign(rewrite_prompt="Make it rhyme"), inputs / "more.csv")
    with monkeypatch.context() as patch:
        patch.setattr("promptrec.inference.predict_all", lambda *arguments: pytest.fail("it asked again"))
        assert cli(*line)[0] == 0


def test_an_error_of_the_program_is_not_dressed_up_as_bad_input(cli, inputs, monkeypatch):
    def broken(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("promptrec.inference.predict_all", broken)
    with pytest.raises(OSError, match="Input/output error"):
        cli("recover", "in.csv", "--out", "p.csv", "--method", "constant")


def test_stopping_by_hand_says_that_work_is_kept(cli, inputs, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("promptrec.rewriting.rewrite_table", interrupted)
    code, _, err = cli("rewrite", "in.csv", "--out", "p.jsonl")
    assert code == 130
    assert err == (
        "promptrec: stopped; what rewrite, recover, finetune or compare had finished is kept: the same command goes on\n"
    )


# --- what works


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_recover_writes_predictions_and_a_manifest(cli, inputs, ending):
    source = write_table(TRIPLES.drop(columns="rewrite_prompt"), inputs / f"rows.{ending}")
    code, out, err = cli("recover", source, "--out", f"p.{ending}", "--method", "constant", "--seed", 3)
    assert (code, err) == (0, "") and out.startswith("3 prompts recovered by constant in p.")
    predictions = read_table(inputs / f"p.{ending}")
    assert predictions.to_dict("list") == {
        "id": ["a", "b", "c"],
        "rewrite_prompt": [FALLBACK] * 3,
        "method": ["constant"] * 3,
    }
    manifest = json.loads((inputs / f"p.{ending}.manifest.json").read_text())
    assert {key: manifest[key] for key in ("artefact", "profile", "seed", "rows", "config")} == {
        "artefact": f"p.{ending}", "profile": "local", "seed": 3, "rows": 3, "config": {"method": "constant"}
    }  # fmt: skip


def test_recover_tells_what_it_expects_where_the_method_knows(cli, inputs, minilm, monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "cache"))
    settings = PredictorSettings(folds=2, epochs=2, batch_size=16, hidden=16)
    fitted = EmbeddingRecoverer(minilm, settings=settings, decoding=DecodingSettings(evaluations=0)).fit(easy(24, 0))
    monkeypatch.setattr("promptrec.methods.make_recoverer", lambda *_: fitted)
    code, out, _ = cli("recover", "in.csv", "--out", "p.csv")
    expected = json.loads((inputs / "p.csv.manifest.json").read_text())["config"]["expected_scs"]
    answers = read_table(inputs / "p.csv")["rewrite_prompt"]
    assert expected == pytest.approx(fitted.expected_scs(TRIPLES, answers).mean(), abs=1e-6)
    assert code == 0 and f"p.csv, expected mean SCS {expected:.3f} under MiniLM (proxy) (" in out


def test_rows_without_ids_are_numbered(cli, inputs):
    write_table(TRIPLES.drop(columns="id"), inputs / "anonymous.csv")
    assert cli("recover", "anonymous.csv", "--out", "p.csv", "--method", "constant")[0] == 0
    assert read_table(inputs / "p.csv")["id"].tolist() == ["0", "1", "2"]


def test_a_finished_output_may_be_written_again(cli, inputs):
    for _ in range(2):
        assert cli("recover", "in.csv", "--out", "p.csv", "--method", "constant")[0] == 0
    assert sorted(path.name for path in inputs.glob("*p.csv*")) == ["p.csv", "p.csv.manifest.json"]


def test_perfect_predictions_score_one_and_the_scorer_is_named(cli, inputs, minilm):
    code, out, err = cli("score", "in.csv", "truth.csv")
    assert (code, err) == (0, "")
    assert out == "mean SCS 1.0000 [1.0000, 1.0000]  n=3  scorer: MiniLM (proxy)\n"


def test_score_as_json_is_the_mean_over_the_rows(cli, inputs, minilm):
    cli("recover", "in.csv", "--out", "p.csv", "--method", "constant")
    code, out, _ = cli("score", "p.csv", "truth.csv", "--json")
    result = json.loads(out)
    expected = minilm.scs([FALLBACK] * 3, TRIPLES["rewrite_prompt"].tolist()).mean()
    assert code == 0 and result["mean_scs"] == pytest.approx(expected, abs=1e-6)
    assert result["low"] <= result["mean_scs"] <= result["high"]
    assert (result["n"], result["scorer"]) == (3, get_scorer("minilm").name)


def test_scores_are_resampled_by_prompt_cluster_where_the_truth_has_one(cli, inputs, minilm):
    cli("recover", "in.csv", "--out", "p.csv", "--method", "constant")
    write_table(TRIPLES.assign(prompt_cluster=["x", "x", "x"]), inputs / "truth.csv")
    result = json.loads(cli("score", "p.csv", "truth.csv", "--json")[1])
    assert result["low"] == result["high"] == pytest.approx(result["mean_scs"])  # one cluster: nothing to resample


def test_rewrite_resumes_where_it_was_stopped(cli, inputs):
    assert cli("rewrite", "grammar.csv", "--out", "log.new.jsonl", "--shard", "0/2")[0] == 0
    assert [row["id"] for row in read_jsonl(inputs / "log.new.jsonl")] == ["a", "c"]
    code, out, err = cli("rewrite", "grammar.csv", "--out", "log.new.jsonl")
    assert (code, err) == (0, "") and out == "3 of 3 rows are rewritten in log.new.jsonl\n"
    rows = read_jsonl(inputs / "log.new.jsonl")
    assert [row["id"] for row in rows] == ["a", "c", "b"] and all(row["rewritten_text"].strip() for row in rows)


def test_rewrite_names_rows_by_their_texts_where_they_have_no_id(cli, inputs):
    write_table(read_table(inputs / "grammar.csv").drop(columns="id"), inputs / "anonymous.csv")
    for _ in range(2):
        assert cli("rewrite", "anonymous.csv", "--out", "p.jsonl")[0] == 0
    assert len({row["id"] for row in read_jsonl(inputs / "p.jsonl")}) == len(read_jsonl(inputs / "p.jsonl")) == 3


def test_a_setting_that_nothing_asked_for_is_named(cli, inputs, monkeypatch):
    line = ("recover", "in.csv", "--out", "p.csv", "--method", "constant")
    monkeypatch.setenv("PROMPTREC_SETTINGS", '{"Decoding.evaluations": 4}')
    assert cli(*line)[::2] == (0, "promptrec: PROMPTREC_SETTINGS: nothing here has a setting Decoding.evaluations\n")
    monkeypatch.setenv("PROMPTREC_SETTINGS", "{")
    for command in (line, ("doctor",)):
        code, _, err = cli(*command)
        assert code == 2 and "PROMPTREC_SETTINGS is not valid JSON" in err and err.count("\n") == 1


def test_a_log_of_rewrites_is_a_file_of_triples(cli, inputs):
    assert cli("rewrite", "grammar.csv", "--out", "log-of-three.jsonl")[0] == 0
    triples = load_triples(inputs / "log-of-three.jsonl")
    assert triples["original_text"].tolist() == TRIPLES["original_text"].tolist()


def test_doctor_names_what_comes_from_the_hub(cli):
    assert "fetched    google/gemma-7b-it, from the Hugging Face hub" in cli("doctor", "--profile", "gpu")[1]


def test_doctor_reports_what_is_here(cli):
    code, out, _ = cli("doctor")
    assert code == 0
    assert all(word in out for word in ("local", "CPU cores", "free disk", "versions", "missing    nothing"))


# --- help


def test_no_argument_and_help_show_every_command(cli):
    (code, out, err), (same_code, same_out, _) = cli(), cli("--help")
    assert (code, err, same_code) == (0, "", 0) and out == same_out
    for command in COMMANDS:
        assert f" {command} " in out


COMMANDS = ["doctor", "series", "rewrite", "finetune", "recover", "score", "compare", "mean-prompt"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli, command):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "") and f"promptrec {command}" in out and "--profile" in out


def test_help_imports_no_framework():
    code = "import sys, promptrec.cli; print([name for name in ('torch', 'tensorflow', 'jax', 'keras') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_installed_command_leaves_with_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "promptrec.cli", "score", "no.csv", "no.csv"],
        check=False, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PROMPTREC_PROFILE": "local"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("promptrec: no.csv: no such file") and done.stderr.count("\n") == 1
