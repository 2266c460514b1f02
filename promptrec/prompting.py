"""Ways of asking a language model for the prompt: solved examples, forced openings, several answers and a choice.

Nothing is trained here. The model is the profile's base, or the one that was fine-tuned with an adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LogitsProcessor

from promptrec.errors import InputError
from promptrec.inference import LanguageModelRecoverer, normalise, pick_shots
from promptrec.language_model import (
    GenerationSettings,
    left_padded,
    load_model,
    load_tokenizer,
    stop_ids,
    token_ids,
    until_end,
)
from promptrec.profiles import Profile, preset
from promptrec.scoring import Scorer
from promptrec.shots import SimilarShots, diverse_shots, shot_pool
from promptrec.tables import progress
from promptrec.templates import chat_of

if TYPE_CHECKING:
    from promptrec.methods import Task


@dataclass(frozen=True)
class PromptingSettings:
    """How much the model reads and how often it answers; the defaults suit the tiny Gemma on a CPU, `LARGE` a 7B model."""

    # --- what is read
    text_words: int = 50  # of each text of the row
    shots: int = 2
    shot_words: int = 25  # of each text of a solved example
    pool: int = 1000  # triples that shots are chosen from
    likeness: str = "change"  # what makes a triple similar to a row; a key of shots.LIKENESS
    # --- what is answered
    new_tokens: int = 28
    batch_size: int = 24  # answers written at a time
    openings: tuple = ("Rewrite", "Turn", "Make")
    temperatures: tuple = (0.5, 0.8, 1.1)
    samples: int = 1  # at each temperature
    seed: int = 0


LARGE = PromptingSettings(text_words=300, shots=3, shot_words=60, pool=2000, new_tokens=40, batch_size=16, samples=4)


def settings_for(profile: Profile, **changes: object) -> PromptingSettings:
    """The profile's settings with changes."""
    return preset(profile, PromptingSettings(), LARGE, **changes)


# --- several answers


@dataclass(frozen=True)
class Way:
    """A way of answering: the words that the answer must begin with, and the temperature (0: the likeliest tokens)."""

    opening: str = ""
    temperature: float = 0.0


class InWays(LogitsProcessor):
    """Makes row r of a batch answer in way r % k: forced tokens first, then logits divided by the temperature.

    `openings` are the k openings' tokens, `width` is where answers begin.
    """

    def __init__(self, openings: Sequence[Sequence[int]], temperatures: Sequence[float], width: int) -> None:
        self.openings, self.temperatures, self.width = openings, temperatures, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [n * k, vocabulary] of the next token, all but the allowed ones at minus infinity."""
        step, scores = input_ids.shape[1] - self.width, scores.float().clone()
        for way, (opening, temperature) in enumerate(zip(self.openings, self.temperatures, strict=True)):
            rows = scores[way :: len(self.openings)]
            allowed = rows.argmax(1) if temperature == 0 else None
            if step < len(opening):
                allowed = torch.full((len(rows),), opening[step], device=rows.device)
            if allowed is None:
                rows /= temperature
            else:
                rows.fill_(-torch.inf).scatter_(1, allowed[:, None], 0.0)
        return scores


def answer_in_ways(
    model, tokenizer, requests: Sequence[str], ways: Sequence[Way], stop: str = "", new_tokens: int = 32
) -> tuple[list[list[str]], np.ndarray]:
    """Each request answered in each way: answers [n][k], and the mean log-probability (nats) of their tokens, [n, k].

    A request is read once, however many answers it gets. The probabilities are the model's own, at temperature 1 and
    with nothing forced; the mark that ends an answer counts as a token of it.
    """
    padded = left_padded(tokenizer, [token_ids(tokenizer, request) for request in requests], model.device)
    ids, mask = padded["input_ids"], padded["attention_mask"]  # [n, width]
    width, ends = ids.shape[1], [tokenizer.eos_token_id, *stop_ids(tokenizer, stop)]
    openings = [token_ids(tokenizer, way.opening, begin=False) if way.opening else [] for way in ways]
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.repeat_interleave(len(ways), 0),
            attention_mask=mask.repeat_interleave(len(ways), 0),
            past_key_values=_read(model, ids, mask, len(ways)),
            logits_processor=[InWays(openings, [way.temperature for way in ways], width)],
            do_sample=True,
            temperature=1.0,  # each way has its own
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens + max(map(len, openings)),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            return_dict_in_generate=True,
            output_logits=True,
        )
        nats = model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)  # [n * k, new]
    answered = output.sequences[:, width:]
    over = torch.isin(answered, torch.tensor(ends, device=answered.device)).long()
    told = over.cumsum(1) - over == 0  # up to the first end mark
    means = (nats.where(told, 0).sum(1) / told.sum(1)).cpu().numpy()
    texts = [until_end(text, tokenizer, stop) for text in tokenizer.batch_decode(answered)]
    groups = [texts[start : start + len(ways)] for start in range(0, len(texts), len(ways))]
    return groups, means.reshape(-1, len(ways))


def _read(model, ids: torch.Tensor, mask: torch.Tensor, times: int):
    """The cache after all tokens [n, width] but the last, each row `times` times."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=places[:, :-1],
        logits_to_keep=1,
        use_cache=True,
    ).past_key_values
    cache.batch_repeat_interleave(times)
    return cache


Choice = Callable[[list[str], np.ndarray], str]


def most_likely(answers: list[str], log_likelihood: np.ndarray) -> str:
    """The answer with the highest mean log-probability a token."""
    return answers[int(log_likelihood.argmax())]


def least_risk(scorer: Scorer) -> Choice:
    """The answer with the highest mean SCS to all of a row's answers: minimum Bayes risk, the samples being the belief.

    Source: Eikema and Aziz, Is MAP decoding all you need?, 2020, with SCS as the utility.
    """

    def choose(answers: list[str], log_likelihood: np.ndarray) -> str:
        vectors = scorer.encode(answers)
        return answers[int(((vectors @ vectors.T) ** 3).mean(1).argmax())]

    return choose


@dataclass
class SeveralAnswers(LanguageModelRecoverer):
    """A language model that answers each row in several ways; `choose` takes one of the answers."""

    ways: Sequence[Way] = (Way(),)
    choose: Choice = most_likely

    def _generate(self, requests: list[str], keep: Callable[[list[int], list[str]], None]) -> list[str]:
        settings, stop = self.settings or GenerationSettings(), chat_of(self.chat).after_model
        torch.manual_seed(settings.seed)
        started = time.monotonic()
        chosen, size = [""] * len(requests), max(1, settings.batch_size // len(self.ways))
        order = sorted(range(len(requests)), key=lambda row: len(requests[row]), reverse=True)  # little padding
        for start in progress(range(0, len(order), size), desc=self.name):
            if self.stop_after is not None and time.monotonic() - started > self.stop_after:
                break
            rows = order[start : start + size]
            with self._active():
                answers, likelihood = answer_in_ways(
                    self.model,
                    self.tokenizer,
                    [requests[row] for row in rows],
                    self.ways,
                    stop,
                    settings.max_new_tokens,
                )
            for row, said, nats in zip(rows, answers, likelihood, strict=True):
                texts = [normalise(text, fallback="") for text in said]
                good = [place for place, text in enumerate(texts) if text]  # blank ones would agree with each other
                if good:
                    chosen[row] = self.choose([texts[place] for place in good], np.asarray(nats)[good])
            keep(rows, [chosen[row] for row in rows])
        return chosen


# --- builders


def build_prompted(task: Task, shots: str = "", adapted: bool = False) -> LanguageModelRecoverer:
    """The model asked as it is, with the task's adapter, or with solved examples.

    These are chosen at "random", as "similar" to the row or as "diverse".
    """
    settings = settings_for(task.profile, seed=task.seed)
    name = {"": "" if adapted else "zero-shot", "random": "few-shot"}.get(shots, f"few-shot-{shots}")
    solved = _shots(task, shots, settings) if shots else ()
    if task.profile.in_keras:
        from promptrec.lora_keras import load_recoverer

        return load_recoverer(task.profile, _name(name, adapted), task.adapter if adapted else None, solved)
    return LanguageModelRecoverer(name=_name(name, adapted), shots=solved, **_asked(task, settings, adapted))


def build_opened(task: Task, opening: str, adapted: bool = False) -> SeveralAnswers:
    """The model's answer when it has to begin with `opening`. Source: 4th place, "Modify this text by"."""
    name = f"prefix-{opening.split()[0].lower()}"
    options = _asked(task, settings_for(task.profile, seed=task.seed), adapted)
    return SeveralAnswers(name=_name(name, adapted), ways=[Way(opening)], **options)


def build_opening_verbs(task: Task, adapted: bool = False) -> SeveralAnswers:
    """An answer for each of several opening verbs, of which the model's likeliest is taken. Source: 1st place's verbs."""
    settings = settings_for(task.profile, seed=task.seed)
    ways = [Way(opening) for opening in settings.openings]
    return SeveralAnswers(name=_name("opening-verbs", adapted), ways=ways, **_asked(task, settings, adapted))


def build_sampled(task: Task, adapted: bool = False) -> SeveralAnswers:
    """Samples at several temperatures, of which the one nearest to all others is taken."""
    settings = settings_for(task.profile, seed=task.seed)
    ways = [Way(temperature=heat) for heat in settings.temperatures for _ in range(settings.samples)]
    options = _asked(task, settings, adapted) | {"choose": least_risk(task.scorer)}
    return SeveralAnswers(name=_name("sampled", adapted), ways=ways, **options)


def _shots(task: Task, kind: str, settings: PromptingSettings):
    pool = shot_pool(task.train, settings.pool, settings.shot_words, settings.seed)
    if len(pool) < settings.shots:
        raise InputError(f"few-shot: {len(pool)} distinct training prompts for {settings.shots} shots; add triples")
    if kind == "similar":
        return SimilarShots(pool, settings.shots, settings.shot_words, settings.likeness)
    if kind == "diverse":
        return diverse_shots(pool, settings.shots, settings.seed)
    if kind != "random":
        raise InputError(f"shots {kind!r}: choose random, similar or diverse")
    return pick_shots(pool, settings.shots, settings.seed, settings.shot_words)


def _asked(task: Task, settings: PromptingSettings, adapted: bool) -> dict[str, object]:
    """The model, with the task's adapter or without, and how it is asked, as LanguageModelRecoverer's options."""
    profile = task.profile
    if adapted:
        from promptrec.lora import load_adapters

        model, tokenizer = load_adapters(profile.base_model, {"recovery": task.adapter})
    else:
        model, tokenizer = load_model(profile.base_model), load_tokenizer(profile.base_model)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "adapter": "recovery" if adapted else None,
        "settings": GenerationSettings(settings.new_tokens, settings.batch_size, seed=settings.seed),
        "chat": profile.chat,
        "longest_text": settings.text_words,
    }


def _name(name: str, adapted: bool) -> str:
    return "-".join(filter(None, ("fine-tuned" if adapted else "", name)))
