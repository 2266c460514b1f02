"""Training a fine-tuned model on what its answers score: the reward, the rows asked, the model made ready.

Shared by PPO (ppo.py), RLOO and DPO (preferences.py); knows none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import disable_dropout_in_model

from promptrec.comparison import interval
from promptrec.data import slice_texts
from promptrec.errors import InputError
from promptrec.inference import CURRENT, LanguageModelRecoverer, normalise
from promptrec.language_model import GenerationSettings, token_ids
from promptrec.lora import adapters_in_fp32, load_adapters
from promptrec.prompting import settings_for
from promptrec.scoring import Scorer
from promptrec.templates import recovery_request
from promptrec.training_run import check_training

if TYPE_CHECKING:
    from promptrec.methods import Task

POLICY, REFERENCE = "default", "ref"  # adapters, as TRL names them
STICKY = ("</s>", "lucrarea")  # what raises sentence-t5's score of any answer: see "What the metric rewards"


@dataclass(frozen=True)
class TuningSettings:
    """What all ways of training on scores share; the defaults suit the tiny Gemma on a CPU."""

    # --- what is asked
    rows: int = 64  # training triples, of distinct prompts
    words: int = 50  # of each text, about what the adapter was trained on
    samples: int = 4  # answers drawn for a row
    new_tokens: int = 20
    temperature: float = 1.0
    banned: tuple = STICKY  # never generated; an answer that holds one of them earns nothing
    # --- optimisation
    steps: int = 12
    rows_a_step: int = 4
    at_once: int = 16  # answers in one forward pass; gradients of a step's passes add up
    learning_rate: float = 5e-4
    beta: float = 0.05  # price of straying from the reference
    clip: float = 1.0  # of the gradient's norm
    quantise: bool = True  # NF4 base
    gradient_checkpointing: bool = False
    seed: int = 0


REAL = {
    "rows": 2000,
    "words": 200,
    "new_tokens": 40,
    "learning_rate": 1e-5,
    "gradient_checkpointing": True,
}  # a 7B model


@dataclass
class TunedRecoverer(LanguageModelRecoverer):
    """A language model trained on scores, and how the training went: one dict a logged step."""

    history: list[dict] = field(default_factory=list)


class ScsReward:
    """SCS of answers, floored at 0; an answer that is blank or holds a banned word earns 0.

    Without the floor a banned answer would beat an honest one of negative cosine.
    """

    def __init__(self, scorer: Scorer, banned: Sequence[str] = STICKY) -> None:
        self.scorer, self.banned = scorer, [word.lower() for word in banned]

    def __call__(self, answers: Sequence[str], truth: Sequence[str]) -> np.ndarray:
        """Raw answers and true prompts, n each -> rewards [n] between 0 and 1."""
        texts = [normalise(answer, fallback="") for answer in answers]
        earns = np.array([bool(text) and not self.is_banned(raw) for text, raw in zip(texts, answers, strict=True)])
        return np.where(earns, np.maximum(self.scorer.scs([text or "-" for text in texts], list(truth)), 0.0), 0.0)

    def is_banned(self, answer: str) -> bool:
        """Whether the answer, as it was generated, holds a banned word."""
        return any(word in answer.lower() for word in self.banned)


def banned_ids(tokenizer: PreTrainedTokenizerBase, banned: Sequence[str]) -> list[list[int]] | None:
    """Token sequences that spell a banned word, alone or after a space: generation's `bad_words_ids` (None: nothing)."""
    spelt = {tuple(token_ids(tokenizer, space + word, begin=False)) for word in banned for space in ("", " ")}
    return [list(ids) for ids in sorted(spelt)] or None


def asked(train: pd.DataFrame, chat: str, settings: TuningSettings) -> pd.DataFrame:
    """`settings.rows` training rows of distinct prompts, in random order, with the column `request`.

    Raises InputError for missing columns, blank cells or no rows.
    """
    check_training(train)
    if train.empty:
        raise InputError("no training triples to draw answers for")
    rows = train.sample(frac=1, random_state=settings.seed).drop_duplicates("rewrite_prompt").head(settings.rows)
    texts = slice_texts(rows, settings.words)[["original_text", "rewritten_text"]]
    return rows.assign(request=[recovery_request(*pair, chat) for pair in texts.itertuples(index=False)])


def tunable(
    base_model: str, adapter: object, settings: TuningSettings, reference: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Base and fine-tuned adapter, ready to be trained on; with `reference`, a frozen copy of the adapter beside it.

    In training mode without dropout from here on: evaluation mode packs 4-bit weights into a layout without gradients
    on CPUs that know bf16, and dropout would make the policy differ from what was sampled.
    """
    names = [POLICY, REFERENCE] if reference else [POLICY]
    model, tokenizer = load_adapters(base_model, dict.fromkeys(names, adapter), settings.quantise)
    model.set_adapter(POLICY, inference_mode=False)
    return ready(model, tokenizer, settings), tokenizer


def ready(model: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: TuningSettings) -> PeftModel:
    """The model in training mode, without dropout, and with the banned words out of its reach."""
    disable_dropout_in_model(model)
    model.get_base_model().generation_config.bad_words_ids = banned_ids(tokenizer, settings.banned)
    return adapters_in_fp32(model).train()


def curve_point(step: int, rewards: np.ndarray, groups: Sequence, **more: object) -> dict[str, object]:
    """A step of a learning curve: mean reward with a bootstrap interval over `groups` (rows asked), and `more`."""
    mean, low, high = interval(np.asarray(rewards), groups)
    return {"step": step, "mean": mean, "low": low, "high": high, **more}


def answering(
    task: Task,
    name: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TuningSettings,
    **more: object,
) -> TunedRecoverer:
    """The model as it is, as a recoverer that is asked as all prompted models are; `more` is its history."""
    reading = settings_for(task.profile, seed=settings.seed)
    generation = GenerationSettings(reading.new_tokens, reading.batch_size, seed=reading.seed)
    return TunedRecoverer(
        model,
        tokenizer,
        name,
        CURRENT,
        chat=task.profile.chat,
        settings=generation,
        longest_text=reading.text_words,
        **more,
    )
