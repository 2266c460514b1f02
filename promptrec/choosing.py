"""Choosing among other methods' answers: methods that work on the columns `answer:METHOD` of a table.

Each rates the row's candidates and answers with the best: by agreement, by a language model's judgement, by how
probable the rewrite is under each, by expected score. Makes no new strings: see joining.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptrec.data import check_cells, slice_words
from promptrec.embedding import EmbeddingRecoverer, build_embedding
from promptrec.errors import InputError
from promptrec.inference import answer_column, check_pairs
from promptrec.language_model import answer_log_likelihood, left_padded, load_model, load_tokenizer, token_ids
from promptrec.predictor import Posterior, choose
from promptrec.profiles import preset
from promptrec.scoring import Scorer, encode_candidates
from promptrec.tables import progress
from promptrec.templates import rewrite_request, user_turn

if TYPE_CHECKING:
    from promptrec.methods import Task

JUDGE_INSTRUCTION = (
    "Which of these instructions turned the original text into the rewritten text? Answer with its number."
)


@dataclass(frozen=True)
class ChoosingSettings:
    """How answers are judged and weighed; the defaults suit the tiny Gemma on one core, `GPU` a real model."""

    # --- what a language model reads
    original_words: int = 20
    rewritten_words: int = 30
    candidate_words: int = 20
    batch_size: int = 32
    # --- contrast
    references: int = 2  # training pairs that tell how probable a candidate makes any rewrite
    seed: int = 0


GPU = ChoosingSettings(original_words=200, rewritten_words=200, candidate_words=60, batch_size=8, references=4)


def candidates_of(table: pd.DataFrame) -> pd.DataFrame:
    """The other methods' answers of a table, a column for each method: [n, methods].

    Raises InputError where there are none, where there are no rows, or where a cell is blank.
    """
    columns = [column for column in check_pairs(table) if column.startswith(answer_column(""))]
    if not columns:
        raise InputError("the table has no other method's answers (columns answer:METHOD); name some in Method.needs")
    check_cells(table, columns, "the table")
    return table[columns].rename(columns=lambda column: column.removeprefix(answer_column("")))


# --- choosing one of them


class Chooser:
    """Answers each row with the candidate rated highest; of equals, with the first.

    `rate` turns a table and its candidates [n, m] into ratings [n, m].
    """

    def __init__(self, name: str, rate: Callable[[pd.DataFrame, np.ndarray], np.ndarray]) -> None:
        self.name, self.rate = name, rate

    def recover(self, table: pd.DataFrame) -> list[str]:
        """One of the candidates of each row."""
        candidates = candidates_of(table).to_numpy()
        return candidates[np.arange(len(table)), self.rate(table, candidates).argmax(1)].tolist()


def agreement(candidates: np.ndarray, scorer: Scorer) -> np.ndarray:
    """Mean SCS of each candidate with the row's other ones, [n, m]: the highest is the medoid."""
    vectors = encode_candidates(scorer, candidates)
    alike = np.einsum("nid,njd->nij", vectors, vectors) ** 3
    return (alike.sum(2) - 1) / max(candidates.shape[1] - 1, 1)


@dataclass(frozen=True)
class Asked:
    """A language model that rates candidates, and how much of each text it reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: str
    settings: ChoosingSettings

    def judge(self, table: pd.DataFrame, candidates: np.ndarray) -> np.ndarray:
        """Log-probability of each candidate's number as the answer to "which one?", [n, m].

        The number's probability and not a written answer: it is there for every candidate, cannot be misread, and may
        be averaged. A model prefers places (Zheng et al., Judging LLM-as-a-judge, 2023), so each candidate stands once
        in each place, and what a place is worth by itself falls out of the mean.
        """
        shown = self._shorten(candidates)
        count = candidates.shape[1]
        orders = [np.roll(np.arange(count), turn) for turn in range(count)]
        requests = [
            judge_request(*texts, row[order], self.chat)
            for order in orders
            for texts, row in zip(self._pairs(table), shown, strict=True)
        ]
        logs = first_token_logs(
            self.model, self.tokenizer, requests, [str(one + 1) for one in range(count)], self.settings.batch_size
        )
        ratings = np.zeros(candidates.shape)
        for order, told in zip(orders, logs.reshape(count, *candidates.shape), strict=True):
            ratings[:, order] += told / count
        return ratings

    def likelihood(self, table: pd.DataFrame, candidates: np.ndarray) -> np.ndarray:
        """Mean log-probability of a token of the rewritten text when the rewriter is given each candidate, [n, m]."""
        pairs = np.repeat(self._pairs(table), candidates.shape[1], axis=0)
        return self._rewrites(pairs, self._shorten(candidates).ravel()).reshape(candidates.shape)

    def contrast(self, table: pd.DataFrame, candidates: np.ndarray, references: pd.DataFrame) -> np.ndarray:
        """`likelihood` minus the mean likelihood of other pairs' rewrites under the same candidate, [n, m].

        A candidate that makes every rewrite probable does not win by that. (The likelihood without a prompt, or with
        other prompts, is the same for all candidates of a row: to take it off changes no choice.)
        """
        shown = self._shorten(candidates)
        prompts, place = np.unique(shown.astype(str), return_inverse=True)
        pairs = np.tile(self._pairs(references), (len(prompts), 1))
        general = self._rewrites(pairs, np.repeat(prompts, len(references))).reshape(len(prompts), -1).mean(1)
        return self.likelihood(table, candidates) - general[place.reshape(candidates.shape)]

    def _pairs(self, table: pd.DataFrame) -> np.ndarray:
        lengths = {"original_text": self.settings.original_words, "rewritten_text": self.settings.rewritten_words}
        return np.array([[slice_words(text, words) for text in table[name]] for name, words in lengths.items()]).T

    def _shorten(self, candidates: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda text: slice_words(text, self.settings.candidate_words), otypes=[object])(candidates)

    def _rewrites(self, pairs: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        requests = [
            rewrite_request(original, prompt, self.chat) for (original, _), prompt in zip(pairs, prompts, strict=True)
        ]
        answers = [rewritten for _, rewritten in pairs]
        return answer_log_likelihood(self.model, self.tokenizer, requests, answers, self.settings.batch_size)


def judge_request(original: str, rewritten: str, candidates: Sequence[str], chat: str = "gemma") -> str:
    """What the judge is asked: both texts, the question, the numbered candidates."""
    numbered = "\n".join(f"{number}. {candidate}" for number, candidate in enumerate(candidates, 1))
    return user_turn(f"Original:\n{original}\n\nRewritten:\n{rewritten}\n\n{JUDGE_INSTRUCTION}\n{numbered}", chat)


@torch.inference_mode()
def first_token_logs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 32,
) -> np.ndarray:
    """Log-probabilities [n, a] of single-token answers right after each request."""
    wanted = [token_ids(tokenizer, answer, begin=False)[-1] for answer in answers]
    encoded = [token_ids(tokenizer, request) for request in requests]
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))  # little padding
    logs = np.zeros((len(encoded), len(wanted)))
    for start in progress(range(0, len(order), batch_size), desc="judge"):
        places = order[start : start + batch_size]
        batch = left_padded(tokenizer, [encoded[place] for place in places], model.device)
        logits = model(**batch, logits_to_keep=1).logits[:, -1].float()
        logs[places] = logits.log_softmax(-1)[:, wanted].cpu().numpy()
    return logs


class BayesRisk:
    """Minimum Bayes risk: of the other methods' answers and the bank, the text with the highest expected SCS.

    What is expected comes from the embedding method's posterior (Kumar and Byrne, 2004, for translation).
    """

    name = "mbr"

    def __init__(self, embedding: EmbeddingRecoverer) -> None:
        self.embedding = embedding

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The best of each row's candidates."""
        posterior = self.embedding.posterior(table)
        banked = [self.embedding.bank[place] for place in choose(posterior, self.embedding.vectors)]
        return Chooser(self.name, lambda _, candidates: self.expected(posterior, candidates)).recover(
            table.assign(**{answer_column("bank"): banked})
        )

    def expected(self, posterior: Posterior, candidates: np.ndarray) -> np.ndarray:
        """Mean SCS of candidates [n, m] under each row's belief, [n, m]."""
        vectors = encode_candidates(self.embedding.scorer, candidates)
        return np.stack([posterior.value(row, options) for row, options in enumerate(vectors)])


# --- what METHODS builds


def _asked(task: Task, path: str) -> Asked:
    """A language model that rates, with the settings that suit the task."""
    settings = preset(task.profile, ChoosingSettings(), GPU, seed=task.seed)
    return Asked(load_model(path), load_tokenizer(path), task.profile.chat, settings)


def build_agreement(task: Task) -> Chooser:
    """The answer most like the other ones."""
    return Chooser("agreement", lambda _, candidates: agreement(candidates, task.scorer))


def build_judge(task: Task) -> Chooser:
    """The answer that the base model calls the right one."""
    return Chooser("judge", _asked(task, task.profile.base_model).judge)


def build_likelihood(task: Task, contrastive: bool = False) -> Chooser:
    """The answer under which the rewriter finds the rewrite most probable; offline the base model stands for it."""
    profile = task.profile
    asked = _asked(task, profile.rewriter_model if profile.rewriter == "hf" else profile.base_model)
    if not contrastive:
        return Chooser("forward-likelihood", asked.likelihood)
    distinct = task.train.drop_duplicates("rewrite_prompt")
    references = distinct.sample(min(asked.settings.references, len(distinct)), random_state=asked.settings.seed)
    return Chooser("contrastive-likelihood", lambda table, candidates: asked.contrast(table, candidates, references))


def build_mbr(task: Task) -> BayesRisk:
    """The candidate with the highest expected score."""
    return BayesRisk(build_embedding(task))
