"""Originals, triples, other people's sets: loading, slicing, pairing, merging.

A triple is a row with original_text, rewrite_prompt and rewritten_text. Cleaning is in cleaning.py, splits in
splits.py, the rewriting itself in rewriting.py.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.errors import InputError
from promptrec.profiles import ASSETS, CORPORA, Profile, attach_hint, attached
from promptrec.tables import read_table, require_columns

TEXT_COLUMNS = ("original_text", "rewrite_prompt", "rewritten_text")
TRAINING_COLUMNS = ("id", *TEXT_COLUMNS, "source", "prompt_cluster", "split")
ALIASES = {
    "original_text": ("original", "original text", "source_text", "input_text", "text", "seed_text", "orig"),
    "rewrite_prompt": ("prompt", "rewrite prompt", "instruction", "recovered_prompt", "target"),
    "rewritten_text": (
        "rewritten",
        "rewritten text",
        "rewrite",
        "output",
        "response",
        "gemma_text",
        "modified_text",
        "rewritten_output",
    ),
}
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)]*(?=\s|\Z)")
LONGEST_TEXT = 50_000  # characters; a longer cell is a mistake in the file, not a text


@dataclass(frozen=True)
class Source:
    """Where original texts come from: a CSV, JSONL or Parquet file, or a table of a SQLite database."""

    path: str
    text_column: str
    kind: str = ""  # kind of text; empty: the file's own `kind` column, else "text"
    table: str = ""  # SQLite only
    rows: int = 0  # 0: all


# A few minutes of training on a CPU teach a tiny model to tell these apart; with an empty tuple all styles are used.
EASY_STYLES = (
    "pirate",
    "shakespearean",
    "telegram",
    "bullets",
    "headline",
    "legal",
    "baby_talk",
    "yoda",
    "sea_shanty",
    "faq",
    "recipe",
    "tweet",
    "questions",
    "weather_forecast",
    "robot",
    "fairy_tale",
    "letter",
    "all_caps",
)


@dataclass(frozen=True)
class DataSettings:
    """Part 1's settings; the defaults suit the local profile, `GEMMA` a 7B rewriter."""

    rows: int = 5000  # triples to make
    prompts: int = 3500  # grammar prompts to draw
    styles: tuple = EASY_STYLES  # styles of the grammar to draw from; (): all
    mixture_share: float = 0.0  # share of prompts that ask for two styles at once
    slice_words: int = 30  # longest original, in words
    written: int = 1500  # hand-written triples that join the training and validation sides; 0: all
    shortest_original: int = 50  # characters
    batch_size: int = 500  # rows between two writes to disk
    time_budget: float = 0.0  # seconds of rewriting; 0: none
    seed: int = 0


GEMMA = DataSettings(
    rows=5000,
    prompts=2500,
    styles=(),
    mixture_share=0.15,
    slice_words=256,
    written=0,
    batch_size=64,
    time_budget=7.5 * 3600,
)


def profile_sources(profile: Profile) -> list[Source]:
    """Where the profile's originals lie: the shipped texts, or the attached corpora of the ancestor's Part 1."""
    if not profile.name.startswith("kaggle"):
        return [Source(str(ASSETS / "originals.csv"), "text")]
    plots, books, tweets = (str(attached(profile.input_root, path)) for path in CORPORA)
    return [
        Source(plots, "Plot", "film plot", rows=1500),
        Source(books, "abstract", "encyclopedia entry", table="en", rows=1500),
        Source(tweets, "text", "tweet", rows=2000),
    ]


def load_originals(sources: Iterable[Source], seed: int = 0) -> pd.DataFrame:
    """Originals of all sources: id, kind, text, source. A source with more than `rows` texts is sampled.

    Raises InputError naming the file for a missing file, table or column.
    """
    tables = [_load_source(source, seed) for source in sources]
    if not tables:
        raise InputError("no sources of original texts were given")
    return pd.concat(tables, ignore_index=True)


def _load_source(source: Source, seed: int) -> pd.DataFrame:
    path = Path(source.path)
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        table = _read_sqlite(path, source.table, source.text_column)
    else:
        table = read_table(path, required=[source.text_column])
    texts = table[source.text_column].dropna().astype(str).str.strip()
    texts = texts[texts != ""].drop_duplicates()
    if source.rows and len(texts) > source.rows:
        texts = texts.sample(source.rows, random_state=seed)
    own_kind = (
        table["kind"].reindex(texts.index).tolist() if "kind" in table and not source.kind else source.kind or "text"
    )
    ids = [text_id(text) for text in texts]
    return pd.DataFrame({"id": ids, "kind": own_kind, "text": texts.tolist(), "source": path.name})


def _read_sqlite(path: Path, table: str, column: str) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {attach_hint(path, 'check the path')}")
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            if table not in tables:
                raise InputError(f"{path}: no table {table!r}; it has {', '.join(tables) or 'none'}")
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            if column not in columns:
                raise InputError(f"{path}: table {table} has no column {column!r}; it has {', '.join(columns)}")
            wanted = ", ".join(f'"{name}"' for name in columns if name in (column, "kind"))
            return pd.read_sql_query(f'SELECT {wanted} FROM "{table}"', connection)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: not a SQLite database ({error})") from None


def text_id(*texts: str) -> str:
    """A short stable id made from the texts themselves, so that a restarted run names its rows alike."""
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:12]


def shipped_originals() -> pd.DataFrame:
    """The project's own original texts: id, kind, text, split."""
    return read_table(ASSETS / "originals.csv", required=["id", "kind", "text", "split"])


def shipped_triples(splits: Sequence[str] = ("train", "validation", "test")) -> pd.DataFrame:
    """The project's own hand-written triples with their fixed split by prompt cluster."""
    table = read_table(ASSETS / "triples.csv", required=[*TEXT_COLUMNS, "prompt_cluster", "split"])
    return table[table["split"].isin(splits)].assign(source="promptrec").reset_index(drop=True)


def slice_words(text: str, words: int = 256) -> str:
    """The first `words` words, cut back to the last full sentence when that keeps at least half of them."""
    ends = [word.end() for word in itertools.islice(re.finditer(r"\S+", text), words + 1)]
    if len(ends) <= words:
        return text
    cut = text[: ends[words - 1]]
    end = max((sentence.end() for sentence in SENTENCE_END.finditer(cut)), default=0)
    return cut[:end] if end >= len(cut) // 2 else cut


def slice_texts(table: pd.DataFrame, words: int) -> pd.DataFrame:
    """The table with both texts of each row cut to their first `words` words."""
    pair = ("original_text", "rewritten_text")
    return table.assign(**{name: [slice_words(text, words) for text in table[name]] for name in pair})


def keep_original(text: str, shortest: int = 50) -> bool:
    """Whether a text can serve as an original: long enough (characters), ASCII, no wiki headings ("==")."""
    return len(text) >= shortest and text.isascii() and "==" not in text


def pair(originals: pd.DataFrame, prompts: pd.DataFrame, rows: int, seed: int = 0) -> pd.DataFrame:
    """`rows` distinct (original, prompt) pairs within each split, every prompt suiting its original's kind.

    originals: text, kind, split; prompts: rewrite_prompt, kinds ("any" or names joined by "|"), split. Returns id,
    original_text, rewrite_prompt, kind, split. Every prompt is used once before any is used twice. Splits share the
    rows in proportion to their prompts.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for split, ours in prompts.groupby("split", sort=True):
        texts = originals[originals["split"] == split]
        if len(texts):
            parts.append(_pair_split(texts, ours, round(rows * len(ours) / len(prompts)), rng).assign(split=split))
    if not parts:
        raise InputError("no split has both originals and prompts; load more of either")
    table = pd.concat(parts, ignore_index=True)
    table.insert(
        0, "id", [text_id(*pair) for pair in zip(table["original_text"], table["rewrite_prompt"], strict=True)]
    )
    return table


def _pair_split(originals: pd.DataFrame, prompts: pd.DataFrame, rows: int, rng: np.random.Generator) -> pd.DataFrame:
    by_kind = {kind: group["text"].tolist() for kind, group in originals.groupby("kind")}
    everything = originals[["text", "kind"]].to_numpy().tolist()
    found, seen, before = [], set(), -1
    while before < len(found) < rows:
        before = len(found)  # a pass that adds nothing is the last one: every pair is used
        for position in rng.permutation(len(prompts)):
            prompt, kinds = prompts["rewrite_prompt"].iloc[position], prompts["kinds"].iloc[position].split("|")
            suitable = (
                everything if "any" in kinds else [[text, kind] for kind in kinds for text in by_kind.get(kind, [])]
            )
            if not suitable:
                continue
            text, kind = suitable[rng.integers(len(suitable))]
            if (text, prompt) in seen:
                suitable = [option for option in suitable if (option[0], prompt) not in seen]
                if not suitable:
                    continue
                text, kind = suitable[rng.integers(len(suitable))]
            seen.add((text, prompt))
            found.append({"original_text": text, "rewrite_prompt": prompt, "kind": kind})
            if len(found) == rows:
                break
    return pd.DataFrame(found, columns=["original_text", "rewrite_prompt", "kind"])


def canonical_columns(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Rename other people's column names to ours (case and spaces do not matter); raises InputError when one is missing."""
    lowered = {str(column).strip().lower(): column for column in table.columns}
    renames = {}
    for ours, aliases in ALIASES.items():
        found = next((lowered[name] for name in (ours, *aliases) if name in lowered), None)
        if found is not None:
            renames[found] = ours
    renamed = table.rename(columns=renames)
    require_columns(renamed, TEXT_COLUMNS, where)
    return renamed


def load_triples(path: str | Path, source: str | None = None, keep: Sequence[str] = ()) -> pd.DataFrame:
    """Someone's triples from CSV, JSONL or Parquet: id, the three texts, source (the file's own, else its name).

    Columns of `keep` that the file has stay, too.

    Raises InputError naming the row for a blank cell or a text that cannot be one (over 50,000 characters).
    """
    table = canonical_columns(read_table(path), str(path)).reset_index(drop=True)
    check_cells(table.drop(columns="id", errors="ignore"), TEXT_COLUMNS, str(path))
    if "id" not in table or table["id"].isna().any():
        table["id"] = [text_id(*row) for row in table[list(TEXT_COLUMNS)].to_numpy()]
    else:
        check_cells(table, (), str(path))
    if "source" not in table or source is not None:
        table["source"] = source or Path(path).stem
    return table[["id", *TEXT_COLUMNS, "source", *(name for name in keep if name in table)]].astype({"id": str})


def check_cells(table: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Raise InputError naming the first row and column with a blank, null or impossibly long text, or a repeated id."""
    for column in columns:
        for row, value in enumerate(table[column], 1):
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"{where}: row {row}: {column} is blank or not text ({value!r}); fill or remove the row"
                )
            if len(value) > LONGEST_TEXT:
                raise InputError(
                    f"{where}: row {row}: {column} has {len(value.split()):,} words; the limit is "
                    f"{LONGEST_TEXT:,} characters: split the text"
                )
    if "id" in table and table["id"].isna().any():
        row = int(table["id"].isna().to_numpy().argmax()) + 1
        raise InputError(f"{where}: row {row}: id is blank; give every row one, or leave the column out")
    if "id" in table and table["id"].duplicated().any():
        raise InputError(
            f"{where}: id {table.loc[table['id'].duplicated(), 'id'].iloc[0]!r} occurs twice; ids must be distinct"
        )


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt file, one a line (blank lines do not count), or of a table's column rewrite_prompt.

    A prompt that is there twice comes twice. Raises InputError naming the file, and the row of a blank cell.
    """
    path = Path(path)
    if path.suffix != ".txt" or not path.is_file():
        table = read_table(path, required=["rewrite_prompt"])
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8 and try again") from None
        table = pd.DataFrame({"rewrite_prompt": [line for line in lines if line.strip()]})
    if table.empty:
        raise InputError(f"{path}: holds no prompts; write one a line")
    check_cells(table[["rewrite_prompt"]], ["rewrite_prompt"], str(path))
    return table["rewrite_prompt"].str.strip().tolist()


def merge_triples(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Sets one below the other, provenance (`source`) kept; of equal (original, prompt, rewrite) the first one stays."""
    merged = pd.concat([table for table in tables if len(table)], ignore_index=True)
    merged = merged.drop_duplicates(list(TEXT_COLUMNS), ignore_index=True)
    if "id" in merged:  # every set counts from 0: a later row with a taken id is named by its texts
        named = [text_id(*row) for row in merged[list(TEXT_COLUMNS)].to_numpy()]
        merged["id"] = merged["id"].where(~merged["id"].duplicated(), named)
    return merged
