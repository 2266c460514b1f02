"""From what is believed of a prompt to a string: bank prompts joined, then a search where there is time for one.

Both maximise the same, the mean SCS under the row's posterior. (Tried and left out: strings searched once for the centres
of what all rows believe. Rows believe too differently: on real rows such strings scored below joined prompts.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from promptrec.predictor import Posterior, choose
from promptrec.scoring import Scorer, unit
from promptrec.search_encoders import encoder_of
from promptrec.text_features import words


@dataclass(frozen=True)
class DecodingSettings:
    """How much is spent on finding strings.

    The gradient search of each row is off by default: on one core a row takes over a second for 100 evaluations.
    """

    joined: int = 5  # texts that an answer may be joined of
    tried: int = 8  # joins encoded at every step
    evaluations: int = 0  # strings a row that the search after that encodes
    level: str = "word"
    max_tokens: int = 100
    seed: int = 0


def join_prompts(
    posterior: Posterior,
    bank: Sequence[str],
    vectors: np.ndarray,
    scorer: Scorer,
    settings: DecodingSettings,
    answers: Sequence[Sequence[str]] = (),
) -> tuple[list[str], np.ndarray]:
    """Texts of a bank joined for the highest expected SCS of each row: texts and their unit embeddings [n, d].

    `answers` are each row's own: other methods' answers to it, tried for this row and for no other.

    Greedy. The encoder pools by mean, so a text that points along what is missing is worth trying; what counts is the
    embedding of the joined text itself, and a join that is not expected to score more is not made, nor one over
    `max_tokens`.
    """
    fits = lambda text: scorer.count_tokens(text) <= settings.max_tokens  # noqa: E731
    short = [fits(text) for text in bank]
    if any(short):
        bank, vectors = list(compress(bank, short)), vectors[short]
    own = [[one for one in dict.fromkeys(row) if fits(one)] for row in answers] or [[] for _ in posterior.weights]
    best = choose(posterior, vectors)
    texts, reached = [bank[index] for index in best], vectors[best].copy()
    _take_better(posterior, texts, reached, dict(enumerate(own)), scorer)
    growing = list(range(len(texts)))
    for _ in range(settings.joined - 1):
        near = _worth_trying(posterior.of(growing), reached[growing], vectors, settings.tried)
        joins = {
            row: [one for more in (*(bank[index] for index in tried), *own[row]) if fits(one := f"{texts[row]} {more}")]
            for row, tried in zip(growing, near, strict=True)
        }
        growing = _take_better(posterior, texts, reached, joins, scorer)
    return texts, reached


def _take_better(
    posterior: Posterior, texts: list[str], reached: np.ndarray, options: dict[int, list[str]], scorer: Scorer
) -> list[int]:
    """Put the best of each row's options where it is expected to score more than the row's text; the rows it did for."""
    tops, better = _best(posterior, options, scorer), []
    for (row, text), vector in zip(tops.items(), scorer.encode(list(tops.values())), strict=True):
        before, after = posterior.value(row, np.stack([reached[row], vector]))
        if after > before:
            texts[row], reached[row] = text, vector
            better.append(row)
    return better


def _worth_trying(posterior: Posterior, reached: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    """Bank prompts [n, count] that point along what each row's text [n, d] is missing."""
    wanted = posterior.slopes(reached)
    missing = unit(wanted - (wanted * reached).sum(1, keepdims=True) * reached) + 0.3 * wanted
    return np.argpartition(-missing @ vectors.T, min(count, len(vectors) - 1), axis=1)[:, :count]


def _best(posterior: Posterior, options: dict[int, list[str]], scorer: Scorer) -> dict[int, str]:
    """The best of each row's texts, by vectors that are good enough to rank by."""
    encoder, distinct = encoder_of(scorer), sorted({text for texts in options.values() for text in texts})
    vectors = encoder.encode(distinct, exact=False) if encoder else scorer.encode(distinct)
    known = dict(zip(distinct, vectors, strict=True))
    values = {
        row: posterior.value(row, np.stack([known[text] for text in texts])) for row, texts in options.items() if texts
    }
    return {row: options[row][int(found.argmax())] for row, found in values.items()}


def improve(
    posterior: Posterior,
    texts: list[str],
    bank: Sequence[str],
    scorer: Scorer,
    settings: DecodingSettings,
) -> list[str]:
    """Search on from a text for each row, where the scorer's encoder can be looked into and there is a budget."""
    from promptrec.token_search import SearchSettings, search_many

    encoder = encoder_of(scorer)
    if encoder is None or not settings.evaluations:
        return texts
    settings = SearchSettings(
        level=settings.level,
        evaluations=settings.evaluations,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        candidates=10 if settings.evaluations < 500 else 32,
        vocabulary=frequent_words(bank) if settings.level == "word" else (),
    )
    rows = [row for row, text in enumerate(texts) if encoder.count_tokens(text) <= settings.max_tokens]
    found = search_many(encoder, [posterior.objective(row) for row in rows], [texts[row] for row in rows], settings)
    better = {row: one.text for row, one in zip(rows, found, strict=True)}
    return [better.get(row, text) for row, text in enumerate(texts)]


def frequent_words(prompts: Sequence[str], size: int = 3000) -> tuple[str, ...]:
    """The most frequent words of the prompts: what a readable string is made of."""
    said = (word.strip("'") for prompt in prompts for word in words(prompt))
    return tuple(word for word, _ in Counter(word for word in said if len(word) > 1).most_common(size))
