"""What fine-tuning does alike in torch and in Keras: check the triples, fit a text, claim the run's folder.

Knows no framework: a tokenizer comes in as a function, settings as a dataclass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import pandas as pd

from promptrec.data import TEXT_COLUMNS, check_cells, text_id
from promptrec.errors import InputError
from promptrec.profiles import model_name
from promptrec.tables import claim, read_table, require_columns
from promptrec.templates import recovery_answer, recovery_request

COLUMNS = list(TEXT_COLUMNS)


class Tokenise(Protocol):
    """Token ids of a text; with the beginning-of-sequence token unless it goes on from another (`begin` = False)."""

    def __call__(self, text: str, begin: bool = True) -> list[int]: ...


def check_training(table: pd.DataFrame) -> None:
    """Raise InputError for missing columns, blank cells or repeated ids."""
    require_columns(table, COLUMNS, "training data")
    check_cells(table.reset_index(drop=True), COLUMNS, "training data")


def fit_texts(row: pd.Series, chat: str, tokenise: Tokenise, max_tokens: int) -> tuple[list[int], list[int]]:
    """(request ids, answer ids) of one triple, together at most `max_tokens`.

    Texts that are too long lose words at their ends; the answer none. Raises InputError where it leaves them no room.
    """
    answer = tokenise(recovery_answer(row["rewrite_prompt"], chat), begin=False)
    original, rewritten = row["original_text"], row["rewritten_text"]
    request = tokenise(recovery_request(original, rewritten, chat))
    while len(request) + len(answer) > max_tokens:
        share = (max_tokens - len(answer)) / len(request) * 0.95
        if share <= 0.05:
            raise InputError(
                f"max_tokens={max_tokens} leaves no room for the texts beside an answer of {len(answer)} tokens"
            )
        original, rewritten = (shorten(text, share) for text in (original, rewritten))
        request = tokenise(recovery_request(original, rewritten, chat))
    return request, answer


def shorten(text: str, share: float) -> str:
    """The first `share` of a text's words, at least one."""
    words = text.split(" ")
    return " ".join(words[: max(1, int(len(words) * share))])


def claim_folder(
    out: Path,
    settings: object,
    train: pd.DataFrame,
    base_model: str | Path,
    adapter_file: str,
    passing: Sequence[str] = ("time_budget", "report_to"),
) -> bool:
    """Mark `out` as belonging to this run (run.json); True when the run is finished there already.

    `passing` settings may differ between calls. Raises InputError when the folder belongs to another run: mixing two
    would resume one with the other's settings.
    """
    lasting = {key: value for key, value in asdict(settings).items() if key not in passing}
    digest = text_id(*train[COLUMNS].to_numpy().ravel())
    run = {"settings": lasting, "data": digest, "base_model": model_name(base_model)}
    claim(out / "run.json", run, "a run with")
    if not (out / "history.csv").is_file() or not (out / adapter_file).is_file():
        return False
    return int(read_table(out / "history.csv")["step"].max()) >= settings.steps
