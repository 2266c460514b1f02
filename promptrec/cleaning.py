"""Which triples are worth training on: lead-ins off; refusals, unchanged, blank, extreme and near-duplicate rows out.

Source: what the third-place team and the ancestor of this series report dropping (see the book's references).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd
from rapidfuzz import fuzz

LEAD_IN = re.compile(
    r"""^\s*(?:
        (?:sure|certainly|of\ course|okay|ok|absolutely|gladly|alright)\b[^\n]{0,200}?[:.!]\s*\n+   # Sure, here is ...:
      | (?:here(?:'s|\ is|\ are)|below\ is|this\ is|i(?:'ve|\ have)\ (?:rewritten|turned|made))\b[^\n]{0,200}?:\s*\n+  # Here is ...:
      | \#{1,4}\ *[^\n]{0,80}?(?:rewrit|version|revis|text|result|output|answer)[^\n]{0,60}\n+          # ## Rewritten text
      | \*\*\ *[^\n*]{0,80}?(?:rewrit|version|revis|text|result|output|answer)[^\n*]{0,60}\*\*:?\s*\n+   # **Rewritten text:**
    )""",
    re.IGNORECASE | re.VERBOSE,
)
REFUSAL = re.compile(
    r"^\s*(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|can not|apologi[sz]e)|sorry, (?:but )?i|as an ai\b"
    r"|the (?:text|passage) (?:you )?(?:provided|gave)?\s*does not|unfortunately,? i)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CleaningSettings:
    """When a row is dropped. Lengths in words, similarities in percent (rapidfuzz)."""

    shortest_rewrite: int = 3
    longest_rewrite: int = 600
    unchanged: float = 95.0  # rewrite this similar to its original: nothing was done
    duplicate: float = 95.0  # two rewrites of one original this similar: keep the first
    shortest_prompt: int = 2
    longest_prompt: int = 80


def strip_lead_in(text: str) -> str:
    """The text without a chat model's opening ("Sure, here is ...:", "**Rewritten text:**"), which leaks the prompt.

    Nothing is stripped when nothing would be left.
    """
    stripped = text
    for _ in range(2):  # "Sure, here is ...:" is often followed by "**Rewritten text:**"
        shorter = LEAD_IN.sub("", stripped, count=1)
        if not shorter.strip():
            break
        stripped = shorter
    return stripped.strip()


def is_refusal(text: str) -> bool:
    """Whether a model declined instead of rewriting."""
    return REFUSAL.match(text) is not None


def is_nonsense(text: str) -> bool:
    """Whether a rewrite is not prose: hardly any letters, or the same few words over and over."""
    words = text.lower().split()
    letters = sum(character.isalpha() for character in text)
    return letters < len(text) / 3 or (len(words) >= 30 and len(set(words)) < len(words) / 6)


def clean(table: pd.DataFrame, settings: CleaningSettings | None = None) -> tuple[pd.DataFrame, pd.Series]:
    """Cleaned triples, and how many rows each rule dropped (plus how many lead-ins were stripped).

    Rules are applied in the order of the report; a row is counted under the first one that drops it.
    """
    settings = settings or CleaningSettings()
    table = table.dropna(subset=["original_text", "rewrite_prompt", "rewritten_text"])
    rewritten = table["rewritten_text"].map(strip_lead_in)
    report = {"lead-in stripped": int((rewritten != table["rewritten_text"].str.strip()).sum())}
    table = table.assign(rewritten_text=rewritten, rewrite_prompt=table["rewrite_prompt"].str.strip())
    for rule, broken in _rules(settings).items():
        drop = broken(table)
        report[rule] = int(drop.sum())
        table = table[~drop]
    return table.reset_index(drop=True), pd.Series(report, name="rows")


def _rules(settings: CleaningSettings) -> dict:
    """Name of a rule -> function(table) giving the rows it drops (Boolean series)."""

    def words(column):
        return column.str.split().str.len()

    return {
        "blank": lambda t: t["rewritten_text"].str.strip().eq("") | t["rewrite_prompt"].eq(""),
        "refusal": lambda t: t["rewritten_text"].map(is_refusal).astype(bool),
        "nonsense": lambda t: t["rewritten_text"].map(is_nonsense).astype(bool),
        "length": lambda t: (
            ~(
                words(t["rewritten_text"]).between(settings.shortest_rewrite, settings.longest_rewrite)
                & words(t["rewrite_prompt"]).between(settings.shortest_prompt, settings.longest_prompt)
            )
        ),
        "unchanged": lambda t: _similar(t, settings.unchanged),
        "near-duplicate": lambda t: _duplicates(t, settings.duplicate),
    }


def _similar(table: pd.DataFrame, limit: float) -> pd.Series:
    pairs = zip(table["original_text"], table["rewritten_text"], strict=True)
    return pd.Series([fuzz.ratio(a, b) >= limit for a, b in pairs], index=table.index, dtype=bool)


def _duplicates(table: pd.DataFrame, limit: float) -> pd.Series:
    """Rows whose rewrite nearly repeats an earlier rewrite of the same original."""
    drop = pd.Series(False, index=table.index)
    for _, group in table.groupby("original_text", sort=False):
        kept: list[str] = []
        for row, text in group["rewritten_text"].items():
            if any(fuzz.ratio(text, other, score_cutoff=limit) >= limit for other in kept):
                drop[row] = True
            else:
                kept.append(text)
    return drop
