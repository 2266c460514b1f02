"""Rewriters: whatever turns (original text, prompt) into a rewritten text, behind one small contract.

`rules.RulesRewriter` is the offline stand-in; `hf` and `keras_gemma` run real models and import their
frameworks themselves, so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Rewriter(Protocol):
    """Anything with a `name` and a batched `rewrite`. The name, and a `seed` where it has one, are written beside every row.

    One that cannot carry out every prompt has a `check(prompts)`, called before the first batch, that raises InputError.
    """

    name: str

    def rewrite(self, originals: list[str], prompts: list[str]) -> list[str]:
        """Rewrite row by row: n originals and n prompts in, n rewritten texts out, in the same order."""
        ...
