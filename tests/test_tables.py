"""Tables: every format and every way a file can be wrong, writes that are whole or absent, logs with torn tails."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from promptrec import tables
from promptrec.errors import InputError
from promptrec.tables import (
    append_jsonl,
    read_jsonl,
    read_table,
    require_columns,
    versions,
    write_json,
    write_manifest,
    write_table,
)

ROWS = pd.DataFrame(
    {
        "id": ["007", "8", "x"],
        "rewrite_prompt": ["Rewrite as a shanty", 'Say "null", in\ntwo lines', "Café, naïve, 日本語 🎉"],
        "note": ["NA", "null", "None"],  # words that pandas likes to turn into missing values
    }
)
FORMATS = [".csv", ".jsonl", ".parquet"]


@pytest.mark.parametrize("ending", FORMATS)
def test_what_is_written_is_read_back(tmp_path, ending):
    path = write_table(ROWS, tmp_path / f"table{ending}")
    assert read_table(path).to_dict("list") == ROWS.to_dict("list")


def test_integer_ids_become_strings(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    assert read_table(path)["id"].tolist() == ["1", "2"]
    assert read_table(write_table(pd.DataFrame({"id": [1, 2]}), tmp_path / "t.parquet"))["id"].tolist() == ["1", "2"]


def test_a_lone_carriage_return_stays_in_its_cell(tmp_path):
    rows = pd.DataFrame({"id": ["1", "2"], "text": ["a\rb", "c"]})
    assert read_table(write_table(rows, tmp_path / "t.csv")).to_dict("list") == rows.to_dict("list")


def test_leading_zeros_of_an_id_survive_csv(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\n0012,a\n")
    assert read_table(tmp_path / "t.csv")["id"].tolist() == ["0012"]


def test_blank_csv_cells_are_missing_but_words_like_null_stay(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\n1,\n2,nan\n3,null\n,x\n")
    table = read_table(tmp_path / "t.csv")
    assert table["text"].isna().tolist() == [True, False, False, False]
    assert pd.isna(table["id"].iloc[3])


def test_byte_order_mark_does_not_end_up_in_a_column_name(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffid,text\n1,a\n".encode())
    assert read_table(tmp_path / "t.csv", required=["id"])["text"].tolist() == ["a"]


BROKEN = {
    "latin1.csv": ("id,text\n1,caf\xe9\n".encode("latin-1"), "not UTF-8"),
    "utf16.csv": ("id,text\n1,a\n".encode("utf-16"), "not UTF-8"),
    "latin1.jsonl": ('{"id": "caf\xe9"}\n'.encode("latin-1"), "line 1 is not UTF-8"),
    "empty.csv": (b"", "the file is empty"),
    "empty.jsonl": (b"", "no rows"),
    "blank.jsonl": (b"\n\n \n", "no rows"),
    "empty.parquet": (b"", "cannot be read as parquet"),
    "header.csv": (b"id,text\n", "no rows"),
    "ragged.csv": (b"id,text\n1,a\n2,b,c,d\n", "cannot be read as csv"),
    "quote.csv": (b'id,text\n1,"a\n', "cannot be read as csv"),
    "torn.jsonl": (b'{"id": 1}\n{"id": 2, "te', "line 2 is not valid JSON"),
    "list.jsonl": (b'{"id": 1}\n[1, 2]\n', "line 2 is not a JSON object"),
    "text.parquet": (b"id,text\n1,a\n", "cannot be read as parquet"),
    "sheet.xlsx": (b"PK", "unknown format '.xlsx'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_table(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        read_table(tmp_path)


def test_missing_columns_are_named_together_with_those_present(tmp_path):
    path = write_table(ROWS, tmp_path / "t.csv")
    with pytest.raises(InputError, match="no column original_text, split; it has id, rewrite_prompt, note"):
        read_table(path, required=["id", "original_text", "split"])
    with pytest.raises(InputError, match="it has none"):
        require_columns(pd.DataFrame(), ["id"], "here")


def test_an_empty_table_is_allowed_where_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\n")
    assert list(read_table(tmp_path / "t.csv", allow_empty=True).columns) == ["id", "text"]


def test_a_cell_of_a_hundred_thousand_words_comes_through_whole(tmp_path):
    long = pd.DataFrame({"id": ["1"], "text": [" ".join(["word"] * 100_000)]})
    for ending in FORMATS:
        assert read_table(write_table(long, tmp_path / f"long{ending}"))["text"].iloc[0] == long["text"].iloc[0]


# --- atomic writes


def leftovers(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, ending, fault):
    path = write_table(ROWS, tmp_path / f"t{ending}")
    before = path.read_bytes()

    def half(table, target, **options):
        with open(target, "wb") as file:
            file.write(before[: len(before) // 2])
        raise fault

    for writer in ("to_csv", "to_json", "to_parquet"):
        monkeypatch.setattr(pd.DataFrame, writer, half)
    with pytest.raises(type(fault)):
        write_table(ROWS.head(1), path)
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == [path.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def on_the_full_device(dir, prefix, suffix):
        link = tmp_path / f"{prefix}full{suffix}"
        link.symlink_to("/dev/full")
        return os.open("/dev/full", os.O_WRONLY), str(link)

    monkeypatch.setattr(tables.tempfile, "mkstemp", on_the_full_device)
    for write in (lambda: write_table(ROWS, tmp_path / "t.csv"), lambda: write_json({"a": 1}, tmp_path / "t.json")):
        with pytest.raises(OSError) as caught:
            write()
        assert caught.value.errno == errno.ENOSPC
        assert leftovers(tmp_path) == []


def test_write_json_replaces_the_file_as_a_whole(tmp_path):
    path = write_json({"a": [1, 2]}, tmp_path / "deep" / "x.json")
    circular: dict = {}
    circular["self"] = circular
    with pytest.raises(ValueError):
        write_json(circular, path)
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert leftovers(path.parent) == ["x.json"]


def test_an_unknown_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="unknown format"):
        write_table(ROWS, tmp_path / "t.xlsx")
    assert leftovers(tmp_path) == []


# --- logs


@pytest.mark.parametrize("tail", ['{"id": 3, "text": "half', '{"id": 3, "text": "whole, no newline"}', "{"])
def test_a_torn_tail_is_left_out_and_cut_off_by_the_next_append(tmp_path, tail):
    log = tmp_path / "log.jsonl"
    append_jsonl(log, [{"id": 1}, {"id": 2}])
    with open(log, "a") as file:
        file.write(tail)
    assert read_jsonl(log, tolerate_torn_tail=True) == [{"id": 1}, {"id": 2}]
    append_jsonl(log, [{"id": 4}])
    assert read_jsonl(log) == [{"id": 1}, {"id": 2}, {"id": 4}]


def test_a_tail_torn_within_a_character_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    append_jsonl(log, [{"id": 1, "text": "é"}, {"id": 2, "text": "🎉🎉"}])
    whole = log.read_bytes()
    for cut in range(len(whole)):
        log.write_bytes(whole[:cut])
        assert len(read_jsonl(log, tolerate_torn_tail=True)) == whole[:cut].count(b"\n")


def test_a_tail_longer_than_one_block_is_cut_off(tmp_path):
    log = tmp_path / "log.jsonl"
    append_jsonl(log, [{"id": 1}])
    with open(log, "a") as file:
        file.write('{"text": "' + "x" * 200_000)
    append_jsonl(log, [{"id": 2}])
    assert read_jsonl(log) == [{"id": 1}, {"id": 2}]


def test_a_file_of_nothing_but_a_torn_line_starts_over(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"id": 1')
    append_jsonl(log, [{"id": 2}])
    assert read_jsonl(log) == [{"id": 2}]


def test_damage_in_the_middle_is_never_tolerated(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"id": 1}\n{"id": \n{"id": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        read_jsonl(log, tolerate_torn_tail=True)


APPENDER = """
import sys
from promptrec.tables import append_jsonl
for number in range(150):
    append_jsonl(sys.argv[1], [{"id": f"{sys.argv[2]}-{number}-{part}", "text": "é" * 3000} for part in range(2)])
"""


def test_processes_that_share_a_log_lose_no_row(tmp_path):
    log = tmp_path / "log.jsonl"
    workers = [subprocess.Popen([sys.executable, "-c", APPENDER, log, name]) for name in ("a", "b", "c")]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0, 0]
    ids = [row["id"] for row in read_jsonl(log)]
    assert len(ids) == len(set(ids)) == 900


# --- manifests


@dataclass(frozen=True)
class Settings:
    rows: int = 5
    fractions: tuple = (0.8, 0.2)


def test_a_manifest_says_how_the_artefact_came_to_be(tmp_path):
    artefact = write_table(ROWS, tmp_path / "out.csv")
    path = write_manifest(
        artefact, started=time.time() - 2, profile="local", seed=7, rows=3, settings=Settings(), method="constant"
    )
    manifest = json.loads(path.read_text())
    assert path.name == "out.csv.manifest.json"
    assert {key: manifest[key] for key in ("artefact", "profile", "seed", "rows")} == {
        "artefact": "out.csv", "profile": "local", "seed": 7, "rows": 3
    }  # fmt: skip
    assert 2 <= manifest["seconds"] < 60
    assert manifest["config"] == {"settings": {"rows": 5, "fractions": [0.8, 0.2]}, "method": "constant"}
    assert manifest["versions"]["numpy"] == np.__version__


def test_a_manifest_holds_no_secret_of_the_environment(tmp_path, monkeypatch):
    for name in ("KAGGLE_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t-value")
    text = write_manifest(tmp_path / "x.csv", started=time.time(), profile="local", seed=0, rows=0).read_text()
    assert "s3cr3t-value" not in text
    assert not any(name in text for name in ("KAGGLE_KEY", "HF_TOKEN"))


def test_a_manifest_outside_a_git_checkout_has_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert tables._git_revision() is None


def test_versions_do_not_import_the_frameworks():
    code = "import sys; from promptrec.tables import versions; versions(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
    assert "python" in versions()
