"""A small PPO: clipped surrogate, value head, generalised advantages, and a KL penalty towards a reference policy.

`ppo` trains any Policy; LanguageModelPolicy makes one of a language model with an adapter. SCS is the reward, given at
an answer's last token. Sources: Schulman et al., Proximal Policy Optimization, 2017, and High-Dimensional Continuous
Control Using Generalized Advantage Estimation, 2016; Ziegler et al., Fine-Tuning Language Models from Human
Preferences, 2019 (the KL penalty as part of the reward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from promptrec.errors import InputError
from promptrec.language_model import compute_dtype, left_padded, load_model, load_tokenizer, stop_ids, token_ids
from promptrec.lora import LoraSettings, attach_adapter
from promptrec.profiles import override, preset
from promptrec.rewards import (
    REAL,
    REFERENCE,
    ScsReward,
    TunedRecoverer,
    TuningSettings,
    answering,
    asked,
    curve_point,
    ready,
    tunable,
)
from promptrec.small_models import shuffled_batches
from promptrec.tables import progress
from promptrec.templates import chat_of

if TYPE_CHECKING:
    from promptrec.methods import Task


@dataclass(frozen=True)
class PPOSettings(TuningSettings):
    """Proximal policy optimisation; the defaults suit the tiny Gemma on a CPU."""

    steps: int = 10
    epochs: int = 2  # passes over the answers of a step
    ratio_clip: float = 0.2  # how far a token's probability may move in a step before its gradient stops
    discount: float = 1.0
    smoothing: float = 0.95  # lambda of the generalised advantages
    value_rate: float = 1e-3  # learning rate of the value head
    value_price: float = 0.5  # weight of its loss
    row_mean: bool = False  # rewards less the mean of the row's other answers
    rank: int = 16  # of the fresh adapter, where the base model is trained


# Sampling needs the cache that gradient checkpointing switches off in training mode.
PPO_REAL = PPOSettings(**REAL | {"gradient_checkpointing": False}, steps=300, rows_a_step=8, at_once=2)


@dataclass
class Rollout:
    """Sampled answers as a policy gave them. n answers, at most a tokens each."""

    answers: Tensor  # [n, a] token ids
    mask: Tensor  # [n, a] 1.0 up to and with the token that ends the answer
    ids: Tensor | None = None  # [n, t] request and answer, where there is a request
    attention: Tensor | None = None  # [n, t]

    def part(self, rows: Tensor) -> Rollout:
        """Some of the answers."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return Rollout(**{name: None if value is None else value[rows] for name, value in values.items()})


class Policy(Protocol):
    """What PPO trains: something that samples, says how probable a sample is, and what it expects to earn."""

    def sample(self, batch: object) -> Rollout: ...

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probability of each token and the value before it, [n, a] each, with gradients."""

    def reference(self, rollout: Rollout) -> Tensor:
        """Log-probability of each token under the policy not to stray from, [n, a]."""

    def groups(self) -> list[dict]:
        """Parameters and learning rates, as torch's optimisers take them."""


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, smoothing: float) -> Tensor:
    """Generalised advantages [n, a]: discounted sums of r(t) + discount v(t+1) - v(t), by (discount smoothing)^k.

    All arguments [n, a]; after an answer's end there is nothing to earn and nothing expected.
    """
    running, following, found = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0]), []
    for step in reversed(range(rewards.shape[1])):
        error = rewards[:, step] + discount * following - values[:, step]
        running = (error + discount * smoothing * running) * mask[:, step]
        following = values[:, step] * mask[:, step]
        found.append(running)
    return torch.stack(found[::-1], dim=1)


def clipped_loss(new: Tensor, old: Tensor, gains: Tensor, mask: Tensor, ratio_clip: float) -> Tensor:
    """-min(ratio A, clip(ratio) A), the mean over an answer's tokens of all answers; ratio = exp(new - old)."""
    ratio = (new - old).exp()
    worth = torch.minimum(ratio * gains, ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * gains)
    return -masked_mean(worth, mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens in the mask, a scalar."""
    return (values * mask).sum() / mask.sum()


def less_row_mean(scores: Tensor, samples: int) -> Tensor:
    """Scores [n], `samples` in a row to each request, less the mean of the request's other scores."""
    grouped = scores.view(-1, samples)
    others = (grouped.sum(1, keepdim=True) - grouped) / max(1, samples - 1)
    return (grouped - others).view(-1)


def token_rewards(scores: Tensor, straying: Tensor, mask: Tensor, beta: float) -> Tensor:
    """What each token earns, [n, a]: -beta times its log-ratio to the reference; the last one the score [n], too."""
    rewards, last = -beta * straying * mask, mask.sum(1).long() - 1
    rewards[torch.arange(len(scores)), last] += scores.to(rewards)
    return rewards


def ppo(
    policy: Policy,
    batches: Iterable,
    reward: Callable[[Rollout, object], np.ndarray],
    settings: PPOSettings,
) -> list[dict]:
    """Train a policy, one step a batch; returns the history: step, mean, low, high (reward), kl (nats a token).

    `reward(rollout, batch)` scores the answers [n]; the `samples` answers to one request follow each other.
    """
    optimizer, history = torch.optim.AdamW(policy.groups(), weight_decay=0.0), []
    scaler = torch.amp.GradScaler("cuda", enabled=torch.cuda.is_available() and compute_dtype() == torch.float16)
    for step, batch in enumerate(batches, start=1):
        with torch.no_grad():
            rollout = policy.sample(batch)
            old, values = in_parts(policy.evaluate, rollout, settings.at_once)
            straying = old - in_parts(policy.reference, rollout, settings.at_once)[0]
        scores = np.asarray(reward(rollout, batch))
        kl = masked_mean(straying, rollout.mask).item()
        history.append(curve_point(step, scores, np.arange(len(scores)) // settings.samples, kl=kl))
        scores = torch.as_tensor(scores, dtype=old.dtype)
        scores = less_row_mean(scores, settings.samples) if settings.row_mean else scores
        earned = token_rewards(scores, straying, rollout.mask, settings.beta)
        gains = advantages(earned, values, rollout.mask, settings.discount, settings.smoothing)
        improve(policy, optimizer, scaler, rollout, old, gains, gains + values, settings)
    return history


def in_parts(measure: Callable, rollout: Rollout, at_once: int) -> list[Tensor]:
    """What `measure(rollout)` returns, computed for `at_once` answers at a time."""
    parts = [measure(rollout.part(rows)) for rows in torch.arange(len(rollout.answers)).split(at_once)]
    parts = [part if isinstance(part, tuple) else (part,) for part in parts]
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def improve(
    policy: Policy, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, rollout: Rollout, old: Tensor,
    gains: Tensor, returns: Tensor, settings: PPOSettings,
) -> None:  # fmt: skip
    """`epochs` optimiser steps on one rollout; gradients of its parts add up, each by its share of the tokens."""
    mean = masked_mean(gains, rollout.mask)
    spread = masked_mean((gains - mean) ** 2, rollout.mask).sqrt()
    gains = (gains - mean) / (spread + 1e-8)
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        for rows in torch.arange(len(old)).split(settings.at_once):
            part = rollout.part(rows)
            new, values = policy.evaluate(part)
            missed = masked_mean((values - returns[rows]) ** 2, part.mask)
            loss = clipped_loss(new, old[rows], gains[rows], part.mask, settings.ratio_clip)
            share = part.mask.sum() / rollout.mask.sum()
            scaler.scale(share * (loss + settings.value_price * missed)).backward()
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], settings.clip)
        scaler.step(optimizer)
        scaler.update()


class LanguageModelPolicy:
    """A language model with an adapter, and a linear value head on its last hidden states.

    `reference` names the frozen adapter not to stray from; None is the base model. The value head's gradient stops at
    the hidden states: what it has to learn does not disturb the policy.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PPOSettings,
        chat: str = "gemma",
        reference: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.reference_adapter = model, tokenizer, settings, reference
        self.ends = [tokenizer.eos_token_id, *stop_ids(tokenizer, chat_of(chat).after_model)]
        self.value = nn.Linear(model.config.hidden_size, 1).to(model.device)
        nn.init.zeros_(self.value.weight)

    def sample(self, batch: pd.DataFrame) -> Rollout:
        """`samples` answers to each row's `request`, drawn from the model as it is."""
        rows = [
            token_ids(self.tokenizer, request) for request in batch["request"] for _ in range(self.settings.samples)
        ]
        padded = left_padded(self.tokenizer, rows, self.model.device)
        ids = self.model.generate(
            **padded,
            do_sample=True,
            temperature=self.settings.temperature,
            top_k=0,
            max_new_tokens=self.settings.new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        answers = ids[:, padded["input_ids"].shape[1] :]
        ended = torch.isin(answers, torch.tensor(self.ends, device=ids.device)).long()
        mask = (ended.cumsum(1) - ended == 0).float()  # nothing ended before this token
        return Rollout(answers, mask, ids, torch.cat([padded["attention_mask"], mask.long()], dim=1))

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        base = self.model.get_base_model()
        hidden = base.model(input_ids=rollout.ids, attention_mask=rollout.attention, use_cache=False).last_hidden_state
        # the states that the answer's tokens were drawn from; of a model on two cards they lie on the last one
        before = hidden[:, -rollout.answers.shape[1] - 1 : -1].to(rollout.answers.device)
        logits = base.lm_head(before).to(before.device).float() / self.settings.temperature
        log_probs = logits.log_softmax(-1).gather(2, rollout.answers[..., None])[..., 0]
        return log_probs, self.value(before.detach().float())[..., 0]

    def reference(self, rollout: Rollout) -> Tensor:
        with use_adapter(self.model, self.reference_adapter):
            return self.evaluate(rollout)[0]

    def groups(self) -> list[dict]:
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return [
            {"params": trained, "lr": self.settings.learning_rate},
            {"params": list(self.value.parameters()), "lr": self.settings.value_rate},
        ]

    def texts(self, rollout: Rollout) -> list[str]:
        """The answers as text, without the mark that ends them."""
        kept = [ids[: int(length)] for ids, length in zip(rollout.answers.tolist(), rollout.mask.sum(1), strict=True)]
        return [self.tokenizer.decode([one for one in ids if one not in self.ends]) for ids in kept]


def batches_of(rows: pd.DataFrame, settings: PPOSettings) -> Iterable[pd.DataFrame]:
    """`steps` batches of `rows_a_step` rows: all rows in random order, then again in another."""
    numbers = shuffled_batches(len(rows), settings.rows_a_step, settings.steps, settings.seed)
    return (rows.iloc[batch] for batch in progress(numbers, total=settings.steps, desc="ppo"))


def build(task: Task, start: str = "base", **changes: object) -> TunedRecoverer:
    """PPO from the `base` model, as the paper has it, or from the `tuned` one with the row's mean as baseline.

    `changes` are settings. Raises InputError for another start, or where there is no adapter to start from.
    """
    if start not in ("base", "tuned"):
        raise InputError(f"start {start!r} is unknown; choose base or tuned")
    tuned, profile = start == "tuned", task.profile
    settings = preset(profile, PPOSettings(), PPO_REAL, seed=task.seed, **{"row_mean": tuned} | changes)
    rows, reward = asked(task.train, profile.chat, settings), ScsReward(task.scorer, settings.banned)
    torch.manual_seed(settings.seed)
    if tuned:
        model, tokenizer = tunable(profile.base_model, task.adapter, settings, reference=True)
    else:
        tokenizer = load_tokenizer(profile.base_model)
        fresh = override(LoraSettings(), rank=settings.rank, quantise=settings.quantise, seed=settings.seed)
        model = ready(attach_adapter(load_model(profile.base_model, settings.quantise), fresh), tokenizer, settings)
    policy = LanguageModelPolicy(model, tokenizer, settings, profile.chat, REFERENCE if tuned else None)
    score = lambda rollout, batch: reward(policy.texts(rollout), batch["rewrite_prompt"].repeat(settings.samples))  # noqa: E731
    history = ppo(policy, batches_of(rows, settings), score, settings)
    return answering(task, f"ppo-{start}", model.eval(), tokenizer, settings, history=history)
