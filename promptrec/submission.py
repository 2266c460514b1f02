"""The file Kaggle takes, checked before it is written.

Header `id,rewrite_prompt`; one blank or null prediction makes a whole submission an error.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from promptrec.errors import InputError
from promptrec.profiles import COMPETITION_TEST, Profile, attached
from promptrec.scoring import check_ids, check_texts
from promptrec.tables import read_table, require_columns, write_table

TEST_COLUMNS = ["id", "original_text", "rewritten_text"]
FALLBACK = "Improve the text to this."  # a constant that scored .60 on the leaderboard
READ_AS_NULL = {"NA", "N/A", "n/a", "NaN", "nan", "-nan", "null", "NULL", "None", "<NA>", "#N/A"}  # by plain pandas


def read_test(profile: Profile) -> pd.DataFrame | None:
    """The competition's test rows: id, original_text, rewritten_text. None off Kaggle where none are attached.

    Raises InputError for a missing file, missing columns, a missing or repeated id. Blank texts stay: their rows cannot
    be asked about and get the fallback.
    """
    path = attached(profile.input_root, COMPETITION_TEST)
    if not path.is_file() and not profile.name.startswith("kaggle"):
        return None
    table = read_table(path, required=TEST_COLUMNS)[TEST_COLUMNS]
    check_ids(table, str(path))
    return table


def write_submission(predictions: pd.DataFrame, path: str | Path, ids: pd.Series | None = None) -> Path:
    """Write `id,rewrite_prompt` atomically. With `ids` (the test set's) the rows must be exactly those, in that order.

    Raises InputError naming the row for anything Kaggle would refuse; nothing is written then.
    """
    require_columns(predictions, ["id", "rewrite_prompt"], "predictions")
    table = predictions[["id", "rewrite_prompt"]].reset_index(drop=True)
    if table.empty:
        raise InputError("predictions: there are no rows to submit")
    check_texts(table, "rewrite_prompt", "predictions")
    if ids is not None:
        table = _in_order(table, pd.Series(ids).astype(str))
    return write_table(table, path)


def _in_order(table: pd.DataFrame, ids: pd.Series) -> pd.DataFrame:
    table = table.assign(id=table["id"].astype(str)).set_index("id")
    for known, needed, message in (
        (ids, table.index, "id {!r} is not in the test set"),
        (table.index, ids, "no prediction for id {!r}"),
    ):
        odd = sorted(set(needed) - set(known))
        if odd:
            raise InputError(f"predictions: {message.format(odd[0])} ({len(odd)} such rows)")
    return table.loc[ids].reset_index()


def fill_blanks(predictions: pd.DataFrame, fallback: str = FALLBACK) -> pd.DataFrame:
    """Replace blank or null answers by a constant that scores something: a model may return nothing, a file may not.

    An answer such as "None" counts as null: plain pandas reads it as one.
    """
    good = predictions["rewrite_prompt"].map(
        lambda text: isinstance(text, str) and bool(text.strip()) and text.strip() not in READ_AS_NULL
    )
    return predictions.assign(rewrite_prompt=predictions["rewrite_prompt"].where(good, fallback))
