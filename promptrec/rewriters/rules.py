"""The offline stand-in for Gemma: rewrites a text by rules, for every prompt of the grammar.

It is a stand-in. Its rewrites are visible, varied and consistent, so that the series has something to recover
where no language model can run; nothing measured on them says how well a method does on real rewrites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from random import Random

from promptrec.errors import InputError
from promptrec.prompt_bank import load_grammar, parse_prompt
from promptrec.rewriters import rule_edits, rule_forms, rule_grammar, rule_voices

LEAD_IN_SHARE = 0.03
LEAD_INS = (
    "Sure, here is the rewritten text:\n\n",
    "Sure, here's the rewritten text:\n\n",
    "Sure! Here is the text you asked for:\n\n",
    "Here is the rewritten text:\n\n",
    "**Rewritten text:**\n\n",
    "## Rewritten Text\n\n",
)
# A setting changes what the text is about, a form how it is laid out: the one comes first, the other last.
ORDER = ("setting", "edit", "audience", "voice", "tone", "style", "constraint", "form")
Rule = Callable[[str, dict[str, str], Random], str]


@dataclass(frozen=True)
class RulesRewriter:
    """Rewrites by rules. The output depends on (seed, original, prompt) only, not on batch or order."""

    seed: int = 0
    name: str = "rules (stand-in)"

    def check(self, prompts: Iterable[str]) -> None:
        """Raise InputError where a prompt is none that the grammar can make."""
        for prompt in prompts:
            parse_prompt(prompt)

    def rewrite(self, originals: list[str], prompts: list[str]) -> list[str]:
        """One rewritten text per (original, prompt); a few begin with a chat lead-in, as Gemma's do.

        Raises InputError (a ValueError) for lists of different lengths, for a blank original and for a prompt
        that is not of the grammar.
        """
        if len(originals) != len(prompts):
            raise InputError(f"{len(originals)} originals and {len(prompts)} prompts: one prompt a text is needed")
        return [self._rewrite_one(original, prompt) for original, prompt in zip(originals, prompts, strict=True)]

    def _rewrite_one(self, original: str, prompt: str) -> str:
        if not original.strip():
            raise InputError(f"blank original text for the prompt {prompt[:60]!r}: there is nothing to rewrite")
        wanted = parse_prompt(prompt)
        rng = _row_random(self.seed, original, prompt)
        lead_in = rng.choice(LEAD_INS) if rng.random() < LEAD_IN_SHARE else ""
        return lead_in + rewrite_as(original, wanted, rng)


def rewrite_as(original: str, wanted: list[tuple[str, dict[str, str]]], rng: Random) -> str:
    """Apply styles [(name, slot values)] to a text, settings first and forms last."""
    styles = load_grammar().styles
    text = original.strip()
    for style, slots in sorted(wanted, key=lambda one: ORDER.index(styles[one[0]].taxonomy)):
        text = rule_of(style)(text, slots, rng).strip()
    return text


def rule_of(style: str) -> Rule:
    """The rule of a style: a function of that name, or else the voice of that name in the lexicon."""
    for module in (rule_forms, rule_edits, rule_grammar, rule_voices):
        rule = vars(module).get(style)
        if callable(rule) and getattr(rule, "__module__", "") == module.__name__:
            return rule
    return partial(rule_voices.speak, style)


def _row_random(seed: int, original: str, prompt: str) -> Random:
    """A generator of its own for every row: an interrupted run goes on as if nothing had happened."""
    digest = hashlib.sha256("\x1f".join([str(seed), original, prompt]).encode("utf-8")).digest()
    return Random(int.from_bytes(digest[:8], "big"))
