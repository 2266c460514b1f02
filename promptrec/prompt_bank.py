"""The prompts of the series: shipped ones, and those that a Mad-Libs grammar makes.

The grammar (assets/grammar.yaml) says for every style how people ask for it. `grammar_prompts` samples from
it, `parse_prompt` reads a prompt back into its styles and slot values, exactly. Prompts written by a language
model are not made here: they come with `shipped_prompts`.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from promptrec.errors import InputError
from promptrec.grammar import ASSETS, Pattern, Style, load_grammar

MIXTURE_SHARE = 0.15
PARTS = ("series", "base")
# What a prompt asks for: (style, slot values), in the order of the wording.
Reading = list[tuple[str, dict[str, str]]]


# --- sampling -----------------------------------------------------------------------------------------------


def grammar_prompts(
    n: int,
    seed: int,
    part: str = "series",
    kinds: list[str] | None = None,
    styles: Sequence[str] = (),
    mixture_share: float = MIXTURE_SHARE,
) -> pd.DataFrame:
    """`n` distinct prompts of the grammar, balanced over the styles, some 15% of them mixtures of two styles.

    Columns: rewrite_prompt, style ("a+b" for a mixture, in the order of the wording), slots (a JSON object),
    taxonomy, kinds (joined by "|", "any" for every kind). `part` is "series" or "base" (wordings kept for
    pre-training); `kinds` keeps the styles that suit at least one of these kinds of text, `styles` those named. The
    same seed gives the same prompts. Raises InputError (a ValueError) for an unknown part or style and when n is out
    of reach.
    """
    singles, mixtures = _sources(part, kinds, styles)
    room = (sum(_room(one) for one in singles), sum(mixture.count for mixture in mixtures))
    if not 0 <= n <= sum(room):
        raise InputError(f"{n} prompts wanted, the grammar can make from 0 to {sum(room)}: ask for fewer")
    rng = random.Random(f"grammar {part} {seed}")
    mixed = min(round(mixture_share * n), room[1])
    mixed = max(mixed, n - room[0])
    rows = []
    for style, share in zip(singles, _shares(n - mixed, [_room(one) for one in singles], rng), strict=True):
        rows += _single_rows(style, share, rng)
    for mixture, share in zip(mixtures, _shares(mixed, [one.count for one in mixtures], rng), strict=True):
        rows += [mixture.row(index) for index in rng.sample(range(mixture.count), share)]
    rng.shuffle(rows)
    return pd.DataFrame(rows, columns=["rewrite_prompt", "style", "slots", "taxonomy", "kinds"])


def grammar_size(part: str = "series", kinds: list[str] | None = None) -> tuple[int, int]:
    """How many distinct prompts the grammar can make: (of a single style, mixtures of two)."""
    singles, mixtures = _sources(part, kinds)
    return sum(_room(one) for one in singles), sum(mixture.count for mixture in mixtures)


def _sources(
    part: str, kinds: list[str] | None, names: Sequence[str] = ()
) -> tuple[list[tuple[Style, str]], list[Mixture]]:
    """The styles, and the ordered pairs of styles, that suit one of `kinds`."""
    grammar = load_grammar()
    if part not in PARTS:
        raise InputError(f"part {part!r} of the grammar: use one of {', '.join(PARTS)}")

    unknown = sorted(set(names) - set(grammar.styles))
    if unknown:
        raise InputError(f"the grammar has no style {unknown[0]!r}; it has {', '.join(grammar.styles)}")

    def suits(own: tuple[str, ...]) -> bool:
        return bool(own) and (kinds is None or "any" in own or bool(set(own) & set(kinds)))

    styles = [style for name, style in grammar.styles.items() if suits(style.kinds) and (not names or name in names)]
    pairs = [(one, two, grammar.mixed_kinds(one, two)) for one, two in itertools.permutations(styles, 2)]
    return [(style, part) for style in styles], [Mixture(one, two, k, part) for one, two, k in pairs if suits(k)]


def _room(single: tuple[Style, str]) -> int:
    style, part = single
    return sum(_framed_count(pattern) for pattern in style.patterns(part))


def _framed_count(pattern: Pattern) -> int:
    return pattern.count * (len(load_grammar().frames) if pattern.is_request else 1)


def _single_rows(single: tuple[Style, str], n: int, rng: random.Random) -> list[tuple]:
    """n prompts of one style, spread evenly over its phrasings."""
    style, part = single
    patterns = style.patterns(part)
    rows = []
    for pattern, share in zip(patterns, _shares(n, [_framed_count(p) for p in patterns], rng), strict=True):
        for index in rng.sample(range(_framed_count(pattern)), share):
            frame, inner = divmod(index, pattern.count)
            text, slots = pattern.fill(inner)
            prompt = _in_frame(load_grammar().frames[frame], text) if pattern.is_request else text
            rows.append((prompt, style.name, json.dumps(slots), style.taxonomy, "|".join(style.kinds)))
    return rows


def _in_frame(frame: str, request: str) -> str:
    return frame.replace("{F}", request[0].upper() + request[1:]).replace("{f}", request)


@dataclass(frozen=True)
class Mixture:
    """Two styles asked for in one prompt, `first` before `second`."""

    first: Style
    second: Style
    kinds: tuple[str, ...]
    part: str

    @cached_property
    def halves(self) -> tuple[list[Pattern], list[Pattern]]:
        """Requests for the first and for the second style; the second speaks of the text as "it"."""
        second = [
            Pattern(p.style, p.text, tuple((h, ("it",) if h == "it" else v) for h, v in p.holes), p.slots, True)
            for p in self.second.requests(self.part)
        ]
        return self.first.requests(self.part), second

    @cached_property
    def count(self) -> int:
        counts = [sum(pattern.count for pattern in half) for half in self.halves]
        return math.prod(counts) * len(load_grammar().templates)

    def row(self, index: int) -> tuple:
        """Mixture number `index` as a row of `grammar_prompts`."""
        templates = load_grammar().templates
        index, template = divmod(index, len(templates))
        filled = []
        for half in self.halves:
            index, inner = divmod(index, sum(pattern.count for pattern in half))
            for pattern in half:
                if inner < pattern.count:
                    filled.append(pattern.fill(inner))
                    break
                inner -= pattern.count
        (one, one_slots), (two, two_slots) = filled
        prompt = templates[template].replace("{A}", one[0].upper() + one[1:]).replace("{a}", one).replace("{b}", two)
        name = f"{self.first.name}+{self.second.name}"
        return prompt, name, json.dumps(one_slots | two_slots), "mixture", "|".join(self.kinds)


def _shares(total: int, room: list[int], rng: random.Random) -> list[int]:
    """Split `total` as evenly as the room allows; who gets one more is drawn by lot."""
    shares = [0] * len(room)
    while total:
        open_places = [i for i, space in enumerate(room) if shares[i] < space]
        if total < len(open_places):
            open_places = rng.sample(open_places, total)
        each = total // len(open_places)
        for i in open_places:
            gift = min(each, room[i] - shares[i])
            shares[i] += gift
            total -= gift
    return shares


# --- reading back -------------------------------------------------------------------------------------------


def parse_prompt(prompt: str) -> Reading:
    """The styles that a prompt asks for with their slot values: [(style, {slot: value})], two for a mixture.

    The inverse of `grammar_prompts`, for both parts. Raises InputError (a ValueError) for any other prompt.
    """
    reading = next(readings(prompt.strip()), None)
    if reading is None:
        raise InputError(
            f"{prompt[:80]!r} is not a prompt of the grammar, the only ones that the offline stand-in can carry out; "
            "take prompts from promptrec.prompt_bank.grammar_prompts or a profile with a language model"
        )
    return reading


def readings(prompt: str) -> Iterator[Reading]:
    """All ways to read a prompt. The grammar is meant to leave at most one; the tests hold it to that."""
    grammar = load_grammar()
    if whole := grammar.wholes.get(prompt):
        yield [whole]
    for frame in grammar.frames:
        for request in _between(prompt, *re.split(r"\{[Ff]\}", frame), raised="{F}" in frame):
            if found := grammar.requests.get(request):
                yield [found]
    for template in grammar.templates:
        head, middle, tail = re.split(r"\{[Aab]\}", template)
        for inner in _between(prompt, head, tail, raised="{A}" in template):
            yield from _split_readings(inner, middle, grammar.requests)


def _between(prompt: str, head: str, tail: str, raised: bool) -> Iterator[str]:
    """What stands between head and tail, its first letter lowered again where the frame had raised it."""
    end = len(prompt) - len(tail)
    if not (prompt.startswith(head) and prompt.endswith(tail) and len(head) < end):
        return
    inner = prompt[len(head) : end]
    if raised and inner[0].isupper():
        yield inner[0].lower() + inner[1:]
    elif not raised:
        yield inner


def _split_readings(inner: str, middle: str, requests: dict[str, tuple[str, dict[str, str]]]) -> Iterator[Reading]:
    start = inner.find(middle)
    while start >= 0:
        one, two = requests.get(inner[:start]), requests.get(inner[start + len(middle) :])
        if one and two:
            yield [one, two]
        start = inner.find(middle, start + 1)


# --- tables -------------------------------------------------------------------------------------------------


def shipped_prompts() -> pd.DataFrame:
    """The prompts that ship with the package: columns rewrite_prompt, taxonomy."""
    path = ASSETS / "prompts.csv"
    if not path.exists():
        raise InputError(f"{path}: not there; the package was installed without its assets, install it again")
    return pd.read_csv(path, usecols=["rewrite_prompt", "taxonomy"], keep_default_na=False)


def prompts_for(kind: str, prompts: pd.DataFrame) -> pd.DataFrame:
    """The rows of `prompts` (column kinds, as `grammar_prompts` gives it) that suit one kind of text.

    A kind that the grammar has never heard of gets the prompts that suit any text. Raises InputError for a
    table without the column.
    """
    if "kinds" not in prompts.columns:
        raise InputError("prompts: the column 'kinds' is missing; use the table that grammar_prompts returns")
    suits = prompts["kinds"].map(lambda kinds: "any" in (own := kinds.split("|")) or kind in own)
    return prompts[suits].reset_index(drop=True)
