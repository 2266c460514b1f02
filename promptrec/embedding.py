"""Predict the prompt's embedding from the two texts, then say it: recovery without a language model.

Two ways. RetrievalRecoverer is the floor: a ridge regression and the nearest prompt of a bank. EmbeddingRecoverer is the
best that runs without an accelerator: heads trained on cos^3 predict a vector and a posterior over the bank, and a
search finds the string that lands there (token_search.py). Fitted once for a training set, then read from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from promptrec.data import check_cells
from promptrec.errors import InputError
from promptrec.inference import check_pairs
from promptrec.predictor import Posterior, PredictorSettings, PromptPredictor, blend, choose
from promptrec.scoring import Scorer, unit
from promptrec.splits import cluster_prompts
from promptrec.text_features import LAST, PairFeatures, TextEncoder, cache_folder, digest, read_arrays, save_arrays

VERSION = 2  # of what is cached: count up when features or training change


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

        self.scorer, self.given_bank, self.encoder = scorer, list(bank), encoder or TextEncoder()
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


# --- from vector to string


@dataclass(frozen=True)
class DecodingSettings:
    """How much is spent on finding each row's string.

    The gradient search is off by default: on one core a row takes over a second for 100 evaluations, and gains little on
    joined prompts.
    """

    joined: int = 5  # bank prompts that an answer may be joined of
    tried: int = 8  # joins encoded at every step
    evaluations: int = 0  # strings a row that the gradient search encodes after that; 0 keeps whole prompts
    level: str = "word"
    max_tokens: int = 100
    seed: int = 0


def join_prompts(
    posterior: Posterior, bank: Sequence[str], vectors: np.ndarray, scorer: Scorer, settings: DecodingSettings
) -> tuple[list[str], np.ndarray]:
    """Bank prompts joined for the highest expected SCS of each row: texts and their unit embeddings [n, d].

    Greedy. The encoder pools by mean, so a prompt that points along what is missing is worth trying; what counts is the
    embedding of the joined text itself, and a join that is not expected to score more is not made, nor one over
    `max_tokens`.
    """
    short = [scorer.count_tokens(text) <= settings.max_tokens for text in bank]
    if any(short):
        bank, vectors = [text for text, fits in zip(bank, short, strict=True) if fits], vectors[short]
    best = choose(posterior, vectors)
    texts, reached = [bank[index] for index in best], vectors[best].copy()
    for _ in range(settings.joined - 1):
        wanted = posterior.slopes(reached)
        missing = unit(wanted - (wanted * reached).sum(1, keepdims=True) * reached) + 0.3 * wanted
        tried = np.argpartition(-missing @ vectors.T, min(settings.tried, len(bank) - 1), axis=1)[:, : settings.tried]
        joins = [[f"{text} {bank[index]}" for index in row] for text, row in zip(texts, tried, strict=True)]
        encoded = scorer.encode([join for row in joins for join in row]).reshape(len(texts), -1, vectors.shape[1])
        for row, options in enumerate(joins):
            now, *values = posterior.value(row, np.concatenate([reached[row : row + 1], encoded[row]]))
            fits = [scorer.count_tokens(option) <= settings.max_tokens for option in options]
            column = int(np.where(fits, values, -1).argmax())
            if fits[column] and values[column] > now:
                texts[row], reached[row] = options[column], encoded[row, column]
    return texts, reached


class EmbeddingRecoverer:
    """Predicts the prompt's embedding and searches for the string that lands there.

    `bank` adds prompts to those of the training triples. A table's column `prediction`, where there is one, holds
    another method's answers: they join the candidates, and prompts like them are believed more (see
    predictor.blend).
    """

    name = "embedding"

    def __init__(
        self,
        scorer: Scorer,
        bank: Sequence[str] = (),
        settings: PredictorSettings | None = None,
        decoding: DecodingSettings | None = None,
        answer_trust: float = 6.0,
        encoder: TextEncoder | None = None,
    ) -> None:
        self.scorer, self.given_bank, self.answer_trust = scorer, list(bank), answer_trust
        self.settings, self.decoding = settings or PredictorSettings(), decoding or DecodingSettings()
        self.encoder = encoder or TextEncoder()
        self.predictor: PromptPredictor | None = None
        self.seconds: dict[str, float] = {}

    def fit(self, train: pd.DataFrame) -> EmbeddingRecoverer:
        """Fit on triples (original_text, rewrite_prompt, rewritten_text), or read the fit of the same ones."""
        if train.empty:
            raise InputError("no training triples to fit the predictor on")
        columns = ["original_text", "rewrite_prompt", "rewritten_text"]
        check_cells(train[columns], columns, "the training triples")
        started = time.time()
        self.bank = sorted({*train["rewrite_prompt"], *self.given_bank})
        self.vectors = self.scorer.encode(self.bank)
        key = digest(VERSION, self.scorer.name, asdict(self.settings), *self.bank, *train[columns].to_numpy().ravel())
        path = cache_folder() / "predictors" / f"{key}.npz"
        if arrays := read_arrays(path):
            self.features = PairFeatures(self.encoder, arrays)
            self.predictor = PromptPredictor.load(arrays, self.settings)
        else:
            self._fit(train)
            save_arrays(path, **self.features.state, **self.predictor.state())
        self.seconds["fit"] = time.time() - started
        return self

    def _fit(self, train: pd.DataFrame) -> None:
        prompts = self.scorer.encode(train["rewrite_prompt"].tolist())
        self.features = PairFeatures(self.encoder)
        given = self.features.fit_transform(train)
        self.predictor = PromptPredictor(self.settings).fit(*given, prompts, self.vectors, cluster_prompts(prompts))

    def posterior(self, table: pd.DataFrame) -> Posterior:
        """What is believed of each row's prompt."""
        if self.predictor is None:
            raise InputError("the predictor is not fitted; call fit first")
        believed = self.predictor.predict(*self.features(check_pairs(table)))
        if "prediction" not in table:
            return believed
        check_cells(table, ["prediction"], "the table")
        return blend(believed, self.scorer.encode(table["prediction"].tolist()), self.answer_trust)

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The string found for each row."""
        return self.decode(self.posterior(table), table.get("prediction", ()))

    def decode(self, posterior: Posterior, answers: Sequence[str] = ()) -> list[str]:
        """A string for each row of a posterior: joined from the bank (and `answers`), then improved by search."""
        started = time.time()
        bank = [*self.bank, *dict.fromkeys(answers)]
        texts, _ = join_prompts(posterior, bank, self.scorer.encode(bank), self.scorer, self.decoding)
        if self.decoding.evaluations:
            texts = self._improve(posterior, texts)
        self.seconds["decode"] = time.time() - started
        return texts

    def _improve(self, posterior: Posterior, texts: list[str]) -> list[str]:
        """Search on from the joined prompts, where the scorer's encoder can be looked into."""
        from promptrec.search_encoders import encoder_of
        from promptrec.token_search import SearchSettings, search_many

        encoder = encoder_of(self.scorer)
        if encoder is None:
            return texts
        settings = SearchSettings(
            level=self.decoding.level,
            evaluations=self.decoding.evaluations,
            max_tokens=self.decoding.max_tokens,
            seed=self.decoding.seed,
            candidates=10,
            places=4,
            vocabulary=_vocabulary(self.bank) if self.decoding.level == "word" else (),
        )
        short = [encoder.count_tokens(text) <= settings.max_tokens for text in texts]
        goals = [posterior.objective(row) for row, fits in enumerate(short) if fits]
        found = iter(
            search_many(encoder, goals, [text for text, fits in zip(texts, short, strict=True) if fits], settings)
        )
        return [next(found).text if fits else text for text, fits in zip(texts, short, strict=True)]


def _vocabulary(prompts: Sequence[str], size: int = 3000) -> tuple[str, ...]:
    """The most frequent words of the prompts: what a readable string is made of."""
    from collections import Counter

    from promptrec.text_features import words

    counts = Counter(word.strip("'") for prompt in prompts for word in words(prompt))
    return tuple(word for word, _ in counts.most_common(size) if len(word) > 1)
