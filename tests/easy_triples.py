"""Triples in which the rewrite gives the prompt away: what any method that learns should learn."""

import numpy as np
import pandas as pd

STYLES = {
    "Rewrite it as a pirate would say it": "ahoy matey arr",
    "Turn the words into a royal decree": "hear ye hereby decreed",
    "Make a weather forecast out of this": "sunny showers tonight",
    "Summarise the passage for small children": "once little bunny",
}


def easy(rows: int, seed: int) -> pd.DataFrame:
    """Triples in which the rewrite's added words give the prompt away."""
    rng = np.random.default_rng(seed)
    vocabulary = ["ferry", "harbour", "bread", "letter", "garden", "engine", "sister", "winter", "window", "market"]
    prompts = rng.choice(list(STYLES), size=rows)
    originals = [" ".join(rng.choice(vocabulary, size=6)) for _ in range(rows)]
    rewritten = [f"{STYLES[prompt]} {text}" for text, prompt in zip(originals, prompts, strict=True)]
    return pd.DataFrame({"original_text": originals, "rewrite_prompt": prompts, "rewritten_text": rewritten})
