"""The styles that are all layout: lists, lines, speakers, headings. Every sentence stays in its place.

Each function takes (text, slots, rng) and returns the rewritten text; its phrases are in assets/lexicon.yaml.
"""

from __future__ import annotations

import re
from itertools import cycle
from random import Random

from promptrec.rewriters.rule_text import (
    SPEAKER,
    Passage,
    bare,
    deck,
    fill,
    finish,
    lower_first,
    raise_first,
    swap,
    topics,
)
from promptrec.rewriters.rule_voices import FRAME_RATE, dress, with_lead, wrap
from promptrec.rewriters.rule_words import lexicon, phrases, word_set

Slots = dict[str, str]


def _maybe(lines: list[str], line: str, rng: Random, front: bool = False) -> list[str]:
    """Headings and closings are there most of the time, not always: a form must be known by its body."""
    if rng.random() >= FRAME_RATE:
        return lines
    return [line, *lines] if front else [*lines, line]


def _topic(text: str, rng: Random) -> str:
    topic = rng.choice(topics(text, 3))
    return topic if topic[0].isupper() else topic.title()


def telegram(text: str, slots: Slots, rng: Random) -> str:
    """Capitals, no small words, STOP for every full stop."""
    parts = []
    for sentence in Passage.of(text).flat():
        words = re.findall(r"[\w’'%-]+(?:[.,:/]\d+)*", sentence)
        kept = [word for word in words if word.lower() not in word_set("small_words")]
        parts.append(" ".join(kept or words).upper() + " STOP")
    parts = _maybe(parts, rng.choice(phrases()["telegram_openings"]), rng, front=True)
    return " ".join(_maybe(parts, rng.choice(phrases()["telegram_closings"]), rng))


def bullets(text: str, slots: Slots, rng: Random) -> str:
    """One bullet a sentence, without full stop, most of them behind a bold keyword as chat models like it."""
    mark, lines = rng.choice(["- ", "* ", "• "]), []
    for sentence in Passage.of(text).flat():
        label = f"**{raise_first(topics(sentence, 1)[0])}:** " if rng.random() < 0.85 else ""
        lines.append(mark + label + raise_first(bare(sentence)))
    return "\n".join(_maybe(lines, f"**{rng.choice(phrases()['bullet_headings'])}**", rng, front=True))


def headline(text: str, slots: Slots, rng: Random) -> str:
    """Title case without articles and auxiliaries: the first sentence on top, the others under it."""
    lines = []
    for sentence in Passage.of(text).flat():
        words = [
            word for word in bare(sentence).split() if word.lower() not in word_set("not_in_titles")
        ] or sentence.split()
        titled = [
            w if i and w.lower() in word_set("title_small") else w[:1].upper() + w[1:] for i, w in enumerate(words)
        ]
        lines.append(" ".join(titled))
    top = lines[0].upper() if rng.random() < 0.5 else lines[0]
    if rng.random() < 0.5:
        top = rng.choice(phrases()["headline_kickers"]) + top
    return "\n".join([top, *lines[1:]])


def recipe(text: str, slots: Slots, rng: Random) -> str:
    """What the text is about as ingredients, its sentences as the method."""
    things, leads = topics(text, 5), deck(phrases()["recipe_leads"], rng)
    measures = deck(phrases()["recipe_measures"], rng)
    lines = [fill(rng.choice(phrases()["recipe_titles"]), {"name": _topic(text, rng)}), "", "Ingredients:"]
    lines += [f"- {next(measures)} {thing}" for thing in things] + [
        "",
        rng.choice(["Method:", "Preparation:"]),
    ]
    steps = Passage.of(text).flat()
    lines += [f"{n}. {next(leads)}{lower_first(finish(step))}" for n, step in enumerate(steps, 1)]
    return "\n".join(_maybe(lines, rng.choice(phrases()["recipe_closings"]), rng))


def _verse_lines(text: str, longest: int) -> list[str]:
    """Break sentences into lines of at most `longest` words, at commas where that leaves no scraps."""
    lines = []
    for sentence in Passage.of(text).flat():
        clauses = [""]
        for piece in re.split(r"(?<=[,;:]) ", sentence):
            scrap = len(clauses[-1].split()) < 3 or len(piece.split()) < 3
            clauses = [*clauses[:-1], f"{clauses[-1]} {piece}".strip()] if scrap else [*clauses, piece]
        for words in map(str.split, clauses):
            size = -(-len(words) // -(-len(words) // longest))
            lines += [" ".join(words[i : i + size]) for i in range(0, len(words), size)]
    return lines


def sea_shanty(text: str, slots: Slots, rng: Random) -> str:
    """Lines of song with a call after every second one; the refrain stays the same."""
    calls = cycle(refrain := rng.choice(phrases()["shanty_refrains"]))
    lines = [f"Oh, {lower_first(line)}" if n % 4 == 0 else line for n, line in enumerate(_verse_lines(text, 9))]
    song = []
    for n in range(0, len(lines), 2):
        song += [*lines[n : n + 2], next(calls)]
        if n % 4 == 2:
            song.append("")
    song += [*([""] if song[-1] else []), *refrain]
    return "\n".join(_maybe(song, rng.choice(phrases()["shanty_closings"]), rng))


def _groups(items: list[str], most: int) -> list[list[str]]:
    """Neighbours together, in at most `most` groups of about the same size."""
    count = min(most, len(items))
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def faq(text: str, slots: Slots, rng: Random) -> str:
    """Questions and answers; every answer is made of sentences of the text."""
    questions = deck(phrases()["faq_questions"], rng)
    ask, answer = rng.choice([("Q: ", "A: "), ("Question: ", "Answer: "), ("Q. ", "A. ")])
    blocks = [rng.choice(phrases()["faq_titles"])] if rng.random() < FRAME_RATE else []
    for group in _groups(Passage.of(text).flat(), 6):
        reply = " ".join(group)
        question = fill(next(questions), {"name": rng.choice(topics(reply, 2))})
        blocks.append(f"{ask}{question}\n{answer}{raise_first(finish(reply))}")
    return "\n\n".join(blocks)


def _hashtag(name: str) -> str:
    return "#" + "".join(word[:1].upper() + word[1:] for word in re.findall(r"[\w]+", name))


def tweet(text: str, slots: Slots, rng: Random) -> str:
    """Short spellings; words of the text become hashtags where they stand, more of them come at the end."""
    found = topics(text, 5)
    text = swap(text, phrases()["tweet_words"], rng)
    for word in found:
        if " " not in word and rng.random() < 0.7:
            text = re.sub(rf"(?<![#\w]){re.escape(word)}(?![\w’'])", f"#{word}", text, count=1)
    parts = [rng.choice(phrases()["tweet_openings"]) + " ".join(Passage.of(text).flat())]
    parts = _maybe(parts, rng.choice(phrases()["tweet_closings"]), rng)
    tags = [_hashtag(name) for name in found[:3]] + rng.sample(phrases()["tweet_tags"], rng.choice([2, 3]))
    return " ".join([*parts, *dict.fromkeys(tags)])


def steps(text: str, slots: Slots, rng: Random) -> str:
    """Numbered steps with first, next, then."""
    label = rng.choice(["Step {n}: ", "{n}) ", "STEP {n} - ", "Step {n}. "])
    parts, words, lines = Passage.of(text).flat(), deck(phrases()["step_words"][1:], rng), []
    for n, part in enumerate(parts, 1):
        word = "First, " if n == 1 else "Finally, " if n == len(parts) else next(words)
        lines.append(fill(label, {"n": str(n)}) + word + lower_first(finish(part)))
    lines = _maybe(lines, rng.choice(phrases()["step_titles"]) + ":", rng, front=True)
    return "\n".join(_maybe(lines, rng.choice(phrases()["step_closings"]), rng))


def _syllables(word: str) -> int:
    return max(1, len(re.findall(r"[aeiouy]+", word.lower())) - word.lower().endswith("e"))


def haiku(text: str, slots: Slots, rng: Random) -> str:
    """Lines of about 5, 7 and 5 syllables in stanzas of three, no punctuation."""
    words = [w for s in Passage.of(text).flat() for w in re.sub(r"[^\w\s’'%-]", " ", lower_first(s)).split()]
    lines, line, wanted, room = [], [], cycle([5, 7, 5]), 5
    room = next(wanted)
    for word in words:
        line.append(word)
        room -= _syllables(word)
        if room <= 0:
            lines, line, room = [*lines, " ".join(line)], [], next(wanted)
    lines += [" ".join(line)] if line else []
    stanzas = ["\n".join(lines[i : i + 3]) for i in range(0, len(lines), 3)]
    return "\n\n".join(_maybe(stanzas, rng.choice(phrases()["haiku_closings"]), rng))


def couplets(text: str, slots: Slots, rng: Random) -> str:
    """Verse lines; some four sentences at a time are closed by two lines that rhyme."""
    rhymes, sentences = deck(phrases()["couplets"], rng), Passage.of(text).flat()
    stanzas = []
    for group in _groups(sentences, max(1, len(sentences) // 4)):
        lines = [raise_first(line) for line in _verse_lines(" ".join(group), 10)]
        stanzas.append("\n".join([*lines, *next(rhymes)]))
    return "\n\n".join(stanzas)


def dialogue(text: str, slots: Slots, rng: Random) -> str:
    """Two speakers share the sentences; now and then one of them reacts first."""
    speakers, reactions = cycle(rng.choice(phrases()["speakers"])), deck(phrases()["reactions"], rng)
    lines = []
    for n, group in enumerate(_groups(Passage.of(text).flat(), 8)):
        said = " ".join(finish(re.sub(SPEAKER, "", s) if s.isupper() else s) for s in group)
        react = f"{next(reactions)} " if n and rng.random() < 0.6 else ""
        lines.append(f"{next(speakers)}: {react}{raise_first(said)}")
    lines.append(f"{next(speakers)}: {next(reactions)} {rng.choice(phrases()['last_words'])}")
    return "\n".join(lines)


def stage_directions(text: str, slots: Slots, rng: Random) -> str:
    """A narrator speaks; bracketed cues come before and between the sentences."""
    cues, lines = deck(phrases()["scene_cues"], rng), [rng.choice(phrases()["scene_openings"])]
    for group in _groups(Passage.of(text).flat(), 6):
        lines.append(f"NARRATOR {next(cues)} {raise_first(finish(' '.join(group)))}")
        lines += [next(cues)] if rng.random() < 0.4 else []
    return "\n".join([*lines, "", rng.choice(phrases()["scene_closings"])])


def abstract(text: str, slots: Slots, rng: Random) -> str:
    """Background, methods, results, conclusion, in the vocabulary of a paper."""
    entry = lexicon()["abstract"]
    marked = dress(swap(text, entry["words"], rng), entry, slots, rng)
    groups = _groups(Passage.of(marked).flat(), 4)
    last = "Conclusion" if len(groups) > 1 else "Results"
    heads = [*phrases()["abstract_heads"][: len(groups) - 1], last]
    parts = [f"{head}: {raise_first(finish(' '.join(group)))}" for head, group in zip(heads, groups, strict=True)]
    parts = _maybe(parts, rng.choice(phrases()["abstract_closings"]), rng)
    keywords = rng.choice(phrases()["abstract_keywords"]) + ", ".join(topics(text, 3)) + "."
    return rng.choice([" ", "\n"]).join(_maybe(parts, keywords, rng))


def job_advert(text: str, slots: Slots, rng: Random) -> str:
    """The sentences as duties, then what every such advert wants and offers."""
    entry = lexicon()["job_advert"]
    leads = deck(entry["leads"], rng)
    duties = [finish(s) for s in Passage.of(text).flat()]
    duties = [with_lead(s, next(leads)) if n == 0 or rng.random() < 0.5 else s for n, s in enumerate(duties)]
    needs = [f"- {need}" for need in rng.sample(entry["needs"], 2)]
    body = [rng.choice(entry["heads"]), *(f"- {duty}" for duty in duties), "", "Your profile:", *needs, "\n"]
    return wrap("\n".join(body), {**entry, "leads": []}, {"name": _topic(text, rng)}, rng)
