"""Recompute what is derived in promptrec/assets: prompt clusters and the fixed splits. Run it after adding text.

    python scripts/refresh_assets.py

originals.csv (id, kind, text) gets `split`; triples.csv gets `prompt_cluster` and, where it has none, `split`: rows keep
the side they have, unless new text links two sides (then both go to the more held-out one). prompts.csv loses any prompt
that is closer than cosine .95 to another one or to a prompt of the triples, or than .9 to a held-out one of those.
Hand-written columns are never changed.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from promptrec.profiles import ASSETS
from promptrec.scoring import get_scorer
from promptrec.splits import SAME_PROMPT, check_split, cluster_prompts, hash_split, split_components
from promptrec.tables import read_table, write_table

TOO_CLOSE = 0.95


def first_of_near(vectors: np.ndarray, limit: float = TOO_CLOSE) -> np.ndarray:
    """Which rows of unit vectors [n, d] to keep so that no two kept ones are closer than `limit`; earlier rows win."""
    keep = np.ones(len(vectors), dtype=bool)
    for row in range(1, len(vectors)):
        earlier = vectors[:row][keep[:row]]
        keep[row] = not len(earlier) or (earlier @ vectors[row]).max() < limit
    return keep


def main() -> None:
    scorer = get_scorer("minilm")
    triples = read_table(ASSETS / "triples.csv").drop_duplicates("rewrite_prompt", ignore_index=True)
    vectors = scorer.encode(triples["rewrite_prompt"].tolist())
    kept = first_of_near(vectors)
    triples, vectors = triples[kept].reset_index(drop=True), vectors[kept]
    triples["prompt_cluster"] = cluster_prompts(vectors)
    triples["split"] = split_components(triples, fixed=triples.get("split"))
    check_split(triples)

    prompts = read_table(ASSETS / "prompts.csv")
    theirs = scorer.encode(prompts["rewrite_prompt"].tolist())
    kept = first_of_near(np.concatenate([vectors, theirs]))[len(vectors) :]
    held_out = vectors[(triples["split"] != "train").to_numpy()]
    prompts = prompts[kept & ((theirs @ held_out.T).max(1) < SAME_PROMPT)]

    originals = read_table(ASSETS / "originals.csv")
    sides = dict(zip(triples["original_text"], triples["split"], strict=True))
    originals["split"] = [sides.get(text) or hash_split(text) for text in originals["text"]]

    for table, name in ((triples, "triples"), (prompts, "prompts"), (originals, "originals")):
        write_table(pd.DataFrame(table), ASSETS / f"{name}.csv")
        print(name, len(table), table["split"].value_counts().to_dict() if "split" in table else "")


if __name__ == "__main__":
    main()
