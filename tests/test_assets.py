"""The shipped text: its form, its variety, its honesty (rewrites do what was asked and do not quote it), its split.

A failing check names the rows. Mend the text, not the check: the CSVs in promptrec/assets are what the series learns from.
"""

from __future__ import annotations

import re
import runpy
import unicodedata
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from rapidfuzz import fuzz

from promptrec.cleaning import CleaningSettings, clean, strip_lead_in
from promptrec.profiles import ASSETS
from promptrec.splits import SAME_PROMPT, SPLITS, check_split, cluster_prompts

TAXONOMY = {"form", "style", "voice", "tone", "audience", "setting", "constraint", "edit", "mixture"}
COLUMNS = {
    "originals": ["id", "kind", "text", "split"],
    "prompts": ["rewrite_prompt", "taxonomy"],
    "triples": [
        "id",
        "original_text",
        "rewrite_prompt",
        "rewritten_text",
        "kind",
        "taxonomy",
        "lead_in",
        "prompt_cluster",
        "split",
    ],
}
TEXTS = [(name, column) for name, columns in COLUMNS.items() for column in columns if re.search("text|prompt$", column)]
TOO_CLOSE = 0.95  # MiniLM cosine from which two prompts are the same prompt in other words
LEAK = 6  # words of the prompt in a row that give it away
MOJIBAKE = re.compile("[ÃÂâ][\u0080-\u00bf€™œ\u009d]|ï»¿|\ufffd")
COMMON = re.compile("the|a|an|of|to|and|in|is|it|you|i|for|on|with|that|was|at|my")
UNPRINTABLE = {"Cc", "Cn", "Co", "Cs"}  # Unicode categories: control, unassigned, private, surrogate
SMALL_EDIT = re.compile(
    r"\b(?:fix|tidy|grammar|punctuation|tense|person|remove|replace|change|shrink|emojis)\b", re.IGNORECASE
)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: what is compared when the wording counts and the typing does not."""
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def normalised(texts: pd.Series) -> pd.Series:
    return texts.map(lambda text: " ".join(words(text)))


def lengths(texts: pd.Series) -> pd.Series:
    return texts.str.split().str.len()


@pytest.fixture(scope="module")
def shipped() -> dict[str, pd.DataFrame]:
    return {name: pd.read_csv(ASSETS / f"{name}.csv", keep_default_na=False) for name in COLUMNS}


@pytest.fixture(scope="module")
def originals(shipped) -> pd.DataFrame:
    return shipped["originals"]


@pytest.fixture(scope="module")
def prompts(shipped) -> pd.DataFrame:
    return shipped["prompts"]


@pytest.fixture(scope="module")
def triples(shipped) -> pd.DataFrame:
    return shipped["triples"]


@pytest.fixture(scope="module")
def vectors(minilm, triples, prompts) -> np.ndarray:
    """Unit vectors of the triples' prompts, then of prompts.csv: [n, 384]."""
    return minilm.encode([*triples["rewrite_prompt"], *prompts["rewrite_prompt"]])


# ---- form


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_are_complete(shipped, name):
    table = shipped[name]
    assert sorted(table.columns) == sorted(COLUMNS[name])
    for column in table.select_dtypes("object"):
        assert (table[column].str.strip() == table[column]).all(), f"{column}: text begins or ends with white space"
        assert (table[column] != "").all(), f"{column}: empty cells"
    if "id" in table:
        assert table["id"].is_unique


def test_there_is_enough_of_everything(originals, prompts, triples):
    assert len(triples) >= 700
    assert triples["rewrite_prompt"].nunique() >= 650
    assert len(originals) >= 250 and originals["kind"].nunique() >= 12
    assert len(prompts) >= 3000
    assert set(triples["lead_in"]) == {True, False} and triples["prompt_cluster"].dtype.kind == "i"


@pytest.mark.parametrize(("name", "column"), TEXTS)
def test_text_is_printable_english(shipped, name, column):
    texts = shipped[name][column]
    letters = texts.map(lambda text: sum(map(str.isalpha, text)) / len(text))
    assert letters[texts.str.len() > 40].min() > 0.6, texts[letters.idxmin()]
    for text in texts:
        assert not MOJIBAKE.search(text), text
        foreign = [letter for letter in text if letter.isalpha() and "LATIN" not in unicodedata.name(letter, "")]
        assert len(foreign) <= 5, text  # a Greek letter for colour, no more
        unprintable = [letter for letter in text if unicodedata.category(letter) in UNPRINTABLE and letter != "\n"]
        assert not unprintable, text


def test_long_texts_use_english_words(originals, triples):
    texts = [text for text in [*originals["text"], *triples["rewritten_text"]] if len(words(text)) >= 60]
    shares = [sum(bool(COMMON.fullmatch(word)) for word in words(text)) / len(words(text)) for text in texts]
    assert min(shares) > 0 and np.quantile(shares, 0.01) > 0.1  # logs and tables may have fewer, but few texts are such


def test_originals_are_ascii(originals, triples):
    for text in [*originals["text"], *triples["original_text"]]:
        assert text.isascii(), [letter for letter in text if not letter.isascii()]


def test_lengths(originals, prompts, triples):
    """In words, split at white space."""
    for table in (prompts, triples):
        counts = lengths(table["rewrite_prompt"])
        assert counts.between(2, 42).all(), table["rewrite_prompt"][~counts.between(2, 42)].tolist()
        assert 7 <= counts.median() <= 11
    for texts, shortest, longest in ((originals["text"], 20, 250), (triples["rewritten_text"], 15, 320)):
        counts = lengths(texts)
        assert counts.between(shortest, longest).all(), texts[~counts.between(shortest, longest)].tolist()


# ---- variety


def test_no_prompt_occurs_twice(prompts, triples):
    both = normalised(pd.concat([triples["rewrite_prompt"], prompts["rewrite_prompt"]]))
    assert not both[both.duplicated()].tolist()


def test_no_two_prompts_say_the_same(vectors, prompts, triples):
    texts = [*triples["rewrite_prompt"], *prompts["rewrite_prompt"]]
    near = np.argwhere(np.triu(vectors @ vectors.T, k=1) >= TOO_CLOSE)
    assert not [(texts[a], texts[b]) for a, b in near]


def test_no_original_occurs_twice(originals):
    assert not normalised(originals["text"]).duplicated().any()
    for _, group in originals.groupby("kind"):
        texts = group["text"].tolist()
        near = [(a[:60], b[:60]) for n, a in enumerate(texts) for b in texts[:n] if fuzz.ratio(a, b) > 70]
        assert not near


@pytest.mark.parametrize("name", ["prompts", "triples"])
def test_every_part_of_the_taxonomy_has_its_share(shipped, name):
    shares = shipped[name]["taxonomy"].value_counts(normalize=True)
    assert set(shares.index) == TAXONOMY
    assert shares.between(0.05, 0.28).all(), shares.to_dict()


def test_no_kind_and_no_original_dominates(originals, triples):
    assert originals["kind"].value_counts(normalize=True).max() < 0.15
    assert triples["original_text"].value_counts().max() <= 6


# ---- rewrites


def test_originals_of_the_triples_are_shipped_as_originals(originals, triples):
    known = originals.set_index("text")[["kind", "split"]]
    assert set(triples["original_text"]) <= set(known.index)
    for column in ("kind", "split"):
        assert (triples["original_text"].map(known[column]) == triples[column]).all()


def test_rewrites_do_not_quote_their_prompt(triples):
    for row in triples[~triples["lead_in"]].itertuples():
        asked, answer = words(row.rewrite_prompt), f" {' '.join(words(row.rewritten_text))} "
        runs = [" ".join(asked[start : start + LEAK]) for start in range(len(asked) - LEAK + 1)]
        assert not [run for run in runs if f" {run} " in answer], (row.id, row.rewrite_prompt)


def test_a_tenth_of_the_rewrites_opens_with_a_lead_in(triples):
    assert 0.08 <= triples["lead_in"].mean() <= 0.12
    bare = triples["rewritten_text"].map(strip_lead_in)
    touched = bare != triples["rewritten_text"]
    assert not triples.loc[touched & ~triples["lead_in"], "rewritten_text"].str[:80].tolist(), (
        "stripped, but no lead-in"
    )
    assert not triples.loc[~touched & triples["lead_in"], "rewritten_text"].str[:80].tolist(), (
        "a lead-in that is not stripped"
    )
    assert lengths(bare).min() >= 15


def test_every_rewrite_changes_its_original(triples):
    before, after = normalised(triples["original_text"]), normalised(triples["rewritten_text"])
    typed = triples["original_text"] == triples["rewritten_text"]
    assert not triples.loc[typed, "id"].tolist()
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        prompt = triples["rewrite_prompt"].iloc[number]
        assert fuzz.ratio(one, other) <= 95 or SMALL_EDIT.search(prompt), (triples["id"].iloc[number], prompt)


def test_rewrites_of_one_original_differ(triples):
    for _, group in triples.groupby("original_text"):
        texts = sorted(group["rewritten_text"])
        assert all(fuzz.ratio(one, other) < 90 for one, other in pairwise(texts))


def test_cleaning_keeps_nearly_every_row(triples):
    kept, report = clean(triples)
    assert (
        report["refusal"] == report["nonsense"] == report["blank"] == report["length"] == report["near-duplicate"] == 0
    )
    assert report["unchanged"] <= 0.01 * len(
        triples
    )  # small edits ("fix the punctuation") that the rule takes for none
    assert report["lead-in stripped"] == triples["lead_in"].sum()
    assert len(kept) == len(triples) - report["unchanged"] and CleaningSettings().unchanged == 95


# ---- constraints that can be counted: pattern of the prompt -> whether the rewrite (without lead-in) obeys


def sentences(text: str) -> list[str]:
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|St|Cdr|No)\.", r"\1", text)
    return [part for part in re.split(r"(?<=[.!?])[\"')*]*\s+", text) if words(part)]


def size(text: str) -> int:
    """Words, split at white space; bullets and dashes that stand alone are none."""
    return sum(bool(re.search(r"\w", word)) for word in text.split())


LETTERS = r"without (?:using )?the letter \"?(\w)\"?"
CONSTRAINTS = {
    LETTERS: lambda text, letter: letter.lower() not in text.lower(),
    r"exactly (\d+) words": lambda text, number: size(text) == int(number),
    r"exactly fifty words": lambda text: size(text) == 50,
    r"exactly three sentences": lambda text: len(sentences(text)) == 3,
    r"exactly five sentences": lambda text: len(sentences(text)) == 5,
    r"exactly six sentences": lambda text: len(sentences(text)) == 6,
    r"in two sentences": lambda text: len(sentences(text)) == 2,
    r"under (\d+) words": lambda text, number: size(text) < int(number),
    r"fewer than (\d+) words": lambda text, number: size(text) < int(number),
    r"(?:no more|not more) than (\d+) words": lambda text, number: size(text) <= int(number),
    r"only questions|each line is a question": lambda text: all("?" in part for part in sentences(text)),
    r"every sentence (?:starts|beginning) with the (?:letter|word) \"?(\w+)\"?": lambda text, start: all(
        part.strip("\"'*").startswith(start) for part in sentences(text)
    ),
    r"every line starts with the letter (\w)": lambda text, start: all(
        line.startswith(start) for line in text.splitlines() if line
    ),
    r"single apostrophe": lambda text: not re.search("['’]", text),
    r"without using the word \"(\w+)\"": lambda text, word: word not in words(text),
    r"no more than 280 characters|into a tweet\b(?! thread)": lambda text: len(text) <= 280,
}


@pytest.mark.parametrize("pattern", CONSTRAINTS)
def test_constraints_are_obeyed_to_the_letter(triples, pattern):
    asked = triples["rewrite_prompt"].str.extract(f"(?i)({pattern})")
    rows = triples[asked[0].notna()]
    assert len(rows)
    for number, row in rows.iterrows():
        found = [value for value in asked.loc[number].iloc[1:] if isinstance(value, str)]
        assert CONSTRAINTS[pattern](strip_lead_in(row["rewritten_text"]), *found), (row["id"], row["rewrite_prompt"])


# ---- split


def test_split_is_fixed_and_clean(originals, triples):
    check_split(triples)
    shares = triples["split"].value_counts(normalize=True)
    assert set(shares.index) == set(originals["split"]) == set(SPLITS)
    assert 0.6 < shares["train"] < 0.85 and shares[["validation", "test"]].min() > 0.05, shares.to_dict()


def test_prompt_clusters_are_far_apart(vectors, triples):
    ours = vectors[: len(triples)]
    cosine, clusters = ours @ ours.T, triples["prompt_cluster"].to_numpy()
    assert cosine[clusters[:, None] != clusters[None, :]].max() < SAME_PROMPT
    assert len(np.unique(clusters)) == len(np.unique(cluster_prompts(ours)))


# ---- card


def test_the_card_gives_true_numbers():
    pytest.importorskip("matplotlib")
    root = ASSETS.parents[1]
    script = root / "scripts" / "draw_data_card.py"
    if not script.is_file():
        pytest.skip("installed without the repository")
    card = runpy.run_path(str(script))
    written = card["NUMBERS"].read_text(encoding="utf-8")
    assert written.startswith(card["numbers"](card["load"]())), "run scripts/draw_data_card.py"
    for name in ("lengths", "taxonomy", "clusters"):
        assert (root / "images" / f"data-{name}.svg").stat().st_size < 400_000


def test_the_retrieval_bank_holds_no_twin_of_a_held_out_prompt(prompts, triples, minilm):
    held_out = triples.loc[triples["split"] != "train", "rewrite_prompt"].tolist()
    assert (minilm.encode(prompts["rewrite_prompt"].tolist()) @ minilm.encode(held_out).T).max() < 0.9
