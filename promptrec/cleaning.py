"""Which triples are worth training on: lead-ins off; refusals, unchanged, blank, extreme and near-duplicate rows out.

Source: what the third-place team and the ancestor of this series report dropping (see the book's references).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd
from rapidfuzz import fuzz

_OPENER = (
    r"(?:sure|certainly|of\ course|okay|ok|absolutely|gladly|alright|no\ problem|with\ pleasure|happy\ to\ help)\b"
)
_HERE = r"(?:here(?:['’]s|\ is|\ are|\ you\ go|\ we\ go|\ goes)|below\ (?:is|are)|i(?:['’]ve|\ have|\ can|['’]ll)\b|let\ me)"
_MADE = r"(?:rewrit|rewrote|revised\b|reworded|rephrased|paraphras)"
_END = r"[:.!]?\**[^\S\n]*(?:\n\s*|\Z)"  # of the line
LEAD_IN = re.compile(
    rf"""\A\s*(?:
        [\*\#\ ]*{_OPENER}[^\n]{{0,60}}?{_HERE}[^\n]{{0,300}}?:\**[^\S\n]*\n\s*      # Sure, here is ...: (line end)
      | [\*\#\ ]*{_OPENER}[^\n]{{0,60}}?{_HERE}[^\n:]{{0,300}}:\**\ +(?=\S)          # Sure, here is ...: text
      | [\*\#\ ]*{_OPENER}[^\n]{{0,60}}?{_HERE}[^\n:]{{0,150}}{_END}                 # Sure, I can do that.
      | [\*\#\ ]*{_OPENER}(?:\ thing)?(?=[,:.!])[,.!]?[^\n:.!]{{0,150}}(?::\**[^\S\n]*\n\s*|[.!]\s*\n\s*\n)  # Okay, a poem:
      | [\*\#\ ]*(?:[^\n.:]{{1,30}}[,!.]\ )?(?:here(?:['’]s|\ is|\ are|\ we\ go|\ goes)|below\ (?:is|are))\b
        [^\n]{{0,250}}?:\**[^\S\n]*\n\s*                                                 # Well, here is ...:
      | (?:this\ is|i(?:['’]ve|\ have))\b[^\n]{{0,60}}?{_MADE}[^\n]{{0,200}}?:[^\S\n]*\n\s*             # I have rewritten ...:
      | (?:\#{{1,4}}\ *|\*\*\ *)[^\n*]{{0,80}}?{_MADE}[^\n*]{{0,80}}\n\s*                               # ## Rewritten text
      | \*\*\ *[^\n*]{{0,80}}?{_MADE}[^\n*]{{0,80}}\*\*:?[^\S\n]*\n\s*                                  # **Rewritten text:**
      | (?:\#{{1,4}}\ *|\*\*\ *)(?:[\w'’-]+\ ){{0,3}}(?:version|text|output|response|answer|result):?(?:\*\*)?:?[^\S\n]*\n\s*
      | \*\*[^\n*]{{0,60}}?\bin\ (?:the|a|an)\ [^\n*:]{{1,40}}\ (?:manner|style|voice|tone):?\*\*:?[^\S\n]*\n\s*
      | \*\*(?!(?-i:[^\na-z]*:))[^\s*]+(?:\ [^\s*]+){{1,11}}(?<!\d):\*\*[^\S\n]*\n\s*\n    # **The rejection, in rhyme:**
        (?!\s*(?:[-*+]|\d+[.)])\s)(?![\s\S]*^\*\*[^*\n]{{1,80}}:\*\*[^\S\n]*$)  # unless it heads a list or is one of several
    )""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_DECLINED = r"(?:help|assist|rewrite|fulfil+|comply|provide|generate|produce|process|create|complete|do)"
_CANNOT = (
    r"(?:i\s+(?:cannot|can['’]t|can\s+not|could\s+not|won['’]t|will\s+not|do\s+not|don['’]t)"
    r"|i(?:\s+am|['’]m)\s+(?:unable|not\s+able)\s+to)"
)
_SORRY = r"(?:(?:i(?:\s+am|['’]m)\s+)?sorry|unfortunately|i\s+apologi[sz]e|my\s+apologies)"
REFUSAL = re.compile(
    rf"^\s*(?:{_CANNOT}\s+{_DECLINED}\s+(?:you|with|this|that|the|your|any|a|an|content)\b"
    rf"|{_SORRY}[^\n.!?]{{0,60}}[.,]?\s*(?:but\s+|as\s+)?{_CANNOT}\b"
    r"|as an ai\b"
    r"|(?:sorry, but )?the (?:provided |given )?(?:text|passage|prompt)(?: (?:you )?(?:provided|gave))?"
    r" (?:does not|doesn['’]t) (?:contain|provide|include|mention|specify|have))",
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
    given = len(table)
    table = table.dropna(subset=["original_text", "rewrite_prompt", "rewritten_text"])
    missing = given - len(table)
    rewritten = table["rewritten_text"].map(strip_lead_in)
    report = {"lead-in stripped": int((rewritten != table["rewritten_text"].str.strip()).sum())}
    table = table.assign(rewritten_text=rewritten, rewrite_prompt=table["rewrite_prompt"].str.strip())
    for rule, broken in _rules(settings).items():
        drop = broken(table)
        report[rule] = int(drop.sum())
        table = table[~drop]
    report["blank"] += missing
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
