"""The styles that change the grammar: past tense, present tense, first person.

There is no parser here: verbs are found by word lists and by what stands in front of them. A verb that is missed stays
as it was, and the lexicon's leads and closings ("Back then, ...") make the change visible in any text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from random import Random

from promptrec.rewriters.rule_edits import people_in
from promptrec.rewriters.rule_text import third_person, verbs
from promptrec.rewriters.rule_voices import speak

Slots = dict[str, str]
# In front of a noun stands one of these, so the word behind it is no finite verb.
NO_VERB_AFTER = frozenset(
    "the a an this these those my your his her its our their some any no every each many few two three four five six "
    "seven eight nine ten of in on at by with from for into under over and or as to be been being is are was were has "
    "have had will would can could may might must shall should do does did not more most very old new big small".split()
)
PLURAL_SUBJECTS = frozenset("i you we they people children men women".split())
TO_PAST = {
    "is": "was", "are": "were", "am": "was", "has": "had", "have": "had", "does": "did", "do": "did", "will": "would",
    "can": "could", "may": "might", "isn't": "wasn't", "aren't": "weren't", "hasn't": "hadn't", "haven't": "hadn't",
    "doesn't": "didn't", "don't": "didn't", "won't": "wouldn't", "can't": "couldn't", "i'm": "I was", "it's": "it was",
    "he's": "he was", "she's": "she was", "they're": "they were", "we're": "we were", "you're": "you were",
    "there's": "there was", "that's": "that was", "now": "then", "today": "that day", "tomorrow": "the next day",
}  # fmt: skip
TO_PRESENT = {
    "was": "is", "were": "are", "had": "has", "did": "does", "would": "will", "could": "can", "might": "may",
    "wasn't": "isn't", "weren't": "aren't", "hadn't": "hasn't", "didn't": "doesn't", "wouldn't": "won't",
    "couldn't": "can't", "yesterday": "today", "ago": "before now",
}  # fmt: skip
I_FOR_ONE = {
    "he": "I", "she": "I", "him": "me", "his": "my", "himself": "myself", "herself": "myself", "hers": "mine",
    "he's": "I'm", "she's": "I'm", "he'd": "I'd", "she'd": "I'd", "he'll": "I'll", "she'll": "I'll",
}  # fmt: skip
WE_FOR_MANY = {
    "they": "we", "them": "us", "their": "our", "themselves": "ourselves", "theirs": "ours", "they're": "we're",
}  # fmt: skip
FOR_MANY = {"has": "have", "hasn't": "haven't", "does": "do", "doesn't": "don't", "is": "are", "isn't": "aren't"}


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
    """Call change(word, word before it) on every lower-cased word; None keeps the word."""

    def swap(match: re.Match[str]) -> str:
        before = re.search(r"([\w’']+)\s+$", text[max(0, match.start() - 30) : match.start()])
        word = match[0].replace("’", "'")
        if word[0].isupper() and word.isupper() and len(word) > 1:
            return match[0]
        new = change(word.lower(), before[1].lower() if before else "")
        if new is None or (word[0].isupper() and before):
            return match[0]
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"[A-Za-z]+(?:['’][a-z]+)?", swap, text)


def _is_plural(word: str) -> bool:
    """Whether a word in front of a verb asks for the plural form: they, children, boys."""
    return word in PLURAL_SUBJECTS or (word.endswith("s") and not word.endswith(("ss", "us", "is", "’s", "'s")))


def past_tense(text: str, slots: Slots, rng: Random) -> str:
    """is -> was, walks -> walked, I go -> I went; and words that say that it was long ago."""

    def change(word: str, before: str) -> str | None:
        if word in TO_PAST:
            return TO_PAST[word]
        if not before or before in NO_VERB_AFTER:
            return None
        return verbs().get(word) if _is_plural(before) else _present_to_past().get(word)

    return speak("past_tense", _change_words(text, change), slots, rng)


def present_tense(text: str, slots: Slots, rng: Random) -> str:
    """was -> is, walked -> walks, they went -> they go; and words that say that it is now."""

    def change(word: str, before: str) -> str | None:
        many = _is_plural(before)
        if word == "was" and before == "i":
            return "am"
        if word in TO_PRESENT:
            new = TO_PRESENT[word]
            return FOR_MANY.get(new, new) if many and not word.startswith("was") else new
        base = _past_to_base().get(word)
        if base is None or not before or before in NO_VERB_AFTER - {"and", "not"}:
            return None
        return base if many else third_person(base)

    return speak("present_tense", _change_words(text, change), slots, rng)


def first_person(text: str, slots: Slots, rng: Random) -> str:
    """he, she -> I; they -> we; the first person who is named says so: "I, Marta Odell, ..."."""
    person = next(iter(people_in(text)), None)
    single = bool(re.search(r"\b(?:he|she)\b", text, re.IGNORECASE))
    pronouns = I_FOR_ONE if single or person else I_FOR_ONE | WE_FOR_MANY
    text = re.sub(r"\b([Hh])er\b(?= (?!(?:in|on|at|to|and|with|for|from|that|a|the)\b)[a-z])", r"\1is", text)
    text = re.sub(r"\bher\b", "him", text)
    text = _change_words(text, lambda word, before: pronouns.get(word))
    for third, first in {"is": "am", "has": "have", "does": "do", "isn't": "am not", "hasn't": "haven't"}.items():
        text = re.sub(rf"\bI {third}\b", f"I {first}", text)
    text = re.sub(r"\bI ([a-z]+)\b", lambda m: f"I {_third_to_base().get(m[1], m[1])}", text)
    if person:
        text = re.sub(rf"\b{re.escape(person)}\b(?!['’])(,?)", f"I, {person},", text, count=1)
    return speak("first_person", text, slots, rng)
