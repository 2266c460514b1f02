"""The file Kaggle takes, checked before it is written.

Header `id,rewrite_prompt`; one blank or null prediction makes a whole submission an error.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from promptrec.errors import InputError
from promptrec.scoring import check_texts
from promptrec.tables import require_columns, write_table

FALLBACK = "Improve the text to this."  # a constant that scored .60 on the leaderboard
READ_AS_NULL = {"NA", "N/A", "n/a", "NaN", "nan", "-nan", "null", "NULL", "None", "<NA>", "#N/A"}  # by plain pandas


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
