"""Predict the prompt's embedding from the two texts, then say it: recovery without a language model.

Two ways. RetrievalRecoverer is the floor: a ridge regression and the nearest prompt of a bank. EmbeddingRecoverer is the
best that runs without an accelerator: heads trained on cos^3 predict a vector and a posterior over the bank, and a
decoding turns them into a string (decoding.py). Fitted once for a training set, then read from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from promptrec.cache import cache_folder, digest, fingerprint, keep_last_used, read_arrays, save_arrays
from promptrec.data import TEXT_COLUMNS, check_cells
from promptrec.decoding import DecodingSettings, improve, join_prompts
from promptrec.errors import InputError
from promptrec.inference import check_pairs
from promptrec.predictor import Posterior, PredictorSettings, PromptPredictor, blend
from promptrec.profiles import override
from promptrec.scoring import MiniLMScorer, Scorer, encode_candidates, get_scorer, unit
from promptrec.splits import clusters_of
from promptrec.text_features import LAST, PairFeatures, TextEncoder, text_encoder

if TYPE_CHECKING:
    from promptrec.methods import Task

VERSION = 6  # of what is cached: count up when features or training change
FITS_KEPT = 16  # of 50 to 110 MB each


def pair_features(original: np.ndarray, rewritten: np.ndarray) -> np.ndarray:
    """Features of unit vectors [n, d] each: both, their difference and their product -> [n, 4 d]."""
    return np.concatenate(
        [original, rewritten, rewritten - original, original * rewritten * np.sqrt(original.shape[1])], axis=1
    )


class RetrievalRecoverer:
    """Ridge regression to the prompt's embedding, answered by the nearest prompt of a bank.

    `bank` defaults to the training prompts. Prompts are embedded by the given scorer, the two texts by MiniLM.
    """

    name = "retrieval"

    def __init__(
        self, scorer: Scorer, bank: Sequence[str] = (), alpha: float = 3.0, encoder: TextEncoder | None = None
    ) -> None:
        from sklearn.linear_model import Ridge

        self.scorer, self.given_bank, self.encoder = scorer, list(bank), encoder or text_encoder()
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
        return unit(self.ridge.predict(self._features(table)))

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The bank's prompt nearest to each predicted vector."""
        if not self.bank:
            raise InputError("the retrieval is not fitted; call fit first")
        check_pairs(table)
        similar = self.predict_vectors(table) @ self.scorer.encode(self.bank).T  # [n, bank]
        return [self.bank[column] for column in similar.argmax(1)]

    def _features(self, table: pd.DataFrame) -> np.ndarray:
        texts = (table[column].tolist() for column in ("original_text", "rewritten_text"))
        return pair_features(*(unit(self.encoder.encode(column)[:, LAST]) for column in texts))


class EmbeddingRecoverer:
    """Predicts a posterior over the bank's prompts and decodes it to a string.

    `bank` adds prompts to those of the training triples. A table's column `prediction`, where there is one, holds
    another method's answers: they join the candidates, and they and prompts like them are believed more (see
    predictor.blend).
    """

    name = "embedding"

    def __init__(
        self,
        scorer: Scorer,
        bank: Sequence[str] = (),
        settings: PredictorSettings | None = None,
        decoding: DecodingSettings | None = None,
        answer_trust: float = 4.0,
        encoder: TextEncoder | None = None,
    ) -> None:
        self.scorer, self.given_bank, self.answer_trust = scorer, list(bank), answer_trust
        self.settings, self.decoding = settings or PredictorSettings(), decoding or DecodingSettings()
        self.encoder = encoder or text_encoder()
        self.predictor: PromptPredictor | None = None
        self.seconds: dict[str, float] = {}

    def fit(self, train: pd.DataFrame) -> EmbeddingRecoverer:
        """Fit on triples (original_text, rewrite_prompt, rewritten_text), or read the fit of the same ones."""
        if train.empty:
            raise InputError("no training triples to fit the predictor on")
        columns = list(TEXT_COLUMNS)
        check_cells(train[columns], columns, "the training triples")
        started = time.time()
        self.bank = sorted({*train["rewrite_prompt"], *self.given_bank})
        texts = (*self.bank, *train[columns].to_numpy().ravel())
        key = digest(VERSION, self.scorer.name, fingerprint(self.scorer.encode), asdict(self.settings), *texts)
        path = cache_folder() / "predictors" / f"{key}.npz"
        if arrays := read_arrays(path):
            self.features = PairFeatures(self.encoder, arrays)
            self.predictor = PromptPredictor.load(arrays, self.settings)
            self.scorer.remember(self.bank, self.predictor.bank)
        else:
            self._fit(train)
            save_arrays(path, **self.features.state, **self.predictor.state())
            keep_last_used(path.parent, FITS_KEPT)
        self.seconds["fit"] = time.time() - started
        return self

    def _fit(self, train: pd.DataFrame) -> None:
        vectors, prompts = self.scorer.encode(self.bank), self.scorer.encode(train["rewrite_prompt"].tolist())
        self.features = PairFeatures(self.encoder)
        given = self.features.fit_transform(train)
        clusters, texts = clusters_of(train["rewrite_prompt"]), (train["rewrite_prompt"].tolist(), self.bank)
        keys = None if self.is_minilm else tuple(map(get_scorer("minilm").encode, texts))
        self.predictor = PromptPredictor(self.settings).fit(*given, prompts, vectors, clusters, keys)

    @property
    def vectors(self) -> np.ndarray:
        """The bank's prompts as the scorer embeds them, [b, d]."""
        return self.predictor.bank

    @property
    def is_minilm(self) -> bool:
        """Whether what scores is what compares prompts, too."""
        return self.scorer.name == MiniLMScorer.name

    def posterior(self, table: pd.DataFrame) -> Posterior:
        """What is believed of each row's prompt."""
        if self.predictor is None:
            raise InputError("the predictor is not fitted; call fit first")
        believed = self.predictor.predict(*self.features(check_pairs(table)))
        if "prediction" not in table:
            return believed
        check_cells(table, ["prediction"], "the table")
        return self.after(believed, table[["prediction"]].to_numpy())([self.answer_trust])

    def after(self, believed: Posterior, answers: np.ndarray) -> Callable[[Sequence[float]], Posterior]:
        """function(a trust for each method) -> what is believed after other methods' answers, texts [n, methods]."""
        vectors, keys = encode_candidates(self.scorer, answers), None
        if not self.is_minilm:
            keys = encode_candidates(get_scorer("minilm"), answers), self.predictor.keys
        return partial(blend, believed, vectors, keys=keys)

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The string found for each row."""
        return self.decode(self.posterior(table), [[answer] for answer in table.get("prediction", ())])

    def expected_scs(self, table: pd.DataFrame, answers: Sequence[str]) -> np.ndarray:
        """The SCS that each row's answer is expected to reach, [n], before the truth is known."""
        return self.posterior(table).expected_scs(self.scorer.encode(list(answers)))

    def decode(self, posterior: Posterior, answers: Sequence[Sequence[str]] = ()) -> list[str]:
        """A string near each row's vector: joined from the bank and the row's own `answers`, then searched on from."""
        started = time.time()
        texts, _ = join_prompts(posterior.vectors, self.bank, self.vectors, self.scorer, self.decoding, answers)
        texts = improve(posterior.vectors, texts, self.bank, self.scorer, self.decoding)
        self.seconds["decode"] = time.time() - started
        return texts


def build_retrieval(task: Task) -> RetrievalRecoverer:
    """Ridge regression and the nearest prompt, fitted to the task's training triples."""
    return RetrievalRecoverer(task.scorer, task.bank).fit(task.train)


def build_embedding(task: Task) -> EmbeddingRecoverer:
    """Heads and decoding, fitted to the task's training triples."""
    decoding = override(DecodingSettings(), seed=task.seed)
    settings = override(PredictorSettings(), seed=task.seed)
    return EmbeddingRecoverer(task.scorer, task.bank, settings, decoding).fit(task.train)
