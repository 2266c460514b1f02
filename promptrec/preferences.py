"""RLOO and DPO by TRL's trainers, from the fine-tuned adapter, which is also the reference not to stray from.

RLOO draws answers and reinforces those that score above the row's others. DPO learns from pairs of a better and a worse
answer: the model's own samples ranked by SCS, or the true prompt against another model's guess.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer
from trl.models.utils import disable_gradient_checkpointing

from promptrec.data import slice_texts
from promptrec.embedding import RetrievalRecoverer
from promptrec.errors import InputError
from promptrec.inference import LanguageModelRecoverer
from promptrec.language_model import GenerationSettings, compute_dtype, generate, load_tokenizer, stop_ids, token_ids
from promptrec.lora import adapters_in_fp32
from promptrec.profiles import preset
from promptrec.rewards import (
    POLICY,
    REAL,
    REFERENCE,
    ScsReward,
    TunedRecoverer,
    TuningSettings,
    answering,
    asked,
    banned_ids,
    curve_point,
    tunable,
)
from promptrec.templates import chat_of

if TYPE_CHECKING:
    from promptrec.methods import Task

CHECKPOINTS = {"use_reentrant": False}  # gradient checkpointing, where it is on


@dataclass(frozen=True)
class RLOOSettings(TuningSettings):
    """REINFORCE, each answer against the mean of the row's other answers."""


@dataclass(frozen=True)
class DPOSettings(TuningSettings):
    """Pairs of answers and how long they are trained on."""

    steps: int = 16
    at_once: int = 8  # pairs
    beta: float = 0.1
    least_gap: float = 0.005  # in SCS between a pair's answers; nearer ones are ties and dropped
    fitted_rows: int = 300  # triples that the other model learns from; none of them is in a pair
    evaluate_every: int = 8
    watched_rows: int = 24  # held-out rows answered at every evaluation; 0: none


RLOO_REAL = RLOOSettings(**REAL, steps=300, rows_a_step=8, at_once=4)
DPO_REAL = DPOSettings(
    **REAL, steps=250, rows_a_step=8, at_once=2, fitted_rows=4000, evaluate_every=50, watched_rows=64
)


def trainer_tokenizer(base_model: str, chat: str) -> PreTrainedTokenizerBase:
    """A tokenizer for TRL, to which an answer ends where the chat's turn does."""
    tokenizer = load_tokenizer(base_model)
    end = chat_of(chat).after_model
    stop_ids(tokenizer, end)
    tokenizer.eos_token = end
    return tokenizer


def begun(tokenizer: PreTrainedTokenizerBase, request: str) -> str:
    """The request as text that TRL's plain tokenizer(text) reads as language_model.token_ids does: begun once."""
    wanted = token_ids(tokenizer, request)
    return request if tokenizer(request)["input_ids"] == wanted else tokenizer.bos_token + request


def trainer_options(settings: TuningSettings, folder: str) -> dict[str, object]:
    """The arguments that all of TRL's trainers share."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "beta": settings.beta,
        "max_grad_norm": settings.clip,
        "optim": "adamw_torch",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": CHECKPOINTS,
        "disable_dropout": True,
        "use_cpu": not on_gpu,
        "fp16": on_gpu and compute_dtype() == torch.float16,
        "bf16": on_gpu and compute_dtype() == torch.bfloat16,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings.seed,
        "dataloader_pin_memory": on_gpu,
    }


def train_with(trainer: RLOOTrainer | DPOTrainer) -> list[dict]:
    """Run a TRL trainer and return its log. It starts from the adapter as it was, which TRL has rounded to bf16."""
    with torch.no_grad():
        for name, weight in adapters_in_fp32(trainer.model).named_parameters():
            if f".{POLICY}." in name:
                weight.copy_(trainer.model.get_parameter(name.replace(f".{POLICY}.", f".{REFERENCE}.")))
    trainer.remove_callback(PrinterCallback)  # the history holds the log
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def rloo(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    reward: ScsReward,
    settings: TuningSettings,
) -> list[dict]:
    """Train the adapter on its own samples; returns the history: step, mean, low, high (reward), kl (nats a token).

    Each row is answered `samples` times; an answer's advantage is its reward less the mean of the others'. The reward
    is charged `beta` times the log-ratio to the starting adapter. Source: Ahmadian et al., Back to Basics, 2024.
    """
    drawn = []

    def scs_of_answers(prompts, completions, truth, **_) -> list[float]:
        drawn.append((reward(completions, truth), truth))
        return drawn[-1][0].tolist()

    set_seed(settings.seed)
    answers = min(settings.rows_a_step, len(rows)) * settings.samples  # of a step
    at_once = min(settings.at_once, answers)
    if answers % at_once:
        raise InputError(f"a step's {answers} answers do not go evenly into passes of at_once={at_once}; change one")
    asked_for = {"prompt": [begun(tokenizer, request) for request in rows["request"]], "truth": rows["rewrite_prompt"]}
    with tempfile.TemporaryDirectory() as folder:
        arguments = RLOOConfig(
            **trainer_options(settings, folder),
            num_generations=settings.samples,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=answers // at_once,
            max_completion_length=settings.new_tokens,
            temperature=settings.temperature,
            generation_kwargs={"bad_words_ids": banned_ids(tokenizer, settings.banned)},
        )
        data = Dataset.from_dict({name: list(values) for name, values in asked_for.items()})
        trainer = RLOOTrainer(model, scs_of_answers, arguments, train_dataset=data, processing_class=tokenizer)
        log = train_with(trainer)
    return [
        curve_point(entry["step"], rewards, groups, kl=entry.get("kl"))
        for entry, (rewards, groups) in zip(log, drawn, strict=True)
    ]


def ranked_pairs(rows: pd.DataFrame, answers: np.ndarray, rewards: np.ndarray, least_gap: float) -> pd.DataFrame:
    """The best against the worst answer of each row: prompt, chosen, rejected; ties are dropped.

    answers, rewards: [n, k], k answers to each row. Raises InputError where all rows are ties.
    """
    best, worst = rewards.argmax(1), rewards.argmin(1)
    number = np.arange(len(rows))
    pairs = pd.DataFrame(
        {"prompt": rows["request"].to_numpy(), "chosen": answers[number, best], "rejected": answers[number, worst]}
    )
    apart = rewards[number, best] - rewards[number, worst] >= least_gap
    if not apart.any():
        raise InputError(f"no row's answers differ by {least_gap} in reward; draw more samples or lower least_gap")
    return pairs[apart].reset_index(drop=True)


def own_pairs(
    model, tokenizer, rows: pd.DataFrame, reward: ScsReward, chat: str, settings: DPOSettings
) -> pd.DataFrame:
    """Pairs of the model's own samples, ranked by their true SCS; one that was cut off is never the better one."""
    drawing = GenerationSettings(settings.new_tokens, 32, settings.temperature, settings.seed)
    requests = np.repeat(rows["request"].to_numpy(), settings.samples).tolist()
    drawn = generate(model, tokenizer, requests, drawing, stop=chat_of(chat).after_model, description="sample")
    rewards = reward(drawn, np.repeat(rows["rewrite_prompt"].to_numpy(), settings.samples))
    cut = [len(token_ids(tokenizer, text, begin=False)) >= settings.new_tokens for text in drawn]
    rewards = np.where(cut, 0.0, rewards)  # the trainer would end it where it was cut off
    shape = (len(rows), settings.samples)
    return ranked_pairs(rows, np.array(drawn, dtype=object).reshape(shape), rewards.reshape(shape), settings.least_gap)


def other_pairs(train: pd.DataFrame, rows: pd.DataFrame, reward: ScsReward, settings: DPOSettings) -> pd.DataFrame:
    """The true prompt against another model's guess: retrieval, fitted on triples that share no prompt with the pairs."""
    others = train[~train["rewrite_prompt"].isin(rows["rewrite_prompt"])]
    fitted = others.sample(min(settings.fitted_rows, len(others)), random_state=settings.seed)
    fitted, read = slice_texts(fitted, settings.words), slice_texts(rows, settings.words)
    guesses = RetrievalRecoverer(reward.scorer).fit(fitted).recover(read)
    answers = np.array([rows["rewrite_prompt"].tolist(), guesses], dtype=object).T
    rewards = np.stack([reward(column, rows["rewrite_prompt"]) for column in answers.T], axis=1)
    return ranked_pairs(rows, answers, rewards, settings.least_gap)


class Watch(TrainerCallback):
    """Answers held-out rows at step 0 and every so many steps, and notes the rewards."""

    def __init__(self, recoverer: LanguageModelRecoverer, rows: pd.DataFrame, reward: ScsReward, every: int) -> None:
        self.recoverer, self.rows, self.reward, self.every, self.points = recoverer, rows, reward, every, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.note(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.note(state.global_step)

    def note(self, step: int) -> None:
        if len(self.rows):
            base = self.recoverer.model.get_base_model()
            with disable_gradient_checkpointing(base, CHECKPOINTS):  # with it, generation has no cache
                answers = self.recoverer.recover(self.rows)
            rewards = self.reward(answers, self.rows["rewrite_prompt"])
            self.points[step] = curve_point(step, rewards, self.rows["rewrite_prompt"])


def dpo(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, watch: Watch, settings: DPOSettings
) -> list[dict]:
    """Train the adapter to prefer `chosen` to `rejected`; returns the history: step, loss, accuracy, margin, reward.

    accuracy: share of a step's pairs whose chosen answer gained more log-probability over the starting adapter; margin:
    by how much, times `beta`; mean, low, high: rewards of greedy answers on held-out rows, where they were asked.
    Source: Rafailov et al., Direct Preference Optimization, 2023.
    """
    set_seed(settings.seed)
    disable_progress_bar()
    at_once = min(settings.at_once, settings.rows_a_step)
    if settings.rows_a_step % at_once:
        raise InputError(f"dpo: at_once={settings.at_once} does not divide {settings.rows_a_step} rows a step")
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            **trainer_options(settings, folder),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=settings.rows_a_step // at_once,
            max_length=None,
        )
        data = Dataset.from_pandas(pairs.assign(prompt=[begun(tokenizer, request) for request in pairs["prompt"]]))
        trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
        log = train_with(trainer)
    told = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    steps = {entry["step"]: {ours: entry[key] for key, ours in told.items()} for entry in log}
    return [
        {"step": step} | steps.get(step, {}) | watch.points.get(step, {}) for step in sorted({*steps, *watch.points})
    ]


def build_rloo(task: Task, **changes: object) -> TunedRecoverer:
    """The fine-tuned model, trained on by RLOO; `changes` are settings."""
    settings, profile = preset(task.profile, RLOOSettings(), RLOO_REAL, seed=task.seed, **changes), task.profile
    rows = asked(task.train, profile.chat, settings)
    model, tokenizer = tunable(profile.base_model, task.adapter, settings)
    trainer_side = trainer_tokenizer(profile.base_model, profile.chat)
    history = rloo(model, trainer_side, rows, ScsReward(task.scorer, settings.banned), settings)
    return answering(task, "rloo", model.eval(), tokenizer, settings, history=history)


def build_dpo(task: Task, pairs: str = "own", **changes: object) -> TunedRecoverer:
    """The fine-tuned model, trained on by DPO with pairs of its `own` samples, or with an`other` model's guesses.

    `changes` are settings. Raises InputError for other pairs, or where no two answers to a row differ.
    """
    if pairs not in ("own", "other"):
        raise InputError(f"pairs {pairs!r} are unknown; choose own or other")
    settings, profile = preset(task.profile, DPOSettings(), DPO_REAL, seed=task.seed, **changes), task.profile
    reward = ScsReward(task.scorer, settings.banned)
    if pairs == "other":  # half of the prompts are left to fit the other model on
        settings = replace(settings, rows=max(1, min(settings.rows, task.train["rewrite_prompt"].nunique() // 2)))
    rows = asked(task.train, profile.chat, settings)
    model, tokenizer = tunable(profile.base_model, task.adapter, settings)
    if pairs == "own":
        ranked = own_pairs(model, tokenizer, rows, reward, profile.chat, settings)
    else:
        ranked = other_pairs(task.train, rows, reward, settings)
    watched = answering(task, "dpo" if pairs == "own" else "dpo-other", model, tokenizer, settings)
    rows_watched = task.validation.sample(min(settings.watched_rows, len(task.validation)), random_state=settings.seed)
    watch = Watch(watched, rows_watched, reward, settings.evaluate_every)
    history = dpo(model, trainer_tokenizer(profile.base_model, profile.chat), ranked, watch, settings)
    model.eval()
    return replace(watched, history=history)
