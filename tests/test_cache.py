"""What is kept on disk: by content, in little room, the last used of it."""

import os

import numpy as np
import pytest

from promptrec.cache import digest, keep_last_used, packed, read_arrays, save_arrays, unpacked


def test_packed_texts_take_no_more_room_than_they_have_letters():
    texts = ["été", "x" * 40_000, *map(str, range(1000))]
    assert unpacked(packed(texts)) == texts and packed(texts).nbytes < 60_000


@pytest.mark.parametrize("most, left", [(1, ["2.npz"]), (2, ["0.npz", "2.npz"]), (9, ["0.npz", "1.npz", "2.npz"])])
def test_only_the_last_fits_are_kept(tmp_path, most, left):
    for name, written in (("0.npz", 20), ("1.npz", 10), ("2.npz", 30)):
        save_arrays(tmp_path / name, a=np.ones(1))
        os.utime(tmp_path / name, (written, written))
    (tmp_path / "note.txt").write_text("not a fit")
    keep_last_used(tmp_path, most)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "note.txt"]
    keep_last_used(tmp_path / "none", most)


def test_a_fit_that_is_read_is_kept_before_one_that_is_newer(tmp_path):
    for name, written in (("0.npz", 10), ("1.npz", 20)):
        save_arrays(tmp_path / name, a=np.ones(1))
        os.utime(tmp_path / name, (written, written))
    assert read_arrays(tmp_path / "0.npz")["a"] == 1
    keep_last_used(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


def test_digests_tell_where_one_part_ends():
    assert digest("a", "bc") != digest("ab", "c") and digest("1") == digest(1) != digest("2")
