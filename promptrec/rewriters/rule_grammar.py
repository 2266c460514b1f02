"""The styles that change the grammar: past tense, present tense, first person.

There is no parser here: verbs are found by word lists and by what stands in front of them. A verb that is
missed stays as it was; the leads and closings of the lexicon ("Back then, ...") make the change visible.
"""

from __future__ import annotations

import re
from functools import lru_cache
from random import Random

from promptrec.rewriters.rule_edits import people_in
from promptrec.rewriters.rule_voices import speak
from promptrec.rewriters.rule_words import third_person, verbs, word_map, word_set

Slots = dict[str, str]
AUXILIARY = re.compile(
    r"be|been|being|is|are|was|were|has|have|had|will|would|can|could|may|might|must|shall|should|do|does|did|to"
    r"|(?:\w+n't|\w+'(?:d|ve|ll|m|re|s))"
)


@lru_cache(maxsize=1)
def _present_to_past() -> dict[str, str]:
    return {third_person(base): past for base, past in verbs().items()}


@lru_cache(maxsize=1)
def _third_to_base() -> dict[str, str]:
    return {third_person(base): base for base in verbs()}


@lru_cache(maxsize=1)
def _past_to_base() -> dict[str, str]:
    return {past: base for base, past in verbs().items() if past != base}


def _change_words(text: str, change) -> str:
    """Call change(word, the words before it in its clause) on every lower-cased word; None keeps the word."""

    def swap(match: re.Match[str]) -> str:
        clause = re.split(r"[.!?,;:\n\"“”]", text[max(0, match.start() - 60) : match.start()])[-1]
        before = clause.lower().replace("’", "'").split()
        word = match[0].replace("’", "'")
        if word[0].isupper() and word.isupper() and len(word) > 1:
            return match[0]
        new = change(word.lower(), before)
        if new is None or (word[0].isupper() and before):
            return match[0]
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"[A-Za-z]+(?:['’][a-z]+)?", swap, text)


def _is_plural(word: str) -> bool:
    """Whether a word in front of a verb asks for the plural form: they, children, boys."""
    return word in word_set("plural_subjects") or (
        word.endswith("s") and not word.endswith(("ss", "us", "is", "’s", "'s"))
    )


def _is_finite(before: list[str]) -> bool:
    """Whether a verb form can stand here on its own: no article, preposition or auxiliary before it."""
    return (
        bool(before) and before[-1] not in word_set("no_verb_after") and not any(map(AUXILIARY.fullmatch, before[-3:]))
    )


def past_tense(text: str, slots: Slots, rng: Random) -> str:
    """is -> was, walks -> walked, I go -> I went; and words that say that it was long ago."""

    def change(word: str, before: list[str]) -> str | None:
        if word in ("have", "do") and any(map(AUXILIARY.fullmatch, before[-2:])):
            return None
        if word in word_map("to_past"):
            return word_map("to_past")[word]
        if not _is_finite(before):
            return None
        return verbs().get(word) if _is_plural(before[-1]) else _present_to_past().get(word)

    return speak("past_tense", _change_words(text, change), slots, rng)


def present_tense(text: str, slots: Slots, rng: Random) -> str:
    """was -> is, walked -> walks, they went -> they go; and words that say that it is now."""

    def change(word: str, before: list[str]) -> str | None:
        many = bool(before) and _is_plural(before[-1])
        if word == "was" and before[-1:] == ["i"]:
            return "am"
        if word in word_map("to_present"):
            new = word_map("to_present")[word]
            return word_map("for_many").get(new, new) if many and not word.startswith("was") else new
        base = _past_to_base().get(word)
        if base is None or not (_is_finite(before) or before[-1:] in (["and"], ["who"], ["that"])):
            return None
        return base if many else third_person(base)

    return speak("present_tense", _change_words(text, change), slots, rng)


def first_person(text: str, slots: Slots, rng: Random) -> str:
    """he, she -> I; they -> we; the first person who is named says so: "I, Marta Odell, ..."."""
    person = next(iter(people_in(text)), None)
    alone = person or re.search(r"\b(?:he|she)\b", text, re.IGNORECASE) or not re.search(r"\b[Tt]hey\b", text)
    pronouns = word_map("i_for_one") | ({} if alone else word_map("we_for_many"))
    text = re.sub(r"\b([Hh])er\b(?= (?!(?:in|on|at|to|and|with|for|from|that|a|the)\b)[a-z])", r"\1is", text)
    text = re.sub(r"\bher\b", "him", text)
    text = _change_words(text, lambda word, before: pronouns.get(word))
    for third, first in word_map("i_verbs").items():
        text = re.sub(rf"\bI {third}\b", f"I {first}", text)
    text = re.sub(r"\bI ([a-z]+)\b", lambda m: f"I {_third_to_base().get(m[1], m[1])}", text)
    if person:
        text = re.sub(rf"\b{re.escape(person)}\b(?!['’])(,?)", f"I, {person},", text, count=1)
    return speak("first_person", text, slots, rng)
