"""The submission: exactly what Kaggle takes, or nothing at all."""

import csv

import pandas as pd
import pytest

from promptrec.errors import InputError
from promptrec.submission import FALLBACK, fill_blanks, write_submission

PREDICTIONS = pd.DataFrame(
    {"id": ["b", "a", "c"], "rewrite_prompt": ["Make it a shanty", 'Say "so, so"', "Two\nlines"], "method": "x"}
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "submission.csv"


def rows_of(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_the_file_holds_the_header_and_the_two_columns(path):
    write_submission(PREDICTIONS, path)
    assert path.read_bytes().startswith(b"id,rewrite_prompt\n")
    assert rows_of(path)[1:] == PREDICTIONS[["id", "rewrite_prompt"]].to_numpy().tolist()


def test_rows_take_the_order_of_the_test_set(path):
    write_submission(PREDICTIONS, path, ids=pd.Series(["a", "b", "c"], name="row"))
    assert [row[0] for row in rows_of(path)] == ["id", "a", "b", "c"]
    assert rows_of(path)[1] == ["a", 'Say "so, so"']


def test_integer_ids_match_text_ids(path):
    write_submission(PREDICTIONS.assign(id=[2, 1, 3]), path, ids=pd.Series(["1", "2", "3"]))
    assert [row[0] for row in rows_of(path)[1:]] == ["1", "2", "3"]


FAULTS = {
    "blank": (lambda t: t.assign(rewrite_prompt=["x", " ", "y"]), "id 'a' has a blank rewrite_prompt"),
    "null": (lambda t: t.assign(rewrite_prompt=["x", "y", None]), "id 'c' has a blank rewrite_prompt"),
    "nan": (lambda t: t.assign(rewrite_prompt=["x", float("nan"), "y"]), "id 'a' has a blank rewrite_prompt"),
    "number": (lambda t: t.astype(object).assign(rewrite_prompt=["x", 3, "y"]), "id 'a' has a blank"),
    "duplicate": (lambda t: t.assign(id=["a", "b", "a"]), "row 3: id 'a' is missing or occurs twice"),
    "no id": (lambda t: t.assign(id=["a", None, "b"]), "row 2: id .* is missing or occurs twice"),
    "unknown": (lambda t: t.assign(id=["a", "b", "z"]), "id 'z' is not in the test set"),
    "missing": (lambda t: t.head(2), r"no prediction for id 'c' \(1 such rows\)"),
    "column": (lambda t: t.drop(columns="rewrite_prompt"), "no column rewrite_prompt"),
    "empty": (lambda t: t.head(0), "no rows to submit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_kaggle_would_refuse_is_refused_and_nothing_is_written(path, fault):
    change, reason = FAULTS[fault]
    with pytest.raises(InputError, match=reason):
        write_submission(change(PREDICTIONS), path, ids=pd.Series(["a", "b", "c"]))
    assert list(path.parent.iterdir()) == []


def test_a_refused_submission_leaves_the_earlier_one(path):
    write_submission(PREDICTIONS, path)
    before = path.read_bytes()
    with pytest.raises(InputError):
        write_submission(PREDICTIONS.assign(rewrite_prompt=""), path)
    assert path.read_bytes() == before


def test_blanks_are_filled_and_the_rest_is_kept(path):
    filled = fill_blanks(PREDICTIONS.assign(rewrite_prompt=["x", None, "  "]))
    assert filled["rewrite_prompt"].tolist() == ["x", FALLBACK, FALLBACK]
    assert fill_blanks(PREDICTIONS)["rewrite_prompt"].tolist() == PREDICTIONS["rewrite_prompt"].tolist()
    write_submission(filled, path)


def test_an_answer_that_pandas_reads_as_null_is_replaced():
    table = pd.DataFrame(
        {"id": ["a", "b", "c"], "rewrite_prompt": ["None", "NA", "Rewrite it as a null pointer joke."]}
    )
    assert fill_blanks(table)["rewrite_prompt"].tolist() == [FALLBACK, FALLBACK, "Rewrite it as a null pointer joke."]
