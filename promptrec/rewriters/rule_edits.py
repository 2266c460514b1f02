"""The styles that change words and sentences and leave the layout alone: questions, capitals, colours ...

Each function takes (text, slots, rng) and returns the rewritten text.
"""

from __future__ import annotations

import re
from random import Random

from promptrec.rewriters.rule_text import (
    Passage,
    deck,
    describe,
    fill,
    fix_articles,
    lower_first,
    names,
    raise_first,
    split_end,
    swap,
)
from promptrec.rewriters.rule_voices import FRAME_RATE, speak
from promptrec.rewriters.rule_words import lexicon, phrases, plural, word_set

Slots = dict[str, str]


def one_sentence(text: str, slots: Slots, rng: Random) -> str:
    """The main clause of the first sentence, and the names that it leaves out."""
    first = Passage.of(text).flat()[0]
    body, _ = split_end(first)
    short = re.sub(r"[.!?]+(?=\s)", ",", " ".join(body.split()[:30]))
    left_out = [name for name in names(text) if name.lower() not in short.lower()]
    link = ""
    if left_out:
        listed = left_out[0] if len(left_out) == 1 else f"{', '.join(left_out[:-1])} and {left_out[-1]}"
        link = fill(rng.choice(phrases()["summary_links"]), {"names": listed})
    return rng.choice(phrases()["summary_openings"]) + lower_first(short.rstrip(",;: ")) + link + "."


def questions(text: str, slots: Slots, rng: Random) -> str:
    """Every sentence a question: turned round where it has a plain auxiliary, wrapped otherwise."""
    wraps = deck(phrases()["question_wraps"], rng)
    auxiliary = "is|are|was|were|has|had|have|will|would|can|could|must|should|may|might"
    plain = re.compile(rf"((?:The|A|An|His|Her|Their|My) [a-z-]+|He|She|It|They|We|You|I|[A-Z]\w+) ({auxiliary}) (.+)")

    def ask(sentence: str) -> str:
        if sentence.rstrip("\"”’')").endswith("?"):
            return sentence
        body = split_end(sentence)[0]
        if (match := plain.fullmatch(body)) and match[1].lower() not in {
            "there",
            "this",
            "that",
            "what",
            "who",
        }:
            return f"{match[2].capitalize()} {lower_first(match[1])} {match[3]}?"
        return fill(next(wraps), {"s": lower_first(body), "S": raise_first(body)})

    asked = Passage.of(text).map(ask).text()
    return f"{asked} {rng.choice(phrases()['question_closings'])}" if rng.random() < FRAME_RATE else asked


def all_caps(text: str, slots: Slots, rng: Random) -> str:
    """Some of the longer words in capitals, at least one a sentence, and some full stops raised, too."""

    def shout(sentence: str) -> str:
        long = [w for w in re.findall(r"[A-Za-z’']+", sentence) if len(w) > 4]
        chosen = [word for word in long if rng.random() < 0.4] or long[:1] or re.findall(r"[A-Za-z’']{3,}", sentence)
        for word in chosen:
            sentence = re.sub(rf"\b{re.escape(word)}\b", word.upper(), sentence)
        return re.sub(r"\.$", "!", sentence) if rng.random() < 0.5 else sentence

    return Passage.of(text).map(shout).text()


def alliteration(text: str, slots: Slots, rng: Random) -> str:
    """In front of most nouns one or two adjectives that begin with the same letter."""
    skip = word_set("skip")
    words = {letter: deck(items, rng) for letter, items in lexicon()["_alliteration"].items()}

    def add(sentence: str) -> str:
        spots = list(re.finditer(r"\b(?:[Tt]he|[Aa]n?|[Hh]is|[Hh]er|[Mm]y|[Tt]heir|[Oo]ur|[Ii]ts) ([a-z]+)", sentence))
        spots = [spot for spot in spots if spot[1] not in skip]
        spots = spots or list(re.finditer(r"\b()([A-Za-z]{3,})", sentence))[-1:]
        for spot in reversed(spots):
            start = spot.start(1) if spot[1] else spot.start(2)
            letter = sentence[start].lower()
            pair = [next(words[letter]) for _ in range(1 if rng.random() < 0.6 else 2)]
            sentence = sentence[:start] + ", ".join(pair) + " " + sentence[start:]
        return sentence

    return Passage.of(text).map(add).text()


def emojis(text: str, slots: Slots, rng: Random) -> str:
    """Emojis behind the words that have one, commas and every sentence, and a shout here and there."""
    entry = lexicon()["_emojis"]
    generic, shouts = deck(entry["generic"], rng), deck(entry["shouts"], rng)
    known = re.compile(r"\b(" + "|".join(entry["words"]) + r")(s?)\b", re.IGNORECASE)

    def add(sentence: str) -> str:
        sentence = known.sub(lambda m: f"{m[0]} {entry['words'][m[1].lower()]}", sentence)
        sentence = re.sub(r"(?<=\w),(?= )", lambda m: f" {next(generic)},", sentence)
        row = "".join(next(generic) for _ in range(rng.choice([2, 3, 3, 4])))
        shout = f" {next(shouts)}" if rng.random() < 0.45 else ""
        return f"{re.sub(r'[.]$', '!', sentence)} {row}{shout}"

    opening = f"{next(shouts)} " if rng.random() < FRAME_RATE else ""
    return opening + Passage.of(text).map(add).text()


def color(text: str, slots: Slots, rng: Random) -> str:
    """Every colour becomes this one, and things without a colour get it."""
    painted = describe(text, lambda noun: slots["color"], rng, 0.5)
    # a colour word behind the new one would make "purple red sock"
    known = lexicon()["color"]["words"].split("=")[0].replace("/", "|")
    painted = re.sub(rf"\b{re.escape(slots['color'])} (?=(?:{known})\b)", "", painted)
    return speak("color", painted, slots, rng)


def creature(text: str, slots: Slots, rng: Random) -> str:
    """People and animals become this creature; names stay, with the creature behind the first mention."""
    kind = slots["creature"].split(" ", 1)[1]
    people = lexicon()["_people"]
    table = f"{people['one']}={kind}; {people['many']}={plural(kind)}"
    text = swap(text, table, rng)
    for name in people_in(text):
        text = re.sub(rf"\b{re.escape(name)}\b(?! the\b)", f"{name} the {kind}", text, count=1)
    return speak("creature", fix_articles(text), {**slots, "kind": kind}, rng)


def people_in(text: str) -> list[str]:
    """Names that do not look like places, days or titles of things."""
    places = r"\b(?:in|at|from|near|of|off|to|between|through|towards?|the|over|into|outside)\s+$"
    streets = re.compile(r"\b(?:Street|Road|Lane|Avenue|School|Hotel|Bridge|River|Lake|Library|Park|Bay|House)\b")
    found = []
    for name in names(text):
        before = text[: text.index(name)]
        if not (re.search(places, before) or streets.search(name) or name.lower() in word_set("dates")):
            found.append(name)
    return found


AUXILIARY = "is|are|was|were|has|had|have|will|would|can|could|must|should|may|might|did|does"
SUBJECT_VERB_REST = re.compile(rf"((?:[\w’'-]+ ){{1,6}}?)({AUXILIARY}) (.+)")
SUBJECT_PAST_REST = re.compile(
    r"((?:[\w’'-]+ ){1,4}?)([a-z]+ed|[a-z]*(?:ew|ought|aw|ook|ave|ame|ent|old|oke|eft)) (.+)"
)
LAST_PHRASE = re.compile(r"(.+) ((?:in|on|at|with|for|from|to|by|through|after|before|under|over|into|of) .+)")


def yoda(text: str, slots: Slots, rng: Random) -> str:
    """The end of a sentence first: "Closed on Sundays, the bakery was."."""

    def turn(sentence: str) -> str:
        body, end = split_end(sentence)
        if body.startswith(('"', "“", "(")):
            return sentence
        clause, comma, more = body.partition(", ")
        if match := SUBJECT_VERB_REST.fullmatch(clause) or SUBJECT_PAST_REST.fullmatch(clause):
            turned = f"{raise_first(match[3])}, {lower_first(match[1])}{match[2]}"
        elif match := LAST_PHRASE.fullmatch(clause):
            turned = f"{raise_first(match[2])}, {lower_first(match[1])}"
        else:
            turned = clause
        return f"{turned}{comma}{more}{end}"

    return speak("yoda", Passage.of(text).map(turn).text(), slots, rng)
