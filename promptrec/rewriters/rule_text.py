"""Plain-text tools of the rule-based stand-in: sentences, names, word exchange. No style lives here.

Everything is deterministic: chance comes from the random.Random that the caller hands in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from promptrec.rewriters.rule_words import common_words, word_pairs, word_set

SENTENCE_END = re.compile(r"[.!?…]+[\"”’')\]]*\s+(?=[\"“‘'(\[]?[A-Z0-9])")
CLOSING = re.compile(r"[.!?…,;:]*[\"”’')\]]*$")
SPEAKER = re.compile(r"[A-Z][\w.']*(?: [A-Z][\w.']*){0,2}: (?=\S)")
CAPITALISED = re.compile(r"[A-Z][\w’'-]*[a-z](?: (?:of |de |van )?[A-Z][\w’'-]*[a-z])*")
MARKER = re.compile(r"\s*(?:[-*•]|\d{1,2}[.)])\s+")
HOLE = re.compile(r"\{(\w+)\}")


# --- sentences ----------------------------------------------------------------------------------------------


@dataclass
class Passage:
    """A text as lines of sentences; `gaps` are the line breaks between the lines."""

    lines: list[list[str]]
    gaps: list[str]

    @classmethod
    def of(cls, text: str) -> Passage:
        parts = re.split(r"(\s*\n\s*)", text.strip())
        return cls([sentences(line) for line in parts[::2]], [re.sub(r"[^\n]", "", gap) for gap in parts[1::2]])

    def map(self, change: Callable[[str], str]) -> Passage:
        """The same layout with every sentence changed; a sentence changed to nothing is dropped."""
        return Passage([[new for old in line if (new := change(old))] for line in self.lines], self.gaps)

    def text(self) -> str:
        lines = [" ".join(line) for line in self.lines]
        return "".join(line + gap for line, gap in zip(lines, [*self.gaps, ""], strict=True))

    def flat(self) -> list[str]:
        """All sentences in order, without list markers."""
        return [MARKER.sub("", s, count=1) if MARKER.match(s) else s for line in self.lines for s in line if s.strip()]


def sentences(line: str) -> list[str]:
    """Split a line after . ! ? where a capital or a number follows; "Mr. Smith" and "J. Smith" stay whole."""
    found, start = [], 0
    for end in SENTENCE_END.finditer(line):
        last = re.split(r"[\s(\"“]", line[start : end.start()])[-1]
        if end[0].startswith(".") and (
            last.lower() in word_set("abbreviations") or re.fullmatch(r"[A-Z]|\d{1,2}", last)
        ):
            continue
        found.append(line[start : end.end()].strip())
        start = end.end()
    return [sentence for sentence in [*found, line[start:].strip()] if sentence]


def split_end(sentence: str) -> tuple[str, str]:
    """("It rained", ".") - the sentence without and its closing punctuation."""
    end = CLOSING.search(sentence)
    return (sentence[: end.start()], end[0]) if end and end.start() else (sentence, "")


def bare(sentence: str) -> str:
    """The sentence without its final full stop (other marks stay: they carry meaning)."""
    return sentence.rstrip().rstrip(".,;:") or sentence


def finish(sentence: str) -> str:
    """The sentence with a full stop where it had no final mark."""
    return sentence if re.search(r"[.!?…][\"”’')\]]*$", sentence) else sentence.rstrip(",;:") + "."


def lower_first(sentence: str) -> str:
    """Lower the first letter unless the first word is a name, "I" or an abbreviation."""
    first = re.match(r"[A-Za-z’']+", sentence)
    if first and first[0].lower() in common_words() and not re.match(r"I\b|[A-Z]{2}", sentence):
        return sentence[0].lower() + sentence[1:]
    return sentence


def raise_first(sentence: str) -> str:
    """Raise the first letter, also behind quotation marks and brackets."""
    return re.sub(r"^([\"“‘'(\[]*)([a-zà-ÿ])", lambda m: m[1] + m[2].upper(), sentence)


# --- names and topics ---------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Capitalised names in order of appearance, each once: ["Marta Odell", "Duluth"]."""
    found: dict[str, None] = {}
    for match in CAPITALISED.finditer(text):
        words = match[0].split()
        if _starts_sentence(text, match.start()):
            while words and _is_common(words[0]):
                words.pop(0)
        if words and not (len(words) == 1 and (_is_common(words[0]) or words[0].lower() in word_set("dates"))):
            found[" ".join(words)] = None
    return list(found)


def topics(text: str, n: int) -> list[str]:
    """The n things that a text seems to be about: its names, then its longest uncommon words."""
    found = [name for name in names(text) if name.lower() not in word_set("dates")]
    words = dict.fromkeys(w for w in re.findall(r"\b[a-z]{4,}\b", text) if _may_be_noun(w))
    longest = sorted(words, key=len, reverse=True)[: max(0, n - len(found))]
    return (found + [word for word in words if word in longest])[:n] or re.findall(r"\w+", text)[:n] or ["it"]


def _is_common(word: str) -> bool:
    return re.split("['’]", word.lower())[0] in common_words()


def _may_be_noun(word: str) -> bool:
    return word not in common_words() and not word.endswith(("ed", "ing", "ly"))


def _starts_sentence(text: str, position: int) -> bool:
    before = text[:position].rstrip(" \"“‘'([")
    return not before or before[-1] in ".!?\n…:" or bool(re.search(r"\n\s*[-*•]?\s*$", text[:position]))


# --- word exchange ------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _exchange(table: str) -> tuple[re.Pattern[str], dict[str, list[str]]]:
    pairs = dict(word_pairs(table))
    longest_first = sorted(pairs, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b(?!['’]\w)", re.IGNORECASE), pairs


def swap(text: str, table: str, rng: Random, values: dict[str, str] | None = None) -> str:
    """Exchange words as `table` ("a/b=c|d") says; case is carried over.

    Words with a capital inside a sentence are names and stay, and so do titles in front of a name.
    """
    pattern, pairs = _exchange(table)

    def change(match: re.Match[str]) -> str:
        word = match[0]
        starts = _starts_sentence(text, match.start())
        titled = word.lower() not in word_set("skip") and re.match(r" [A-Z]", text[match.end() : match.end() + 2])
        if word[0].isupper() and (titled or not starts) and word != "I" and not word.isupper():
            return word
        new = fill(rng.choice(pairs[word.lower()]), values or {})
        return raise_first(new) if starts and word[0].isupper() else new

    text = pattern.sub(change, text)
    return fix_articles(re.sub(r",(?=\s*[,.;:!?])", "", text))  # "said, bless them," at the end of a sentence


def fill(template: str, values: dict[str, str]) -> str:
    """Put the values into the {holes} of a template; unknown holes stay."""
    return HOLE.sub(lambda hole: values.get(hole[1], hole[0]), template)


def describe(text: str, adjective: Callable[[str], str | None], rng: Random, rate: float) -> str:
    """Put `adjective(noun)` behind the, a, his ... with probability `rate`; None leaves a noun as it is."""

    def change(match: re.Match[str]) -> str:
        noun = match[2]
        skip = noun in word_set("skip") or noun.endswith("ly") or rng.random() >= rate
        new = None if skip else adjective(noun)
        return f"{match[1]} {new} {noun}" if new else match[0]

    determiner = r"(?i:the|an?|his|her|their|my|our|your|its|this|that|some)"
    return fix_articles(re.sub(rf"\b({determiner}) ([a-z][a-z-]{{2,}})\b", change, text))


def fix_articles(text: str) -> str:
    """a otter -> an otter, an cat -> a cat; only before lower-case words, whose sound is safe to guess."""

    def change(match: re.Match[str]) -> str:
        article, word = match[1], match[2]
        vowel = word[0] in "aeiou" and not re.match(r"uni|use|usu|eu|one\b|once|ubi|uter", word)
        vowel = vowel or bool(re.match(r"hour|honest|honou?r|heir", word))
        return article[0] + ("n " if vowel else " ") + word

    return re.sub(r"\b([Aa]n?) (?=[a-z])([a-z]+)", change, text)


def deck(items: list, rng: Random) -> Iterator:
    """The items in random order, shuffled again when all are used: variety without early repeats."""
    while items:
        yield from rng.sample(items, len(items))
