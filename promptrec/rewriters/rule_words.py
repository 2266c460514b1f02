"""The words that the stand-in knows (assets/lexicon.yaml) and how English inflects them."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import yaml

LEXICON = Path(__file__).parents[1] / "assets" / "lexicon.yaml"


@lru_cache(maxsize=1)
def lexicon() -> dict[str, dict]:
    """assets/lexicon.yaml: one entry per style, and the word lists whose names begin with an underscore."""
    return yaml.safe_load(LEXICON.read_text(encoding="utf-8"))


def phrases() -> dict[str, list]:
    """The ready-made phrases of the forms (_forms in the lexicon)."""
    return lexicon()["_forms"]


@lru_cache(maxsize=16)
def word_set(name: str) -> frozenset[str]:
    """A list of _grammar in the lexicon: skip, function, abbreviations, dates, small_words ..."""
    return frozenset(lexicon()["_grammar"][name].split())


@lru_cache(maxsize=4)
def word_map(name: str) -> dict[str, str]:
    """A table of _grammar in the lexicon: to_past, to_present, i_for_one, we_for_many."""
    return {source: targets[0] for source, targets in word_pairs(lexicon()["_grammar"][name])}


@lru_cache(maxsize=1)
def verbs() -> dict[str, str]:
    """Base form -> past form."""
    grammar = lexicon()["_grammar"]
    table = {base: past_of(base) for base in grammar["regular"].split()}
    return table | dict(pair.split() for pair in grammar["irregular"].split(","))


@lru_cache(maxsize=1)
def common_words() -> frozenset[str]:
    """Words that carry a capital letter only because a sentence begins with them."""
    words = set(word_set("skip") | word_set("function"))
    words.update(*(people.split("/") for people in lexicon()["_people"].values()))
    words.update(verbs(), verbs().values(), map(third_person, verbs()), map(ing_form, verbs()))
    for entry in lexicon().values():
        if isinstance(entry.get("words"), str):
            words.update(source for source, _ in word_pairs(entry["words"]))
        words.update(re.split(r"\W", lead.lower())[0] for lead in entry.get("leads", []))
    return frozenset(words - word_set("dates"))


def word_pairs(table: str) -> list[tuple[str, list[str]]]:
    """Read "a/b=c|d; e=f" as [(a, [c, d]), (b, [c, d]), (e, [f])]."""
    pairs = []
    for entry in filter(None, map(str.strip, table.split(";"))):
        sources, _, targets = entry.partition("=")
        pairs += [(source.lower(), targets.split("|")) for source in sources.split("/")]
    return pairs


# --- inflection ---------------------------------------------------------------------------------------------


def _doubles(base: str) -> bool:
    return base in {
        "admit",
        "drop",
        "grab",
        "hum",
        "jam",
        "knit",
        "nod",
        "plan",
        "skip",
        "stop",
        "hug",
        "beg",
    }


def past_of(base: str) -> str:
    """Regular past: walk -> walked, carry -> carried, stop -> stopped."""
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    return base + (base[-1] if _doubles(base) else "") + "ed"


def third_person(base: str) -> str:
    """walk -> walks, carry -> carries, catch -> catches, go -> goes."""
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + ("es" if re.search(r"(?:s|x|z|ch|sh|o)$", base) else "s")


def ing_form(base: str) -> str:
    """walk -> walking, make -> making, stop -> stopping."""
    stem = base[:-1] if base.endswith("e") and not base.endswith("ee") else base
    return stem + (stem[-1] if _doubles(base) else "") + "ing"


def plural(noun: str) -> str:
    """otter -> otters, fairy -> fairies, werewolf -> werewolves."""
    return noun[:-1] + "ves" if noun.endswith("lf") else third_person(noun)
