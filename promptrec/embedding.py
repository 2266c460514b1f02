"""Predict the prompt's embedding from the two texts, then retrieve: recovery without a language model.

A ridge regression maps features of (original, rewritten) to the prompt's embedding; the answer is the prompt of a bank
that lies nearest to the predicted vector. No accelerator, a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from promptrec.errors import InputError
from promptrec.inference import check_pairs
from promptrec.scoring import Scorer


def pair_features(original: np.ndarray, rewritten: np.ndarray) -> np.ndarray:
    """Features of unit vectors [n, d] each: both, their difference and their product -> [n, 4 d]."""
    return np.concatenate(
        [original, rewritten, rewritten - original, original * rewritten * np.sqrt(original.shape[1])], axis=1
    )


class RetrievalRecoverer:
    """Ridge regression to the prompt's embedding, answered by the nearest prompt of a bank.

    `bank` defaults to the training prompts. Embeddings are those of the given scorer.
    """

    name = "retrieval"

    def __init__(self, scorer: Scorer, bank: Sequence[str] = (), alpha: float = 3.0) -> None:
        from sklearn.linear_model import Ridge

        self.scorer, self.given_bank = scorer, list(bank)
        self.ridge = Ridge(alpha=alpha)
        self.bank: list[str] = []

    def fit(self, train: pd.DataFrame) -> RetrievalRecoverer:
        """Fit on triples (original_text, rewrite_prompt, rewritten_text)."""
        if train.empty:
            raise InputError("no training triples to fit the retrieval on")
        self.ridge.fit(self._features(train), self.scorer.encode(train["rewrite_prompt"].tolist()))
        self.bank = sorted({*train["rewrite_prompt"], *self.given_bank})
        return self

    def predict_vectors(self, table: pd.DataFrame) -> np.ndarray:
        """Predicted prompt embeddings, unit length, [n, d]."""
        vectors = self.ridge.predict(self._features(table))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The bank's prompt nearest to each predicted vector."""
        if not self.bank:
            raise InputError("the retrieval is not fitted; call fit first")
        check_pairs(table)
        similar = self.predict_vectors(table) @ self.scorer.encode(self.bank).T  # [n, bank]
        return [self.bank[column] for column in similar.argmax(1)]

    def _features(self, table: pd.DataFrame) -> np.ndarray:
        encode = self.scorer.encode
        return pair_features(encode(table["original_text"].tolist()), encode(table["rewritten_text"].tolist()))
