"""Prompt clusters and splits: whole clusters go to one side, and no original text is on two sides.

Why: prompts shared by train and test let a model look its answers up. Several public scores of .78 came from that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from promptrec.errors import InputError

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.75, 0.1, 0.15)
SAME_PROMPT = 0.9  # MiniLM cosine from which two prompts count as the same request


def clusters_of(prompts: Sequence[str]) -> np.ndarray:
    """Cluster number of each prompt, [n]: by MiniLM, whatever scores, because the threshold is a MiniLM cosine."""
    from promptrec.scoring import get_scorer

    places, distinct = pd.factorize(np.asarray(list(prompts), dtype=object))  # many rows may share a prompt
    return cluster_prompts(get_scorer("minilm").encode(distinct.tolist()))[places]


def wordings_of(prompts: Sequence[str], others: Iterable[str]) -> np.ndarray:
    """Which of the prompts, [n], are a wording of one of the others, by MiniLM."""
    from promptrec.scoring import get_scorer

    minilm, others = get_scorer("minilm"), sorted(set(others))
    if not others:
        return np.zeros(len(prompts), bool)
    return (minilm.encode(list(prompts)) @ minilm.encode(others).T).max(1) >= SAME_PROMPT


def cluster_prompts(embeddings: np.ndarray, threshold: float = SAME_PROMPT, block: int = 2048) -> np.ndarray:
    """Cluster number of each unit vector [n, d]: connected components of "cosine at least `threshold`".

    Two prompts in different clusters are therefore always farther apart than the threshold. Shape [n], numbered
    by first appearance.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    vectors = np.asarray(embeddings, dtype=np.float32)
    rows, columns = [], []
    for start in range(0, len(vectors), block):
        near = np.argwhere(vectors[start : start + block] @ vectors.T >= threshold)
        rows.append(near[:, 0] + start)
        columns.append(near[:, 1])
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(vectors),) * 2)
    return pd.factorize(connected_components(graph, directed=False)[1])[0]


def hash_split(key: str, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> str:
    """A split drawn from the text itself: the same on every machine, whatever else is in the table."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[int(np.searchsorted(np.cumsum(fractions)[:-1], position, side="right"))]


def split_clusters(
    prompts: Sequence[str],
    clusters: np.ndarray,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    fixed: dict[str, str] | None = None,
) -> list[str]:
    """Split of each prompt, by cluster: that of its alphabetically first prompt, or one that `fixed` demands.

    `fixed` maps prompts whose split is decided already (the shipped triples) to it; a cluster with such a prompt
    follows it, and one with several follows the most held-out (test before validation before train).
    """
    frame = pd.DataFrame({"prompt": list(prompts), "cluster": clusters})
    chosen = {}
    for cluster, members in frame.groupby("cluster")["prompt"]:
        demanded = [fixed[prompt] for prompt in members if fixed and prompt in fixed]
        chosen[cluster] = max(demanded, key=SPLITS.index) if demanded else hash_split(min(members), fractions, seed)
    return [chosen[cluster] for cluster in clusters]


def split_components(
    table: pd.DataFrame, fractions: Sequence[float] = FRACTIONS, seed: int = 0, fixed: pd.Series | None = None
) -> pd.Series:
    """Split of each row of finished triples such that no prompt cluster and no original is on two sides.

    Rows that share either hang together; each connected component goes to one split as a whole, so nothing has to
    be dropped. Needs columns original_text, prompt_cluster. Use it when the rewriting is done already.
    `fixed` (NaN where open) keeps rows where they are; a component that joins several sides goes to the most held-out.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    originals, clusters = pd.factorize(table["original_text"])[0], pd.factorize(table["prompt_cluster"])[0]
    size = originals.max() + clusters.max() + 2
    edges = coo_matrix((np.ones(len(table)), (originals, clusters + originals.max() + 1)), shape=(size, size))
    labels = pd.Series(connected_components(edges, directed=False)[1][originals], index=table.index)
    sides = {
        label: hash_split(name, fractions, seed) for label, name in table["original_text"].groupby(labels).min().items()
    }
    if fixed is not None:
        held_out = fixed.dropna().map(SPLITS.index).groupby(labels).max()
        sides |= {label: SPLITS[side] for label, side in held_out.items()}
    return labels.map(sides)


def drop_mixed(table: pd.DataFrame, original_split: pd.Series, prompt_split: pd.Series) -> pd.DataFrame:
    """Rows whose original and prompt fall on the same side, with that `split`; the others are left out."""
    agree = original_split == prompt_split
    return table[agree].assign(split=prompt_split[agree])


def check_split(table: pd.DataFrame) -> pd.DataFrame:
    """Raise InputError unless every prompt cluster and every original lies in one split only; returns the table."""
    for column in ("prompt_cluster", "split"):
        if table[column].isna().any():
            raise InputError(f"split: {int(table[column].isna().sum())} rows have no {column}; split the table again")
    if len(odd := sorted(set(table["split"].astype(str)) - set(SPLITS))):
        raise InputError(f"split: {odd[0]!r} is none of {', '.join(SPLITS)}; name the splits so")
    for column in ("prompt_cluster", "original_text", "rewrite_prompt"):
        sides = table.groupby(column)["split"].nunique()
        if (sides > 1).any():
            name = str(sides.index[sides > 1][0])[:60]
            raise InputError(f"split: {column} {name!r} lies in {sides.max()} splits; split by prompt cluster first")
    return table
