"""The styles that are all vocabulary: `speak` plays whatever assets/lexicon.yaml says about a voice.

Words are exchanged, sentences get a lead ("Arr, ...") or a tag ("..., matey"), asides come between them, and
most texts get an opening and a closing. A few voices need one more step; those have a function of their own.
"""

from __future__ import annotations

import re
from random import Random

from promptrec.rewriters.rule_text import (
    SPEAKER,
    Passage,
    deck,
    describe,
    fill,
    finish,
    lower_first,
    raise_first,
    split_end,
    swap,
    topics,
)
from promptrec.rewriters.rule_words import lexicon, verbs

LEAD_RATE, TAG_RATE, ASIDE_RATE, ADJECTIVE_RATE, FRAME_RATE = 0.35, 0.3, 0.2, 0.35, 0.8
Slots = dict[str, str]


def speak(style: str, text: str, slots: Slots, rng: Random, every: bool = False) -> str:
    """`text` in the voice `style` of the lexicon; with `every`, no sentence goes without a lead or a tag."""
    entry = lexicon()[style]
    values = {**slots, "name": _title(topics(text, 1)[0])}
    if entry.get("words"):
        text = swap(text, entry["words"], rng, values)
    if entry.get("endings"):
        old, new = entry["endings"].split("=")
        text = re.sub(rf"\b([a-z]{{3,}}){old}\b(?!['’])", rf"\1{new}", text)
    if entry.get("adjectives"):
        adjectives = deck(entry["adjectives"], rng)
        text = describe(text, lambda noun: next(adjectives), rng, ADJECTIVE_RATE)
    text = dress(text, entry, values, rng, every)
    return wrap(text, entry, values, rng, sure=any(value not in text for value in slots.values()))


def dress(text: str, entry: dict, values: Slots, rng: Random, every: bool = False) -> str:
    """Leads, tags and asides for the sentences of `text`; the first one gets a lead or a tag for sure."""
    leads, tags, asides = (deck(entry.get(key) or [], rng) for key in ("leads", "tags", "asides"))
    first = True

    def change(sentence: str) -> str:
        nonlocal first
        forced, first = every or first, False
        if forced or (len(sentence.split()) > 2 and not sentence[0].islower()):  # lower case: a verse goes on
            draw = rng.random() * (LEAD_RATE + TAG_RATE if forced else 1)
            if draw < LEAD_RATE:
                sentence = _marked(sentence, leads, tags, values)
            elif draw < LEAD_RATE + TAG_RATE:
                sentence = _marked(sentence, leads, tags, values, prefer_tag=True)
        if rng.random() < ASIDE_RATE and (aside := next(asides, None)):
            sentence = f"{finish(sentence)} {raise_first(fill(aside, values))}"
        return sentence

    return Passage.of(text).map(change).text()


def _marked(sentence: str, leads, tags, values: Slots, prefer_tag: bool = False) -> str:
    """The sentence with the next lead or tag, whichever the voice has."""
    tag = next(tags, None) if prefer_tag else None
    lead = None if tag else next(leads, None)
    tag = tag or (None if lead else next(tags, None))
    if lead:
        return with_lead(sentence, fill(lead, values))
    return with_tag(sentence, fill(tag, values)) if tag else sentence


def with_lead(sentence: str, lead: str) -> str:
    """ "It rained." with "Arr, " -> "Arr, it rained."; the name of a speaker ("MAN: ...") stays in front."""
    speaker = SPEAKER.match(sentence)
    name, said = (speaker[0], sentence[speaker.end() :]) if speaker else ("", sentence)
    if re.match(r"[\"“]", said) or re.match(r"\w*", said)[0].lower() in verbs():
        lead = re.sub(r",? (?:that|how|as|and|but|because|why)$", ":", lead.rstrip()) + " "  # no clause follows
    ends_sentence = lead.rstrip()[-1] in ".!?"
    return name + raise_first(lead) + (raise_first(said) if ends_sentence else lower_first(said))


def with_tag(sentence: str, tag: str) -> str:
    """ "It rained." with ", matey" -> "It rained, matey."."""
    body, end = split_end(sentence)
    return f"{body}{tag}{end}"


def wrap(text: str, entry: dict, values: Slots, rng: Random, sure: bool = False) -> str:
    """An opening in front (with `sure`: always) and a closing behind, most of the time."""
    openings, closings = entry.get("openings") or [], entry.get("closings") or []
    if openings and (rng.random() < FRAME_RATE or sure):
        text = attach(raise_first(fill(rng.choice(openings), values)), text)
    if closings and rng.random() < FRAME_RATE:
        text = attach(text if text[-1].isspace() else finish(text), raise_first(fill(rng.choice(closings), values)))
    return text


def attach(before: str, after: str) -> str:
    """Join two pieces with a space, unless one of them brings its own white space."""
    return before + ("" if before[-1:].isspace() or after[:1].isspace() else " ") + after


def _title(topic: str) -> str:
    return topic if topic[:1].isupper() else topic.title()


# --- voices with one more step ------------------------------------------------------------------------------


def profession(text: str, slots: Slots, rng: Random) -> str:
    """The common ways to say what one is, and the jargon of that trade as further tags."""
    entry = lexicon()["profession"]
    jargon = [f", {phrase}" for phrase in entry["jargon"][slots["profession"]]]
    text = dress(text, {"leads": entry["leads"], "tags": jargon}, slots, rng)
    return wrap(text, entry, slots, rng, sure=slots["profession"] not in text)


def addressee(text: str, slots: Slots, rng: Random) -> str:
    """Spoken to {to}: "my landlord" stays lower-case inside a sentence, every name keeps its capital."""
    return speak("addressee", text, {**slots, "to": slots["name"]}, rng)


def food(text: str, slots: Slots, rng: Random) -> str:
    """The food in every sentence."""
    return speak("food", text, slots, rng, every=True)


def robot(text: str, slots: Slots, rng: Random) -> str:
    """Robots end with full stops: no emotions."""
    return speak("robot", text.replace("!", "."), slots, rng)


def simpler(text: str, slots: Slots, rng: Random) -> str:
    """Easy words, and a new sentence wherever a long one had a joint."""
    joint = re.compile(r"(?:;|,? -|, and|, but|,? because|,? while|, so) (?=\w+ \w+)")

    def cut(sentence: str) -> str:
        pieces = joint.split(sentence) if len(sentence.split()) > 8 else [sentence]
        return " ".join(raise_first(finish(piece) if i < len(pieces) - 1 else piece) for i, piece in enumerate(pieces))

    return speak("simpler", Passage.of(text).map(cut).text(), slots, rng)


def legal(text: str, slots: Slots, rng: Random) -> str:
    """Clauses with numbers in the words of a contract."""
    entry = lexicon()["legal"]
    values = {**slots, "name": topics(text, 1)[0]}
    text = swap(text, entry["words"], rng, values)
    clauses = Passage.of(dress(text, entry, values, rng)).flat()
    style = rng.choice(["{n}. ", "Clause {n}. ", "§ {n} ", "Article {n}: "])
    body = "\n".join(fill(style, {"n": str(n)}) + finish(clause) for n, clause in enumerate(clauses, 1))
    return wrap(body, entry, values, rng)
