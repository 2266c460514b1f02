"""Joining other methods' answers: in a row, with a gate and tags (3rd place), or as evidence for one posterior.

What there is to choose (an order, a gate, trusts) is chosen on the validation triples, which have the answers, too. A
table's columns `answer:METHOD` hold them; see choosing.py for methods that pick one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from sklearn.cluster import KMeans
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from promptrec.choosing import candidates_of
from promptrec.data import check_cells
from promptrec.embedding import EmbeddingRecoverer, build_embedding
from promptrec.errors import InputError
from promptrec.inference import answer_column, best_constant
from promptrec.predictor import Posterior
from promptrec.profiles import override
from promptrec.scoring import Scorer, scs
from promptrec.submission import FALLBACK
from promptrec.text_features import PairFeatures, frequent_words, words

if TYPE_CHECKING:
    from promptrec.methods import Task

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class JoiningSettings:
    """How what is joined is fitted; the same at every size, as no language model takes part."""

    # --- 3rd place
    trusted: str = "fine-tuned"  # the method whose answer the gate lets through
    clusters: int = 12  # of the training prompts, each with its own best constant
    tags: int = 100  # content words that may be predicted
    certain: float = 0.3  # probability from which a word is said
    decay: float = 10.0  # of the logistic regressions' weights
    epochs: int = 20  # over the training triples, for the tags
    learning_rate: float = 1e-2
    # --- blend
    most_trust: float = 20.0  # in any one method
    evaluations: int = 200  # of the validation score, to find the trusts
    seed: int = 0


def truth_of(validation: pd.DataFrame) -> list[str]:
    """The true prompts of the triples to choose by. Raises InputError where there are none."""
    if validation.empty or "rewrite_prompt" not in validation:
        raise InputError("no validation triples with a rewrite_prompt to choose by; hold some out of the training")
    check_cells(validation, ["rewrite_prompt"], "the validation triples")
    return validation["rewrite_prompt"].tolist()


def join_answers(answers: Sequence[str]) -> str:
    """Several answers as one text: each sentence once, each with one stop; blank answers are left out."""
    kept: dict[str, str] = {}
    for sentence in (part.strip() for answer in answers for part in _SENTENCE.split(answer)):
        plain = " ".join(re.findall(r"\w+", sentence.lower()))
        if plain:
            kept.setdefault(plain, sentence if sentence[-1] in "!?" else sentence.rstrip(" .,;:") + ".")
    return " ".join(kept.values()) or FALLBACK


def join_columns(pieces: pd.DataFrame, order: Sequence[str]) -> list[str]:
    """Each row's pieces, joined in an order of the columns."""
    return [join_answers(row) for row in pieces[list(order)].itertuples(index=False)]


def best_order(pieces: pd.DataFrame, truth: Sequence[str], scorer: Scorer) -> tuple[str, ...]:
    """Which columns to join and in what order, by mean SCS on rows with their true prompts.

    Greedy: the column and the place that gain most, as long as something gains.
    """
    order, reached = (), -np.inf
    while left := [name for name in pieces if name not in order]:
        options = [(*order[:place], name, *order[place:]) for name in left for place in range(len(order) + 1)]
        values = [scorer.scs(join_columns(pieces, option), truth).mean() for option in options]
        if max(values) <= reached:
            break
        order, reached = options[int(np.argmax(values))], max(values)
    return order


class Concatenation:
    """The other methods' answers in a row. Source: what most winners of the competition did."""

    name = "concatenation"

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.order = scorer, ()

    def fit(self, validation: pd.DataFrame) -> Concatenation:
        """Choose methods and order on validation triples with the methods' answers."""
        truth = truth_of(validation)
        self.order = best_order(candidates_of(validation), truth, self.scorer)
        return self

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The chosen answers of each row, joined."""
        if not self.order:
            raise InputError("the concatenation has no order yet; call fit first")
        return join_columns(candidates_of(table), self.order)


class GateTagsClusters:
    """Mean prompt, the prompt of the row's cluster, content words, and a language model's answer where a gate trusts it.

    Source: the competition's 3rd place. Which of the four are said and in what order is chosen on the validation triples.
    """

    name = "gate-tags-clusters"

    def __init__(self, scorer: Scorer, features: PairFeatures, settings: JoiningSettings | None = None) -> None:
        self.scorer, self.features, self.settings = scorer, features, settings or JoiningSettings()
        self.order: tuple[str, ...] = ()

    def fit(self, train: pd.DataFrame, validation: pd.DataFrame) -> GateTagsClusters:
        """Fit clusters and tags on training triples; gate and order on validation triples with the answers."""
        given, prompts = self.features(train)[0], train["rewrite_prompt"].tolist()
        self._fit_clusters(given, prompts)
        self._fit_tags(given, prompts)
        truth = truth_of(validation)
        self._fit_gate(validation, truth)
        self.order = best_order(self.pieces(validation), truth, self.scorer)
        return self

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The pieces of each row, joined."""
        if not self.order:
            raise InputError("gate, tags and clusters are not fitted; call fit first")
        return join_columns(self.pieces(table), self.order)

    def pieces(self, table: pd.DataFrame) -> pd.DataFrame:
        """What may be said of each row; blank where the gate is closed or no word is certain."""
        given, answers = self.features(table)[0], self._trusted(table)
        opened = self.gate.predict(self._signs(given, answers)).astype(bool)
        return pd.DataFrame(
            {
                "mean prompt": self.mean_prompt,
                "cluster prompt": [self.constants[cluster] for cluster in self.cluster_model.predict(given)],
                "tags": [
                    " ".join(self.tags[likely])
                    for likely in self.tag_model.predict_proba(given) >= self.settings.certain
                ],
                "gated answer": np.where(opened, answers, ""),
            }
        )

    def _fit_clusters(self, given: np.ndarray, prompts: list[str]) -> None:
        settings, vectors = self.settings, self.scorer.encode(prompts)
        distinct = self.scorer.encode(sorted(set(prompts)))
        self.kmeans = KMeans(min(settings.clusters, len(distinct)), random_state=settings.seed, n_init=1).fit(distinct)
        numbers = self.kmeans.predict(vectors)
        self.mean_prompt = best_constant(prompts, self.scorer)
        members = pd.Series(prompts).groupby(numbers)
        self.constants = {number: best_constant(said.tolist(), self.scorer) for number, said in members}
        self.cluster_model = _classifier(numbers, settings.decay).fit(given, numbers)

    def _fit_tags(self, given: np.ndarray, prompts: list[str]) -> None:
        settings = self.settings
        common = frequent_words(sorted(set(prompts)), settings.tags + len(ENGLISH_STOP_WORDS))
        self.tags = np.array([word for word in common if word not in ENGLISH_STOP_WORDS][: settings.tags])
        if len(self.tags) < 2:
            raise InputError("the training prompts hold too few content words to predict; fit on more triples")
        said = np.array([np.isin(self.tags, words(prompt)) for prompt in prompts])  # [n, tags]
        # without a hidden layer it is one logistic regression a word, fitted together
        self.tag_model = MLPClassifier(
            (),
            alpha=settings.decay,
            learning_rate_init=settings.learning_rate,
            max_iter=settings.epochs,
            random_state=settings.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is meant
            self.tag_model.fit(given, said)

    def _fit_gate(self, validation: pd.DataFrame, truth: list[str]) -> None:
        answers = self._trusted(validation)
        signs = self._signs(self.features(validation)[0], answers)
        better = self.scorer.scs(answers, truth) > self.scorer.scs([self.mean_prompt] * len(truth), truth)
        self.gate = make_pipeline(StandardScaler(), _classifier(better, 1.0)).fit(signs, better)

    def _trusted(self, table: pd.DataFrame) -> list[str]:
        answers = candidates_of(table)
        if self.settings.trusted not in answers:
            raise InputError(f"the gate needs the column {answer_column(self.settings.trusted)}; the table has none")
        return answers[self.settings.trusted].tolist()

    def _signs(self, given: np.ndarray, answers: list[str]) -> np.ndarray:
        """What the gate looks at, [n, 4]: is the answer in a likely cluster, near that cluster's prompt, how long?"""
        vectors, odds = self.scorer.encode(answers), self.cluster_model.predict_proba(given)
        likeliest = self.cluster_model.classes_[odds.argmax(1)]
        expected = self.scorer.encode([self.constants[number] for number in likeliest])
        own = self.kmeans.predict(vectors)[:, None] == self.cluster_model.classes_
        return np.stack(
            [
                np.where(own, odds, 0).sum(1),
                odds.max(1),
                (vectors * expected).sum(1),
                np.log([len(answer.split()) + 1 for answer in answers]),
            ],
            axis=1,
        )


def _classifier(labels: np.ndarray, decay: float) -> LogisticRegression | DummyClassifier:
    """Logistic regression, or the only answer where there is but one label."""
    if len(np.unique(labels)) < 2:
        return DummyClassifier(strategy="most_frequent")
    return LogisticRegression(C=1 / decay, max_iter=300)


class Blend:
    """The embedding method's posterior after all other methods' answers, decoded once.

    Prompts like a method's answer weigh more, and so does the answer itself (predictor.blend); each method's trust, at
    least 0, is the one with which the blend's mean direction scores best on the validation triples.
    """

    name = "blend"

    def __init__(self, embedding: EmbeddingRecoverer, settings: JoiningSettings | None = None) -> None:
        self.embedding, self.settings = embedding, settings or JoiningSettings()
        self.trust: dict[str, float] = {}

    def fit(self, validation: pd.DataFrame) -> Blend:
        """Find the trusts on validation triples with the methods' answers."""
        truth = self.embedding.scorer.encode(truth_of(validation))
        candidates = candidates_of(validation)
        after = self.embedding.after(self.embedding.posterior(validation), candidates.to_numpy())
        found = minimize(
            lambda trusts: -float(scs(after(trusts).vectors, truth).mean()),
            np.ones(candidates.shape[1]),
            method="Powell",
            bounds=[(0, self.settings.most_trust)] * candidates.shape[1],
            options={"maxfev": self.settings.evaluations, "xtol": 0.05, "ftol": 1e-4},
        )
        self.trust = dict(zip(candidates, map(float, found.x), strict=True))
        return self

    def posterior(self, table: pd.DataFrame) -> Posterior:
        """What is believed of each row's prompt after all answers."""
        if not self.trust:
            raise InputError("the blend has no trusts yet; call fit first")
        answers = candidates_of(table)[list(self.trust)].to_numpy()
        return self.embedding.after(self.embedding.posterior(table), answers)(list(self.trust.values()))

    def recover(self, table: pd.DataFrame) -> list[str]:
        """A string for each row, joined from the bank and its own answers."""
        return self.embedding.decode(self.posterior(table), candidates_of(table).to_numpy().tolist())


# --- what METHODS builds


def build_concatenation(task: Task) -> Concatenation:
    """The answers joined in the order that is best on the validation triples."""
    return Concatenation(task.scorer).fit(task.validation)


def build_gate_tags_clusters(task: Task) -> GateTagsClusters:
    """The 3rd place's string, with the features that the embedding method reads."""
    settings = override(JoiningSettings(), seed=task.seed)
    return GateTagsClusters(task.scorer, build_embedding(task).features, settings).fit(task.train, task.validation)


def build_blend(task: Task) -> Blend:
    """All answers as evidence for one posterior, with trusts from the validation triples."""
    return Blend(build_embedding(task), override(JoiningSettings(), seed=task.seed)).fit(task.validation)
