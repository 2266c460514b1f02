"""Solved examples for few-shot prompting, chosen for diversity or by similarity to the row that is asked about.

Those drawn at random are inference.pick_shots.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from promptrec.data import slice_texts
from promptrec.errors import InputError
from promptrec.inference import NEEDED, Shot
from promptrec.scoring import get_scorer, unit
from promptrec.splits import clusters_of
from promptrec.text_features import LAST, TextEncoder, text_encoder

LIKENESS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "both": lambda old, new: unit(np.concatenate([old, new], axis=1)),
    "rewritten": lambda old, new: new,
    "change": lambda old, new: unit(new - old),
}  # unit embeddings of the originals and of the rewritten texts, [n, d] each -> what is compared, [n, d] or [n, 2 d]


def shot_pool(train: pd.DataFrame, size: int, words: int, seed: int = 0) -> pd.DataFrame:
    """At most `size` triples that shots are chosen from: drawn at random, one a prompt cluster, texts cut to `words`."""
    drawn = train.drop_duplicates("rewrite_prompt").sample(frac=1, random_state=seed).head(size)
    clusters = clusters_of(drawn["rewrite_prompt"])
    pool = drawn.assign(prompt_cluster=clusters).drop_duplicates("prompt_cluster").reset_index(drop=True)
    return slice_texts(pool, words)


def as_shots(triples: pd.DataFrame) -> list[Shot]:
    """Triples as (original, rewritten, prompt)."""
    return list(triples[[*NEEDED, "rewrite_prompt"]].itertuples(index=False, name=None))


def diverse_shots(pool: pd.DataFrame, count: int, seed: int = 0) -> list[Shot]:
    """The triples whose prompts lie nearest to the centres of a k-means of all prompts, one a centre.

    Source: Zhang et al., Automatic chain of thought prompting, 2022, who choose their examples so.
    """
    vectors = get_scorer("minilm").encode(pool["rewrite_prompt"].tolist())
    means = KMeans(count, n_init=4, random_state=seed).fit(vectors)
    return as_shots(pool.iloc[means.transform(vectors).argmin(0)])


def pair_vectors(pairs: pd.DataFrame, likeness: str, words: int, encoder: TextEncoder) -> np.ndarray:
    """Unit vectors [n, d] of pairs of texts, cut to `words`, whose cosine says how similar two pairs are.

    A pair whose texts the encoder cannot tell apart has no "change": its vector is zero, and no pair is like it.
    """
    if likeness not in LIKENESS:
        raise InputError(f"likeness {likeness!r} is unknown; choose one of {', '.join(LIKENESS)}")
    cut = slice_texts(pairs, words)
    return LIKENESS[likeness](*(unit(encoder.encode(cut[name].tolist())[:, LAST]) for name in NEEDED))


class SimilarShots:
    """For each row of a table the `count` most similar triples of a pool, the best one last, next to the question.

    Source: Liu et al., What makes good in-context examples for GPT-3?, 2021.
    """

    def __init__(
        self, pool: pd.DataFrame, count: int, words: int, likeness: str = "change", encoder: TextEncoder | None = None
    ) -> None:
        self.count, self.words, self.likeness, self.encoder = count, words, likeness, encoder or text_encoder()
        self.vectors, self.solved = self._vectors(pool), as_shots(pool)

    def __call__(self, table: pd.DataFrame) -> list[list[Shot]]:
        nearest = np.argsort(-(self._vectors(table) @ self.vectors.T), axis=1, kind="stable")[:, : self.count]
        return [[self.solved[place] for place in reversed(row)] for row in nearest.tolist()]

    def _vectors(self, pairs: pd.DataFrame) -> np.ndarray:
        return pair_vectors(pairs, self.likeness, self.words, self.encoder)
