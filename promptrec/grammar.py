"""assets/grammar.yaml as objects: styles, their phrasings, and every text that a phrasing can become.

Sampling prompts and reading them back is prompt_bank's business.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from promptrec.errors import InputError

ASSETS = Path(__file__).parent / "assets"
HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Pattern:
    """A phrasing with its holes: `count` different texts, numbered from 0."""

    style: str
    text: str
    holes: tuple[tuple[str, tuple[str, ...]], ...]  # (name, values) in order of appearance
    slots: tuple[str, ...]  # which of the holes carry meaning
    is_request: bool  # begins in lower case, takes a frame, may be half of a mixture

    @property
    def count(self) -> int:
        return math.prod(len(values) for _, values in self.holes)

    def fill(self, index: int) -> tuple[str, dict[str, str]]:
        """Text number `index` (mixed radix over the holes) and its slot values."""
        chosen = {}
        for name, values in self.holes:
            index, digit = divmod(index, len(values))
            chosen[name] = values[digit]
        text = HOLE.sub(lambda hole: chosen[hole[1]], self.text)
        return text, {name: chosen[name] for name in self.slots}


@dataclass(frozen=True)
class Style:
    """One way of rewriting and the ways of asking for it; `series` and `base` wordings never meet."""

    name: str
    taxonomy: str
    kinds: tuple[str, ...]
    slots: tuple[str, ...]
    series: tuple[Pattern, ...]
    base: tuple[Pattern, ...]

    def patterns(self, part: str) -> tuple[Pattern, ...]:
        return self.series if part == "series" else self.base

    def requests(self, part: str) -> list[Pattern]:
        return [pattern for pattern in self.patterns(part) if pattern.is_request]


@dataclass(frozen=True)
class Grammar:
    """assets/grammar.yaml, checked: no text can be made by two styles."""

    styles: dict[str, Style]
    kinds: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]
    frames: tuple[str, ...]
    templates: tuple[str, ...]
    pairs: frozenset[frozenset[str]]  # of taxonomies
    alone: frozenset[str]

    def mixed_kinds(self, first: Style, second: Style) -> tuple[str, ...]:
        """The kinds of text that suit both styles; empty when the two do not go together."""
        if self.alone & {first.name, second.name} or frozenset({first.taxonomy, second.taxonomy}) not in self.pairs:
            return ()
        if "any" in first.kinds:
            return second.kinds
        return first.kinds if "any" in second.kinds else tuple(k for k in first.kinds if k in second.kinds)

    @cached_property
    def requests(self) -> dict[str, tuple[str, dict[str, str]]]:
        """Every request, filled in all ways: text -> (style, slot values)."""
        return self._table(is_request=True)

    @cached_property
    def wholes(self) -> dict[str, tuple[str, dict[str, str]]]:
        """Every complete prompt, filled in all ways: text -> (style, slot values)."""
        return self._table(is_request=False)

    def _table(self, is_request: bool) -> dict[str, tuple[str, dict[str, str]]]:
        table: dict[str, tuple[str, dict[str, str]]] = {}
        for style in self.styles.values():
            for pattern in style.series + style.base:
                for index in range(pattern.count if pattern.is_request == is_request else 0):
                    text, slots = pattern.fill(index)
                    if text in table:
                        raise InputError(f"grammar: {table[text][0]} and {style.name} can both say {text!r}")
                    table[text] = (style.name, slots)
        return table


@lru_cache(maxsize=1)
def load_grammar() -> Grammar:
    """Read assets/grammar.yaml (once). Raises InputError where two styles share a wording."""
    raw = yaml.safe_load((ASSETS / "grammar.yaml").read_text(encoding="utf-8"))
    slots = {name: tuple(values) for name, values in raw["slots"].items()}
    fillers = slots | {name: tuple(values) for name, values in raw["words"].items()}

    def pattern(style: str, text: str, wanted: tuple[str, ...]) -> Pattern:
        holes = tuple(dict.fromkeys(HOLE.findall(text)))
        if unknown := set(holes) - set(raw["words"]) - set(wanted):
            raise InputError(f"grammar: style {style} uses the hole {sorted(unknown)} that it does not declare")
        return Pattern(style, text, tuple((hole, fillers[hole]) for hole in holes), wanted, not text[0].isupper())

    styles = {}
    for name, entry in raw["styles"].items():
        wanted = tuple(entry["slots"])
        series, base = (tuple(pattern(name, text, wanted) for text in entry[key]) for key in ("phrasings", "base"))
        styles[name] = Style(name, entry["taxonomy"], tuple(entry["kinds"]), wanted, series, base)
    mixtures = raw["mixtures"]
    return Grammar(
        styles=styles,
        kinds=tuple(raw["kinds"]),
        slots=slots,
        frames=tuple(raw["frames"]),
        templates=tuple(mixtures["templates"]),
        pairs=frozenset(frozenset(pair) for pair in mixtures["pairs"]),
        alone=frozenset(mixtures["alone"]),
    )
