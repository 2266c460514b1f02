"""Originals, pairs and triples: every source, every fault in it, and what pairing promises."""

import sqlite3
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from promptrec.data import (
    LONGEST_TEXT,
    Source,
    canonical_columns,
    check_cells,
    keep_original,
    load_originals,
    load_triples,
    merge_triples,
    pair,
    shipped_originals,
    shipped_triples,
    slice_words,
    text_id,
)
from promptrec.errors import InputError
from promptrec.tables import write_table

TEXTS = [f"The ferry number {number} leaves the quay at nine." for number in range(20)]
TRIPLES = pd.DataFrame(
    {
        "id": ["a", "b"],
        "original_text": ["The ferry leaves at nine.", "The bakery is shut."],
        "rewrite_prompt": ["Make it a shanty", "Make it a telegram"],
        "rewritten_text": ["Oh, she sails at nine, boys!", "BAKERY SHUT STOP"],
    }
)


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "books #1?.sqlite"  # signs that mean something in a URI
    with sqlite3.connect(path) as connection:
        pd.DataFrame({"title": TEXTS, "abstract": TEXTS}).to_sql("en", connection, index=False)
    connection.close()
    return path


# --- sources


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_originals_come_from_any_table(tmp_path, ending):
    path = write_table(pd.DataFrame({"plot": TEXTS}), tmp_path / f"plots{ending}")
    table = load_originals([Source(str(path), "plot", kind="film plot")])
    assert table["text"].tolist() == TEXTS
    assert set(table["kind"]) == {"film plot"} and set(table["source"]) == {path.name}
    assert table["id"].tolist() == [text_id(text) for text in TEXTS]


def test_originals_come_from_sqlite(database):
    table = load_originals([Source(str(database), "abstract", table="en")])
    assert table["text"].tolist() == TEXTS


def test_a_source_keeps_its_own_kinds(tmp_path):
    path = write_table(pd.DataFrame({"text": TEXTS[:3], "kind": ["email", "tweet", "email"]}), tmp_path / "t.csv")
    assert load_originals([Source(str(path), "text")])["kind"].tolist() == ["email", "tweet", "email"]
    assert set(load_originals([Source(str(path), "text", kind="note")])["kind"]) == {"note"}


def test_blank_missing_and_repeated_originals_are_left_out(tmp_path):
    (tmp_path / "t.csv").write_text("n,text\n1,one\n2,\n3,  \n4,one\n5, one \n6,two\n")
    assert load_originals([Source(str(tmp_path / "t.csv"), "text")])["text"].tolist() == ["one", "two"]


def test_a_large_source_is_sampled_the_same_way_for_the_same_seed(tmp_path):
    source = Source(str(write_table(pd.DataFrame({"text": TEXTS}), tmp_path / "t.csv")), "text", rows=5)
    first, again, other = (load_originals([source], seed=seed)["text"].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 5 and set(first) <= set(TEXTS)


def test_sources_stand_one_below_the_other(tmp_path, database):
    path = write_table(pd.DataFrame({"text": ["A tweet."]}), tmp_path / "tweets.csv")
    table = load_originals([Source(str(path), "text"), Source(str(database), "title", table="en", rows=2)])
    assert table["source"].tolist() == ["tweets.csv", database.name, database.name]
    assert table.index.tolist() == [0, 1, 2]


def test_faulty_sources_are_refused_by_name(tmp_path, database):
    for source, reason in (
        (Source(str(tmp_path / "no.csv"), "text"), "no such file"),
        (Source(str(tmp_path / "no.sqlite"), "text", table="en"), "no such file"),
        (Source(str(database), "abstract", table="de"), "no table 'de'; it has en"),
        (Source(str(database), "text", table="en"), "no column 'text'; it has title, abstract"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            load_originals([source])
        assert source.path in str(caught.value)
    with pytest.raises(InputError, match="no sources"):
        load_originals([])


def test_a_file_that_only_pretends_to_be_a_database_is_refused(tmp_path):
    (tmp_path / "x.sqlite").write_bytes(b"id,text\n1,a\n" * 100)
    with pytest.raises(InputError, match="not a SQLite database"):
        load_originals([Source(str(tmp_path / "x.sqlite"), "text", table="en")])


def test_a_database_is_opened_read_only(database):
    before = database.read_bytes()
    load_originals([Source(str(database), "abstract", table="en")])
    assert database.read_bytes() == before


# --- slicing and filtering


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("Short enough.", 5, "Short enough."),
        ("One two three. Four five six.", 6, "One two three. Four five six."),
        ("One two three. Four five six. Seven eight.", 6, "One two three. Four five six."),
        ("One two three. Four five six.", 5, "One two three."),
        ("One. Two three four five six seven eight.", 7, "One. Two three four five six seven"),
        ("Is it you? Yes it is me and nobody else", 4, "Is it you?"),
        ('He said "Go now." Then he left the room', 6, 'He said "Go now."'),
        ("First line here.\nSecond line here.\nThird line", 7, "First line here.\nSecond line here."),
        ("one\ntwo\nthree\nfour", 2, "one\ntwo"),
        ("Costs 3.50 euros per kilo today", 4, "Costs 3.50 euros per"),
        ("", 3, ""),
    ],
)
def test_texts_are_sliced_at_the_end_of_a_sentence(text, words, expected):
    assert slice_words(text, words) == expected


@pytest.mark.parametrize("glue", [" ", "\n", "  \t"])
def test_a_text_of_a_hundred_thousand_words_is_cut_to_size(glue):
    text = glue.join(f"word{number}" for number in range(100_000))
    assert len(slice_words(text, 256).split()) == 256


@pytest.mark.parametrize("seed", range(5))
def test_a_slice_is_always_a_beginning_of_the_text_and_never_too_long(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        text = " ".join(rng.choice(["a", "b.", "c!", "d\n\ne?", "f."], size=rng.integers(1, 60)))
        sliced = slice_words(text, 20)
        assert text.startswith(sliced)
        assert min(10, len(text.split())) / 2 <= len(sliced.split()) <= 20


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A plain sentence that is long enough to be kept as an original.", True),
        ("Too short.", False),
        ("A sentence with a café in it, which is long enough but not ASCII.", False),
        ("== History == A wiki heading in a text that is otherwise long enough.", False),
    ],
)
def test_originals_are_filtered(text, kept):
    assert keep_original(text) is kept


# --- pairing


@pytest.fixture
def originals():
    kinds = ["email", "recipe"]
    rows = [(f"{kind} {n}", kind, split) for n in range(8) for kind in kinds for split in ("train", "test")]
    return pd.DataFrame(rows, columns=["text", "kind", "split"])


@pytest.fixture
def prompts():
    rows = [(f"{kinds} prompt {n} {split}", kinds, split)
            for split, count in (("train", 6), ("test", 2)) for n in range(count)
            for kinds in ("any", "email", "email|recipe", "letter")]  # fmt: skip
    return pd.DataFrame(rows, columns=["rewrite_prompt", "kinds", "split"])


def test_pairs_are_distinct_suit_the_kind_and_respect_the_split(originals, prompts):
    table = pair(originals, prompts, rows=80, seed=3)
    assert not table.duplicated(["original_text", "rewrite_prompt"]).any() and table["id"].is_unique
    text_split = dict(zip(originals["text"] + originals["split"], originals["split"], strict=True))
    kinds = dict(zip(prompts["rewrite_prompt"], prompts["kinds"].str.split("|"), strict=True))
    for row in table.itertuples():
        assert row.original_text + row.split in text_split
        assert row.rewrite_prompt.endswith(row.split)
        assert "any" in kinds[row.rewrite_prompt] or row.kind in kinds[row.rewrite_prompt]
        assert row.original_text.startswith(row.kind)


def test_a_prompt_that_suits_no_original_is_never_used(originals, prompts):
    assert not pair(originals, prompts, rows=80)["rewrite_prompt"].str.startswith("letter").any()


def test_every_prompt_is_used_once_before_any_is_used_twice(originals, prompts):
    usable = prompts[prompts["kinds"] != "letter"]
    for rows, allowed in ((len(usable), {1}), (len(usable) * 4, {4}), (len(usable) * 3 // 2, {1, 2})):
        counts = Counter(pair(originals, usable, rows=rows, seed=1)["rewrite_prompt"])
        assert set(counts.values()) == allowed and len(counts) == len(usable)


def test_splits_share_the_rows_in_proportion_to_their_prompts(originals, prompts):
    usable = prompts[prompts["kinds"] != "letter"]
    assert pair(originals, usable, rows=40)["split"].value_counts().to_dict() == {"train": 30, "test": 10}


def test_pairing_is_deterministic_and_follows_the_seed(originals, prompts):
    pd.testing.assert_frame_equal(pair(originals, prompts, 30, seed=5), pair(originals, prompts, 30, seed=5))
    assert pair(originals, prompts, 30, seed=5)["id"].tolist() != pair(originals, prompts, 30, seed=6)["id"].tolist()


def test_pairing_ends_when_the_pairs_are_used_up(originals, prompts):
    few = prompts[prompts["kinds"] == "email"].query("split == 'test'")
    assert len(pair(originals, few, rows=1000)) == 8 * 2


@pytest.mark.parametrize("rows", range(1, 12))
def test_pairing_gives_as_many_rows_as_asked_for_although_some_prompts_suit_nothing(originals, prompts, rows):
    train = prompts[prompts["split"] == "train"]
    assert len(pair(originals, train, rows, seed=rows)) == rows


def test_pairing_without_a_common_split_is_refused(originals, prompts):
    with pytest.raises(InputError, match="no split has both"):
        pair(originals[originals["split"] == "train"], prompts[prompts["split"] == "test"], 5)


# --- other people's sets


@pytest.mark.parametrize(
    "names",
    [
        ("original_text", "rewrite_prompt", "rewritten_text"),
        ("Original Text", "Prompt", "Rewritten Text"),
        ("original", "instruction", "output"),
        (" source_text ", "REWRITE_PROMPT", "gemma_text"),
        ("input_text", "target", "response"),
    ],
)
def test_other_peoples_column_names_are_understood(tmp_path, names):
    renamed = dict(zip(("original_text", "rewrite_prompt", "rewritten_text"), names, strict=True))
    path = write_table(TRIPLES.rename(columns=renamed).assign(extra=1), tmp_path / "set-b.csv")
    table = load_triples(path)
    assert table.drop(columns="source").to_dict("list") == TRIPLES.to_dict("list")
    assert set(table["source"]) == {"set-b"}


def test_our_own_name_wins_over_an_alias():
    table = canonical_columns(TRIPLES.assign(text="something else", prompt="another"), "x")
    assert table["original_text"].tolist() == TRIPLES["original_text"].tolist()
    assert table["rewrite_prompt"].tolist() == TRIPLES["rewrite_prompt"].tolist()


def test_a_set_without_rewritten_texts_is_refused(tmp_path):
    path = write_table(TRIPLES.drop(columns="rewritten_text"), tmp_path / "t.csv")
    with pytest.raises(InputError, match=r"t\.csv: no column rewritten_text"):
        load_triples(path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "row 2: rewritten_text is blank or not text"),
        ("   ", "row 2: rewritten_text is blank or not text"),
        ("word " * 100_000, "row 2: rewritten_text has 100,000 words; the limit is 50,000 characters"),
    ],
)
def test_a_faulty_cell_is_named_by_row_and_column(tmp_path, value, reason):
    table = TRIPLES.assign(rewritten_text=["fine text", value])
    with pytest.raises(InputError, match=reason):
        load_triples(write_table(table, tmp_path / "t.csv"))


@pytest.mark.parametrize("value", [None, float("nan"), 3, ["a"]])
def test_a_cell_that_is_no_text_is_refused(value):
    table = TRIPLES.astype(object).assign(original_text=pd.Series(["fine", value], dtype=object))
    with pytest.raises(InputError, match="here: row 2: original_text is blank or not text"):
        check_cells(table, ["original_text"], "here")


def test_the_longest_text_allowed_is_allowed():
    check_cells(TRIPLES.assign(original_text="x" * LONGEST_TEXT), ["original_text"], "here")


def test_duplicate_and_blank_ids_are_refused():
    with pytest.raises(InputError, match="here: id 'a' occurs twice"):
        check_cells(TRIPLES.assign(id=["a", "a"]), [], "here")
    with pytest.raises(InputError, match="here: row 2: id is blank"):
        check_cells(TRIPLES.assign(id=["a", None]), [], "here")


def test_duplicate_ids_of_a_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="id 'a' occurs twice"):
        load_triples(write_table(TRIPLES.assign(id="a"), tmp_path / "t.csv"))


@pytest.mark.parametrize("ids", [None, [None, None], ["a", None]])
def test_missing_ids_are_made_from_the_texts(tmp_path, ids):
    table = TRIPLES.drop(columns="id") if ids is None else TRIPLES.assign(id=ids)
    first = load_triples(write_table(table, tmp_path / "t.jsonl"))["id"].tolist()
    assert first == [text_id(*row) for row in TRIPLES.drop(columns="id").to_numpy()]


def test_a_source_column_is_kept_unless_another_name_is_given(tmp_path):
    path = write_table(TRIPLES.assign(source=["x", "y"]), tmp_path / "t.csv")
    assert load_triples(path)["source"].tolist() == ["x", "y"]
    assert load_triples(path, source="forum")["source"].tolist() == ["forum", "forum"]


def test_merging_keeps_provenance_and_drops_equal_triples():
    ours, theirs = TRIPLES.assign(source="ours"), TRIPLES.assign(source="theirs", id=["1", "2"])
    theirs.loc[1, "rewritten_text"] = "SHUT STOP"
    merged = merge_triples([ours, ours.head(0), theirs])
    assert merged["source"].tolist() == ["ours", "ours", "theirs"]
    assert merged["rewritten_text"].tolist() == [*TRIPLES["rewritten_text"], "SHUT STOP"]


def test_merged_sets_that_all_count_from_zero_get_distinct_ids():
    one = TRIPLES.assign(id=["0", "1"])
    other = one.assign(rewritten_text=["sails", "shut"])
    ids = merge_triples([one, other])["id"].tolist()
    assert ids[:2] == ["0", "1"] and len(set(ids)) == 4


def test_text_ids_depend_on_where_one_text_ends():
    assert text_id("ab", "c") != text_id("a", "bc")
    assert text_id("ab", "c") == text_id("ab", "c")


# --- what the project ships


def test_shipped_originals_are_distinct_texts_with_kind_and_split():
    table = shipped_originals()
    check_cells(table, ["text", "kind", "split"], "originals.csv")
    assert table["text"].is_unique and set(table["split"]) <= {"train", "validation", "test"}


def test_shipped_triples_are_whole_and_can_be_asked_for_by_split():
    everything = shipped_triples()
    check_cells(everything, ["original_text", "rewrite_prompt", "rewritten_text"], "triples.csv")
    train, rest = shipped_triples(["train"]), shipped_triples(["validation", "test"])
    assert set(train["split"]) == {"train"} and len(train) + len(rest) == len(everything)
    assert len(train) and not set(train["rewrite_prompt"]) & set(rest["rewrite_prompt"])
