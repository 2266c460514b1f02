"""Predict the prompt's embedding from the two texts, then say it: recovery without a language model.

Two ways. RetrievalRecoverer is the floor: a ridge regression and the nearest prompt of a bank. EmbeddingRecoverer is the
best that runs without an accelerator: heads trained on cos^3 predict a vector and a posterior over the bank, and a
search finds the string that lands there (token_search.py). Fitted once for a training set, then read from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from promptrec.data import check_cells
from promptrec.errors import InputError
from promptrec.inference import check_pairs
from promptrec.scoring import Scorer, scs
from promptrec.splits import SAME_PROMPT, cluster_prompts
from promptrec.text_features import PairFeatures, TextEncoder, cache_folder, digest, read_arrays, save_arrays, unit

VERSION = 1  # of what is cached: count up when features or training change


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
        return unit(self.ridge.predict(self._features(table)))

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


# --- the predictor


@dataclass(frozen=True)
class PredictorSettings:
    """How the heads are trained. One head a fold: it never sees the fold's prompt clusters, which calibrate it."""

    folds: int = 4
    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    hidden: int = 512
    dropout: float = 0.3
    input_dropout: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Posterior:
    """What is believed of each row's prompt: a unit vector [n, d], weights over the bank [n, bank], and the SCS that
    the vector itself is expected to reach [n], calibrated on prompt clusters that the predicting head never saw."""

    vectors: np.ndarray
    weights: np.ndarray
    expected: np.ndarray

    def expected_scs(self, candidates: np.ndarray) -> np.ndarray:
        """Expected SCS of unit vectors [c, d] for every row, [n, c].

        What a candidate misses of the predicted vector is unrelated to the truth, as far as the predictor knows, so its
        cosine with the truth is the product of two cosines.
        """
        return self.expected[:, None] * np.maximum(self.vectors @ candidates.T, 0) ** 3


def _head(inputs: int, directions: int, width: int, settings: PredictorSettings):
    """Flat features [n, f] and directions [n, k, e] -> a vector and attention over a bank of embeddings [b, d].

    The answer mixes what attention finds among the bank's prompts with a direct regression. Attention is trained with
    every prompt near the true one hidden, so it learns to place prompts that no bank holds.
    """
    import torch
    from torch import nn
    from torch.nn.functional import normalize

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Dropout(settings.input_dropout),
                nn.Linear(inputs, settings.hidden),
                nn.GELU(),
                nn.LayerNorm(settings.hidden),
                nn.Dropout(settings.dropout),
            )
            self.query, self.direct = (nn.Linear(settings.hidden, width) for _ in range(2))
            self.key = nn.Linear(width, width)
            self.turns = nn.ModuleList(nn.Linear(directions, width, bias=False) for _ in range(3))
            self.shares = nn.Parameter(torch.tensor([0.0, 0.3, 0.0]))  # at first, a prompt resembles what it produced
            self.sharpness, self.mixing = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.tensor(0.0))
            nn.init.eye_(self.key.weight)
            for turn in self.turns:
                nn.init.eye_(turn.weight)

        def forward(self, flat, given, bank, hidden=None):
            inner = self.body(flat)
            scores = normalize(self.query(inner), dim=-1) @ normalize(self.key(bank), dim=-1).T
            turned = [normalize(turn(given[:, place]), dim=-1) for place, turn in enumerate(self.turns)]
            scores = scores + sum(share * one for share, one in zip(self.shares, turned, strict=True)) @ bank.T
            scores = scores * self.sharpness.exp()
            if hidden is not None:
                scores = scores.masked_fill(hidden, -1e4)
            weights = scores.softmax(-1)
            found, direct = weights @ bank, normalize(self.direct(inner), dim=-1)
            mixed = found + self.mixing.sigmoid() * found.norm(dim=-1, keepdim=True) * direct
            return normalize(mixed, dim=-1), normalize(found, dim=-1), direct, weights

    return Head()


class PromptPredictor:
    """Heads that predict prompt embeddings from pair features, one a fold of prompt clusters, averaged."""

    def __init__(self, settings: PredictorSettings | None = None) -> None:
        self.settings, self.heads = settings or PredictorSettings(), []

    def fit(
        self, flat: np.ndarray, directions: np.ndarray, prompts: np.ndarray, bank: np.ndarray, clusters: np.ndarray
    ) -> PromptPredictor:
        """Fit to prompt embeddings [n, d] with a bank [b, d]; rows of one cluster are in one fold."""
        self.bank, self.shape, self.heads = bank, (flat.shape[1], directions.shape[2], bank.shape[1]), []
        folds = np.random.default_rng(self.settings.seed).integers(self.settings.folds, size=clusters.max() + 1)[
            clusters
        ]
        weights = 1 / np.sqrt(np.bincount(clusters)[clusters])  # many rows of one prompt say little more than one
        vectors, sharpness = np.zeros_like(prompts), np.zeros(len(prompts), np.float32)
        for fold in range(self.settings.folds):
            inside, outside = folds != fold, folds == fold
            if not inside.any():
                inside = outside
            self.heads.append(self._train(flat[inside], directions[inside], prompts[inside], weights[inside], fold))
            if outside.any():
                hidden = prompts[outside] @ bank.T >= SAME_PROMPT
                vectors[outside], held = self._ask(self.heads[-1:], flat[outside], directions[outside], hidden)
                sharpness[outside] = _concentration(held, bank)
        self._calibrate(sharpness, scs(vectors, prompts))
        return self

    def predict(self, flat: np.ndarray, directions: np.ndarray) -> Posterior:
        """The posterior of each row."""
        vectors, weights = self._ask(self.heads, flat, directions)
        levels = np.interp(_concentration(weights, self.bank), *self.calibration)
        return Posterior(vectors, weights, levels.astype(np.float32))

    def _train(self, flat, directions, prompts, weights, fold):
        import torch

        torch.manual_seed(self.settings.seed * 100 + fold)
        head, settings, rows = _head(*self.shape, self.settings), self.settings, len(flat)
        flat, directions, prompts, bank = map(torch.from_numpy, (flat, directions, prompts, self.bank))
        weights = torch.from_numpy(weights.astype(np.float32))
        optimizer = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
        size = min(settings.batch_size, rows)
        steps = max(settings.epochs * (rows // size), 2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=steps, pct_start=max(0.1, 1.1 / steps)
        )
        for step in range(steps):
            if step % (rows // size) == 0:
                order = torch.randperm(rows)
            batch = order[step % (rows // size) * size :][:size]
            truth, share = prompts[batch], weights[batch] / weights[batch].sum()
            mixed, found, direct, _ = head(flat[batch], directions[batch], bank, truth @ bank.T >= SAME_PROMPT)
            reached = [((vector * truth).sum(-1) ** 3 * share).sum() for vector in (mixed, found, direct)]
            loss = -(reached[0] + 0.5 * reached[1] + 0.5 * reached[2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return head.eval()

    def _ask(self, heads, flat, directions, hidden=None, block: int = 512):
        """Mean of the heads: unit vectors [n, d] and weights [n, bank]."""
        import torch

        vectors, weights = [], []
        bank = torch.from_numpy(self.bank)
        with torch.inference_mode():
            for start in range(0, len(flat), block):
                part = slice(start, start + block)
                mask = None if hidden is None else torch.from_numpy(hidden[part])
                given = torch.from_numpy(flat[part]), torch.from_numpy(directions[part]), bank, mask
                answers = [head(*given) for head in heads]
                vectors.append(sum(answer[0] for answer in answers).numpy())
                weights.append((sum(answer[3] for answer in answers) / len(answers)).numpy())
        return unit(np.concatenate(vectors)), np.concatenate(weights)

    def _calibrate(self, sharpness: np.ndarray, reached: np.ndarray) -> None:
        """A rising curve from how concentrated a posterior is to the SCS its vector reached on unseen clusters."""
        from sklearn.isotonic import IsotonicRegression

        grid = np.quantile(sharpness, np.linspace(0, 1, 41))
        curve = IsotonicRegression(out_of_bounds="clip").fit(sharpness, reached)
        self.calibration = np.stack([grid, np.maximum(curve.predict(grid), 1e-4)]).astype(np.float32)
        self.held_out = np.array([reached.mean()], np.float32)

    def state(self) -> dict[str, np.ndarray]:
        """Everything fitted, as arrays."""
        arrays = {"bank": self.bank, "shape": np.array(self.shape), "calibration": self.calibration}
        arrays["held_out"] = self.held_out
        for number, head in enumerate(self.heads):
            arrays |= {f"head{number}.{key}": value.numpy() for key, value in head.state_dict().items()}
        return arrays

    @classmethod
    def load(cls, arrays: dict[str, np.ndarray], settings: PredictorSettings) -> PromptPredictor:
        """The predictor that `state` came from."""
        import torch

        self = cls(settings)
        self.bank, self.shape = arrays["bank"], tuple(arrays["shape"].tolist())
        self.calibration, self.held_out = arrays["calibration"], arrays["held_out"]
        for number in range(settings.folds):
            mark = f"head{number}."
            head = _head(*self.shape, settings)
            head.load_state_dict(
                {
                    key.removeprefix(mark): torch.from_numpy(value)
                    for key, value in arrays.items()
                    if key.startswith(mark)
                }
            )
            self.heads.append(head.eval())
        return self


def _concentration(weights: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Length of the posterior's mean vector [n]: 1 if it is sure, small if it is spread over unlike prompts."""
    return np.linalg.norm(weights @ bank, axis=1).astype(np.float32)


def choose(posterior: Posterior, candidates: np.ndarray) -> np.ndarray:
    """Minimum-Bayes-risk choice: for each row the candidate [c, d] with the highest expected SCS, as an index [n]."""
    return posterior.expected_scs(candidates).argmax(1)


def blend(posterior: Posterior, answers: np.ndarray, weight: float) -> Posterior:
    """The posterior moved towards another method's answers (their unit embeddings [n, d])."""
    return replace(posterior, vectors=unit(posterior.vectors + weight * answers))


# --- from vector to string


@dataclass(frozen=True)
class DecodingSettings:
    """How much is spent on finding each row's string.

    The gradient search is off by default: on one core a row takes about a second for 100 evaluations, and gains little
    on joined prompts (measured: .128 -> .134 in mean SCS on 120 real rows, where the vector scores .186).
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
    """Bank prompts joined so that the whole lands near each row's vector: texts and their unit embeddings [n, d].

    Greedy. The encoder pools by mean, so a prompt that points along what is missing is worth trying; what counts is the
    embedding of the joined text itself, and a join that does not come nearer is not made, nor one over `max_tokens`.
    """
    short = [_fits(text, scorer, settings) for text in bank]
    if any(short):
        bank, vectors = [text for text, fits in zip(bank, short, strict=True) if fits], vectors[short]
    best = choose(posterior, vectors)
    texts, reached = [bank[index] for index in best], vectors[best].copy()
    for _ in range(settings.joined - 1):
        near = (posterior.vectors * reached).sum(1, keepdims=True)
        missing = unit(posterior.vectors - near * reached) + 0.3 * posterior.vectors
        tried = np.argpartition(-missing @ vectors.T, min(settings.tried, len(bank) - 1), axis=1)[:, : settings.tried]
        joins = [[f"{text} {bank[index]}" for index in row] for text, row in zip(texts, tried, strict=True)]
        encoded = scorer.encode([join for row in joins for join in row]).reshape(len(texts), -1, vectors.shape[1])
        values = np.einsum("nd,ncd->nc", posterior.vectors, encoded)
        values[[[not _fits(join, scorer, settings) for join in row] for row in joins]] = -1
        for row, column in enumerate(values.argmax(1)):
            if values[row, column] > near[row, 0]:
                texts[row], reached[row] = joins[row][column], encoded[row, column]
    return texts, reached


def _fits(text: str, scorer: Scorer, settings: DecodingSettings) -> bool:
    """Whether a text is within the token budget, where the scorer's tokens can be counted."""
    from promptrec.search_encoders import encoder_of

    encoder = encoder_of(scorer)
    return encoder is None or encoder.count_tokens(text) <= settings.max_tokens


class EmbeddingRecoverer:
    """Predicts the prompt's embedding and searches for the string that lands there.

    `bank` adds prompts to those of the training triples. A table's column `prediction`, where there is one, holds
    another method's answers: they join the candidates and pull the vector by `answer_weight`.
    """

    name = "embedding"

    def __init__(
        self,
        scorer: Scorer,
        bank: Sequence[str] = (),
        settings: PredictorSettings | None = None,
        decoding: DecodingSettings | None = None,
        answer_weight: float = 0.5,
        encoder: TextEncoder | None = None,
    ) -> None:
        self.scorer, self.given_bank, self.answer_weight = scorer, list(bank), answer_weight
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
        self.features = PairFeatures(self.encoder).fit(train)
        clusters = cluster_prompts(prompts)
        self.predictor = PromptPredictor(self.settings).fit(*self.features(train), prompts, self.vectors, clusters)

    def posterior(self, table: pd.DataFrame) -> Posterior:
        """What is believed of each row's prompt."""
        if self.predictor is None:
            raise InputError("the predictor is not fitted; call fit first")
        believed = self.predictor.predict(*self.features(check_pairs(table)))
        if "prediction" not in table:
            return believed
        check_cells(table, ["prediction"], "the table")
        return blend(believed, self.scorer.encode(table["prediction"].tolist()), self.answer_weight)

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
        from promptrec.token_search import Objective, SearchSettings, search_many

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
        goals = [
            Objective(vector[None], np.ones(1)) for vector, fits in zip(posterior.vectors, short, strict=True) if fits
        ]
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
