"""Rewriting: resumable at any moment, shared by shards, refused where a log belongs to other rows.

The rewriters here are real ones, only small: they reverse, shout or hash.
"""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field

import pandas as pd
import pytest

from promptrec import rewriting
from promptrec.errors import InputError
from promptrec.profiles import get_profile
from promptrec.rewriters import Rewriter
from promptrec.rewriting import get_rewriter, rewrite_table
from promptrec.tables import append_jsonl, read_jsonl, write_table


@dataclass
class Shouter:
    """Upper case, plus the prompt in brackets; remembers the batches it was given."""

    name: str = "shouter"
    batches: list = field(default_factory=list)
    fails_at: int = -1

    def rewrite(self, originals, prompts):
        if len(self.batches) == self.fails_at:
            raise RuntimeError("the accelerator fell over")
        self.batches.append(list(originals))
        return [f"{text.upper()} [{prompt}] é🎉" for text, prompt in zip(originals, prompts, strict=True)]


def make_table(rows: int) -> pd.DataFrame:
    texts = [f"{'word ' * (number % 7)}text number {number}" for number in range(rows)]
    return pd.DataFrame({"id": [f"r{n}" for n in range(rows)], "original_text": texts, "rewrite_prompt": "Shout, será"})


def log_ids(log) -> list[str]:
    return [row["id"] for row in read_jsonl(log)]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "deep" / "log.jsonl"


def test_every_row_is_rewritten_once_and_comes_back_in_order(log):
    table, shouter = make_table(50), Shouter()
    done = rewrite_table(table.assign(extra=1), shouter, log, batch_size=8)
    assert isinstance(shouter, Rewriter)
    assert done["id"].tolist() == table["id"].tolist() and set(done["extra"]) == {1}
    assert done["rewritten_text"].iloc[3] == f"{table['original_text'].iloc[3].upper()} [Shout, será] é🎉"
    assert set(done["source"]) == {"shouter"}
    assert sorted(log_ids(log)) == sorted(table["id"])


def test_batches_begin_with_the_longest_text(log):
    shouter = Shouter()
    rewrite_table(make_table(50), shouter, log, batch_size=8)
    lengths = [len(text) for batch in shouter.batches for text in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in shouter.batches] == [8] * 6 + [2]


def test_a_table_with_a_repeated_index_is_not_rewritten_twice(log):
    table = pd.concat([make_table(3), make_table(6).iloc[3:].set_axis([0, 1, 2])])
    assert len(rewrite_table(table, Shouter(), log)) == 6
    assert sorted(log_ids(log)) == sorted(table["id"])


def test_a_failing_rewriter_keeps_the_finished_batches_and_the_next_call_goes_on(log):
    table = make_table(40)
    with pytest.raises(RuntimeError):
        rewrite_table(table, Shouter(fails_at=3), log, batch_size=8)
    assert len(log_ids(log)) == 24
    second = Shouter()
    done = rewrite_table(table, second, log, batch_size=8)
    assert [len(batch) for batch in second.batches] == [8, 8]
    assert len(done) == 40 and sorted(log_ids(log)) == sorted(table["id"])


def test_a_finished_log_needs_no_rewriter(log):
    table = make_table(10)
    first, idle = rewrite_table(table, Shouter(), log), Shouter()
    again = rewrite_table(table, idle, log)
    assert idle.batches == []
    pd.testing.assert_frame_equal(first, again)


def test_a_log_of_another_seed_is_refused_and_one_of_before_seeds_goes_on(log):
    table, drawn = make_table(4), Shouter()
    drawn.seed = 1
    rewrite_table(table, drawn, log)
    drawn.seed = 2
    with pytest.raises(InputError, match="was rewritten with another seed"):
        rewrite_table(table, drawn, log)
    rows = [{key: value for key, value in row.items() if key != "seed"} for row in read_jsonl(log)]
    log.unlink()
    append_jsonl(log, rows)
    assert len(rewrite_table(table, drawn, log)) == 4


def test_a_prompt_that_cannot_be_carried_out_is_named_before_anything_is_done(log):
    table = make_table(40).assign(rewrite_prompt="Pirate version, please")
    table.loc[0, ["original_text", "rewrite_prompt"]] = "short", "Draw me a sheep"  # its turn would come last
    with pytest.raises(InputError, match="'Draw me a sheep' is not a prompt of the grammar"):
        rewrite_table(table, get_rewriter(get_profile("local")), log, batch_size=8)
    assert not log.exists()


def test_a_time_limit_ends_early_and_the_next_call_does_the_rest(log):
    table = make_table(20)
    assert rewrite_table(table, Shouter(), log, batch_size=5, stop_after=-1).empty
    assert len(rewrite_table(table, Shouter(), log, batch_size=5, stop_after=600)) == 20


def test_rows_added_to_the_table_are_done_by_the_next_call(log):
    rewrite_table(make_table(10), Shouter(), log)
    more = Shouter()
    assert len(rewrite_table(make_table(12), more, log)) == 12
    assert len(more.batches) == 1 and len(more.batches[0]) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_cover_every_row_once(tmp_path, count):
    table = make_table(23)
    for index in range(count):
        rewrite_table(table, Shouter(), tmp_path / f"{index}.jsonl", shard=(index, count))
    ids = [row for index in range(count) for row in log_ids(tmp_path / f"{index}.jsonl")]
    assert len(ids) == 23 and set(ids) == set(table["id"])


def test_shards_may_share_one_log(log):
    table = make_table(23)
    parts = [rewrite_table(table, Shouter(), log, shard=(index, 3)) for index in range(3)]
    assert sorted(log_ids(log)) == sorted(table["id"])
    assert [len(part) for part in parts] == [8, 16, 23]


# --- faults


def test_a_log_of_other_prompts_is_refused_and_left_alone(log):
    table = make_table(4)
    rewrite_table(table, Shouter(), log)
    before = log.read_bytes()
    with pytest.raises(InputError, match=r"id 'r\d' was rewritten with another rewrite_prompt; name a new --out file"):
        rewrite_table(table.assign(rewrite_prompt="Whisper"), Shouter(), log)
    assert log.read_bytes() == before


@pytest.mark.parametrize("row", [{"id": "r0"}, {"id": "r0", "rewrite_prompt": "Shout, será"}, {"text": "x"}])
def test_a_file_that_is_no_rewriting_log_is_refused(log, row):
    append_jsonl(log, [row])
    with pytest.raises(InputError, match="line 1 is not a row of a rewriting log"):
        rewrite_table(make_table(4), Shouter(), log)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"original_text": ["a", " ", "c"]}, "row 2: original_text is blank"),
        ({"rewrite_prompt": ["a", "b", None]}, "row 3: rewrite_prompt is blank"),
        ({"id": ["a", "b", "a"]}, "id 'a' occurs twice"),
        ({"id": ["a", None, "c"]}, "row 2: id is blank"),
        ({"original_text": ["word " * 100_000, "b", "c"]}, "row 1: original_text has 100,000 words"),
    ],
)
def test_bad_cells_are_refused_before_anything_is_written(log, changes, reason):
    with pytest.raises(InputError, match=reason):
        rewrite_table(make_table(3).assign(**changes), Shouter(), log)
    assert not log.exists()


def test_missing_columns_are_refused(log):
    with pytest.raises(InputError, match="rewriting: no column rewrite_prompt"):
        rewrite_table(make_table(3).drop(columns="rewrite_prompt"), Shouter(), log)


def test_a_rewriter_that_loses_a_row_is_an_error_not_a_shift(log):
    class Careless(Shouter):
        def rewrite(self, originals, prompts):
            return super().rewrite(originals, prompts)[1:]

    with pytest.raises(ValueError):
        rewrite_table(make_table(5), Careless(), log)
    assert not log.exists()


def test_a_disk_that_fills_up_loses_no_finished_row(log, monkeypatch):
    table = make_table(30)

    def full_after_two(path, rows, state=[0]):  # noqa: B006
        state[0] += 1
        if state[0] <= 2:
            return append_jsonl(path, rows)
        with open(path, "ab") as file:  # the disk took half a line, within a character
            file.write((json.dumps(next(iter(rows)), ensure_ascii=False).encode())[:-5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rewriting, "append_jsonl", full_after_two)
    with pytest.raises(InputError, match="no space left on the disk; free some and start again"):
        rewrite_table(table, Shouter(), log, batch_size=8)
    monkeypatch.undo()
    assert len(rewrite_table(table, Shouter(), log, batch_size=8)) == 30
    assert sorted(log_ids(log)) == sorted(table["id"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_disk_is_one_clear_error():
    with pytest.raises(InputError, match="/dev/full: no space left on the disk"):
        rewrite_table(make_table(3), Shouter(), "/dev/full")


def test_other_disk_errors_are_not_taken_for_a_full_disk(log, monkeypatch):
    def broken(path, rows):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(rewriting, "append_jsonl", broken)
    with pytest.raises(OSError, match="Input/output error"):
        rewrite_table(make_table(3), Shouter(), log)


def test_the_log_may_be_cut_at_any_byte_and_the_result_is_the_same(log):
    table = make_table(6)
    expected = rewrite_table(table, Shouter(), log, batch_size=2)
    whole = log.read_bytes()
    for cut in range(0, len(whole) + 1, 5):
        log.write_bytes(whole[:cut])
        pd.testing.assert_frame_equal(rewrite_table(table, Shouter(), log, batch_size=2), expected)
        assert sorted(log_ids(log)) == sorted(table["id"]), cut


# --- killed at any moment ("Done when": killed at ten random moments, the final set is the uninterrupted one)


def hashed(text: str, prompt: str) -> str:
    """A rewrite that takes its time (about a millisecond) and depends on text and prompt alone."""
    return f"é🎉 {hashlib.pbkdf2_hmac('sha256', text.encode(), prompt.encode(), 3000).hex()}"


WORKER = """
import hashlib, sys
from promptrec.rewriting import rewrite_table
from promptrec.tables import read_table

class Hasher:
    name = "hasher"
    def rewrite(self, originals, prompts):
        return [f"é🎉 {hashlib.pbkdf2_hmac('sha256', text.encode(), prompt.encode(), 3000).hex()}"
                for text, prompt in zip(originals, prompts, strict=True)]

table = read_table(sys.argv[1])
print("ready", flush=True)
print(len(rewrite_table(table, Hasher(), sys.argv[2], batch_size=4)), flush=True)
"""


def test_killed_at_random_moments_it_ends_with_the_uninterrupted_set(tmp_path):
    table, log = make_table(1500), tmp_path / "log.jsonl"
    command = [sys.executable, "-c", WORKER, write_table(table, tmp_path / "in.csv"), log]
    moments, sizes = random.Random(0), [0]
    while len(sizes) <= 10 or len(set(sizes)) <= 5:  # ten kills; more where little gets done between them
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert worker.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=moments.uniform(0.005, 0.1))
        worker.send_signal(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
        worker.stdout.close()
        ids = [row["id"] for row in read_jsonl(log, tolerate_torn_tail=True)] if log.exists() else []
        assert len(ids) == len(set(ids)) >= sizes[-1]  # nothing doubled, nothing of an earlier run lost
        sizes.append(len(ids))
        assert len(sizes) < 60
    assert sizes[-1] < len(table)  # the kills hit while work was going on
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert finished.stdout.split() == ["ready", "1500"]
    rows = read_jsonl(log)
    assert len(rows) == len(table)
    expected = {row.id: hashed(row.original_text, row.rewrite_prompt) for row in table.itertuples()}
    assert {row["id"]: row["rewritten_text"] for row in rows} == expected


# --- which rewriter


def test_a_missing_model_is_refused_with_what_to_attach(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_INPUT", str(tmp_path))
    for name in ("kaggle-t4x2", "kaggle-tpu"):
        with pytest.raises(InputError, match=r"config\.json is missing.*attach the Kaggle model google/gemma"):
            get_rewriter(get_profile(name))
