"""Predict a prompt from pair features: heads that weigh a bank of prompts, calibrated on prompt clusters left out.

A head attends over the bank: keys are its prompts as the texts' encoder embeds them, values as the scorer does. It is
trained for the cos^3 of what it finds, with every prompt near the true one hidden, so that it learns to place prompts that
no bank holds. The predictor knows no texts: features come from text_features.py, strings from embedding.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from promptrec.scoring import scs, unit
from promptrec.splits import SAME_PROMPT
from promptrec.text_features import native_bfloat16

DOUBT = 24.0  # of other methods' answers, on the scale of trust


@dataclass(frozen=True)
class PredictorSettings:
    """How the heads are trained: one without each fold of prompt clusters, which calibrates it, and one on all rows.

    The second term of the loss spreads the weights over the bank's prompts by their likeness to the true one: without
    it the weighted mean is right and the weights are not, and answers are chosen by the weights.
    """

    folds: int = 4
    epochs: int = 12
    most_steps: int = 300  # of a head, however many rows there are
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    hidden: int = 512
    dropout: float = 0.6
    input_dropout: float = 0.5
    likeness_weight: float = 0.1
    likeness_sharpness: float = 20.0  # of the softmax over cosines
    seed: int = 0


@dataclass(frozen=True)
class Posterior:
    """What is believed of each row's prompt: weights [n, b] over a bank of unit vectors [b, d].

    `expected` [n] is the SCS that the weights' mean direction is expected to reach, calibrated on prompt clusters that
    the predicting head never saw; None before it is calibrated. `answers` [n, m, d] are prompts that only the row itself
    holds possible, of weights `shares` [m]; weights and shares sum to 1.
    """

    weights: np.ndarray
    bank: np.ndarray
    expected: np.ndarray | None = None
    answers: np.ndarray | None = None
    shares: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        if self.answers is None:
            object.__setattr__(self, "answers", np.zeros((len(self.weights), 0, self.bank.shape[1]), np.float32))

    @cached_property
    def vectors(self) -> np.ndarray:
        """Mean direction of each row's belief, unit length, [n, d]."""
        return unit(self.weights @ self.bank + np.einsum("m,nmd->nd", self.shares, self.answers))

    def of(self, rows: Sequence[int]) -> Posterior:
        """The belief of some rows."""
        expected = None if self.expected is None else self.expected[rows]
        return replace(self, weights=self.weights[rows], expected=expected, answers=self.answers[rows])

    def value(self, row: int, candidates: np.ndarray) -> np.ndarray:
        """Mean SCS of candidates [c, d] under one row's belief, [c]: what ranks them, uncalibrated."""
        return self.of([row]).values(candidates)[0]

    def values(self, candidates: np.ndarray) -> np.ndarray:
        """Mean SCS of the same candidates [c, d] under every row's belief, [n, c]."""
        own = np.einsum("m,nmc->nc", self.shares, (self.answers @ candidates.T) ** 3)
        return self.weights @ ((self.bank @ candidates.T) ** 3) + own

    def own_values(self, vectors: np.ndarray) -> np.ndarray:
        """Mean SCS of each row's own vector [n, d] under its belief, [n]."""
        own = np.einsum("nd,nmd->nm", vectors, self.answers) ** 3 @ self.shares
        return (self.weights * (vectors @ self.bank.T) ** 3).sum(1) + own

    def expected_scs(self, vectors: np.ndarray) -> np.ndarray:
        """Calibrated expected SCS of each row's own vector [n, d], [n]: what the mean direction's is, in proportion."""
        return self.expected * self.own_values(vectors) / np.maximum(self.own_values(self.vectors), 1e-9)


def choose(posterior: Posterior, candidates: np.ndarray) -> np.ndarray:
    """Minimum-Bayes-risk choice: for each row the candidate [c, d] with the highest expected SCS, as an index [n]."""
    return posterior.values(candidates).argmax(1)


def blend(
    posterior: Posterior,
    answers: np.ndarray,
    trusts: Sequence[float],
    keys: tuple[np.ndarray, np.ndarray] | None = None,
) -> Posterior:
    """The posterior after other methods' answers (unit embeddings [n, m, d]), with a trust of at least 0 for each method.

    Prompts of the bank weigh exp(trust * cos) more, and as the bank may lack what an answer found, the answers themselves
    are believed, too: t / (t + DOUBT) of the belief at a sum of trusts t. `expected` stays as it was, because nothing is
    known of how good the answers are. `keys` are MiniLM's embeddings of answers [n, m, k] and bank [b, k], where another
    encoder scores: the cosine is between them.
    """
    asked, bank = keys or (answers, posterior.bank)
    trusts = np.asarray(trusts, np.float32)
    evidence = np.einsum("m,nmk->nk", trusts, asked) @ bank.T  # [n, b]
    weights = posterior.weights * np.exp(evidence - evidence.max(1, keepdims=True))
    shares = trusts / (trusts.sum() + DOUBT)
    weights *= (1 - shares.sum()) / weights.sum(1, keepdims=True)
    return replace(posterior, weights=weights, answers=answers, shares=shares)


def _head(inputs: int, directions: int, given: int, width: int, settings: PredictorSettings):
    """Flat features [n, f] and directions [n, k, e] -> scores [n, b] of a bank's keys [b, width].

    A row's query is the sum of what its features say and of its turned directions; a prompt's score is its key's product
    with the query, and softmax makes weights of the scores.
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
                nn.Linear(settings.hidden, width),
            )
            self.turns = nn.ModuleList(nn.Linear(given, width, bias=False) for _ in range(directions))
            # at first a prompt resembles what it produced, and nothing is known of the original
            self.shares = nn.Parameter(torch.tensor([0.0, 0.3, 0.0, *[0.3] * directions][:directions]))
            self.sharpness = nn.Parameter(torch.tensor(2.5))
            for turn in self.turns:
                nn.init.eye_(turn.weight)

        def forward(self, flat, directions, keys, hidden=None):
            turned = zip(self.shares, self.turns, directions.unbind(1), strict=True)
            query = normalize(self.body(flat), dim=-1) + sum(
                share * normalize(turn(direction), dim=-1) for share, turn, direction in turned
            )
            scores = (query * self.sharpness.exp()) @ keys.T
            return scores if hidden is None else scores.masked_fill(hidden, -1e4)

    return Head()


class PromptPredictor:
    """Heads that weigh a bank of prompts by pair features, averaged."""

    def __init__(self, settings: PredictorSettings | None = None) -> None:
        self.settings, self.heads = settings or PredictorSettings(), []

    def fit(
        self,
        flat: np.ndarray,
        directions: np.ndarray,
        prompts: np.ndarray,
        bank: np.ndarray,
        clusters: np.ndarray,
        keys: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> PromptPredictor:
        """Fit to prompt embeddings [n, d] with a bank [b, d]; rows of one cluster are in one fold.

        `keys` are MiniLM's embeddings of the same prompts [n, k] and bank [b, k], where another encoder scores: queries are
        compared with them, and SAME_PROMPT is a cosine between them. Under sentence-t5 every two prompts are alike.
        """
        wanted, self.keys = keys or (prompts, bank)
        self.bank, self.shape, self.heads = bank, (flat.shape[1], *directions.shape[1:], self.keys.shape[1]), []
        folds = np.random.default_rng(self.settings.seed).integers(self.settings.folds, size=clusters.max() + 1)[
            clusters
        ]
        importance = 1 / np.sqrt(np.bincount(clusters)[clusters])  # many rows of one prompt say little more than one
        claimed, reached = np.zeros(len(prompts)), np.zeros(len(prompts))
        for fold in range(self.settings.folds):
            inside, outside = folds != fold, folds == fold
            if not inside.any():
                inside = outside
            known = (one[inside] for one in (flat, directions, prompts, wanted, importance))
            self.heads.append(self._train(*known, fold))
            if outside.any():
                hidden = wanted[outside] @ self.keys.T >= SAME_PROMPT
                weights = self._ask(self.heads[-1:], flat[outside], directions[outside], hidden)
                believed = Posterior(weights, bank)
                claimed[outside] = believed.own_values(believed.vectors)
                reached[outside] = scs(believed.vectors, prompts[outside])
        self._calibrate(claimed, reached)
        self.heads.append(self._train(flat, directions, prompts, wanted, importance, self.settings.folds))
        return self

    def predict(self, flat: np.ndarray, directions: np.ndarray) -> Posterior:
        """The posterior of each row."""
        weights = self._ask(self.heads, flat, directions)
        believed = Posterior(weights, self.bank)
        expected = np.interp(believed.own_values(believed.vectors), *self.calibration)
        return replace(believed, expected=expected.astype(np.float32))

    def _train(self, flat, directions, prompts, wanted, importance, fold):
        import torch

        settings, rows, fast = self.settings, len(flat), native_bfloat16()
        torch.manual_seed(settings.seed * 100 + fold)
        head, keys = _head(*self.shape, settings), torch.from_numpy(self.keys)
        flat, directions, prompts, wanted = map(torch.from_numpy, (flat, directions, prompts, wanted))
        importance = torch.from_numpy(importance.astype(np.float32))
        kind = torch.bfloat16 if fast else torch.float32
        shown, values = keys.to(kind), torch.from_numpy(self.bank).to(kind)
        optimizer = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
        size = min(settings.batch_size, rows)
        steps = max(min(settings.epochs * (rows // size), settings.most_steps), 2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=steps, pct_start=max(0.1, 1.1 / steps)
        )
        for step in range(steps):
            if step % (rows // size) == 0:
                order = torch.randperm(rows)
            batch = order[step % (rows // size) * size :][:size]
            share, alike = importance[batch] / importance[batch].sum(), wanted[batch] @ keys.T
            hidden = alike >= SAME_PROMPT
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):  # twice as fast, scores as before
                likely = head(flat[batch], directions[batch], shown, hidden).float().log_softmax(-1)
                found = torch.nn.functional.normalize((likely.exp() @ values).float(), dim=-1)
            spread = (settings.likeness_sharpness * alike).masked_fill(hidden, -1e4).softmax(-1)
            gain = (found * prompts[batch]).sum(-1) ** 3 + settings.likeness_weight * (spread * likely).sum(-1)
            optimizer.zero_grad()
            (-(gain * share).sum()).backward()
            optimizer.step()
            schedule.step()
        return head.eval()

    def _ask(self, heads, flat, directions, hidden=None, block: int = 512) -> np.ndarray:
        """Mean weights of the heads, [n, bank]."""
        import torch

        weights, keys = [], torch.from_numpy(self.keys)
        with torch.inference_mode():
            for start in range(0, len(flat), block):
                part = slice(start, start + block)
                mask = None if hidden is None else torch.from_numpy(hidden[part])
                given = torch.from_numpy(flat[part]), torch.from_numpy(directions[part]), keys, mask
                weights.append((sum(head(*given).softmax(-1) for head in heads) / len(heads)).numpy())
        return np.concatenate(weights)

    def _calibrate(self, claimed: np.ndarray, reached: np.ndarray) -> None:
        """A rising curve from the SCS that a posterior claims to the one it reached on unseen clusters."""
        from sklearn.isotonic import IsotonicRegression

        grid = np.quantile(claimed, np.linspace(0, 1, 41))
        curve = IsotonicRegression(out_of_bounds="clip").fit(claimed, reached)
        self.calibration = np.stack([grid, np.maximum(curve.predict(grid), 1e-4)]).astype(np.float32)
        self.held_out = float(reached.mean())

    def state(self) -> dict[str, np.ndarray]:
        """Everything fitted, as arrays."""
        arrays = {"bank": self.bank, "shape": np.array(self.shape), "calibration": self.calibration}
        arrays |= {"held_out": np.array(self.held_out)} | ({} if self.keys is self.bank else {"keys": self.keys})
        for number, head in enumerate(self.heads):
            arrays |= {f"head{number}.{key}": value.numpy() for key, value in head.state_dict().items()}
        return arrays

    @classmethod
    def load(cls, arrays: dict[str, np.ndarray], settings: PredictorSettings) -> PromptPredictor:
        """The predictor that `state` came from."""
        import torch

        self = cls(settings)
        self.bank, self.shape = arrays["bank"], tuple(arrays["shape"].tolist())
        self.keys = arrays.get("keys", self.bank)
        self.calibration, self.held_out = arrays["calibration"], float(arrays["held_out"])
        for number in range(settings.folds + 1):
            mark = f"head{number}."
            weights = {key.removeprefix(mark): value for key, value in arrays.items() if key.startswith(mark)}
            head = _head(*self.shape, settings)
            head.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
            self.heads.append(head.eval())
        return self
