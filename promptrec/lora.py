"""LoRA fine-tuning on a 4-bit base (QLoRA) with torch, peft, bitsandbytes and TRL's trainer.

By default the loss covers the answer only, and logits are computed at its positions only: with Gemma's 256,000-entry
vocabulary the logits of a whole sequence, not the weights, are what fills a T4. The best checkpoint is the one with
the highest SCS on held-out prompt clusters, not the one with the lowest loss.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from promptrec.distributed import barrier, first, from_first, sharded
from promptrec.errors import InputError
from promptrec.language_model import load_model, load_tokenizer, stop_ids, token_ids
from promptrec.sft_trainer import (
    AnswerOnlyTrainer,
    Bar,
    TimeBudget,
    last_checkpoint,
    training_arguments,
    training_history,
)
from promptrec.tables import full_disk_named, read_table, write_table
from promptrec.templates import chat_of
from promptrec.training_run import check_training, claim_folder, fit_texts

ADAPTER = "adapter_model.safetensors"
LOSSES = ("answer", "whole")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Fine-tuning settings; the defaults suit the tiny Gemma on a CPU, `T4` a 7B model on 2xT4."""

    # --- adapter
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple = ALL_LINEAR
    quantise: bool = True  # NF4 base
    # --- optimisation
    steps: int = 560
    learning_rate: float = 5e-3
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps
    batch_size: int = 16
    accumulation: int = 1
    clip: float = 1.0
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    # --- text
    max_tokens: int = 256
    loss: str = "answer"  # over the answer alone, or over the "whole" text, the request included
    # --- watching
    evaluate_every: int = 80
    validation_rows: int = 64
    report_to: str = "none"  # "tensorboard" or "wandb"
    seed: int = 0
    time_budget: float = 0.0  # seconds; 0: none. Training stops and saves before it is over

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InputError(f"loss {self.loss!r} is unknown; choose one of {', '.join(LOSSES)}")


T4 = LoraSettings(
    rank=64,
    alpha=16,
    dropout=0.1,
    steps=525,
    learning_rate=2e-4,
    schedule="constant",
    batch_size=1,
    accumulation=8,
    clip=0.3,
    optimizer="paged_adamw_8bit",
    gradient_checkpointing=True,
    max_tokens=1024,
    evaluate_every=75,
    time_budget=8.0 * 3600,
)


def encode_row(
    tokenizer: PreTrainedTokenizerBase, row: pd.Series, chat: str, max_tokens: int, loss: str = "answer"
) -> dict[str, list[int]]:
    """input_ids and labels of one triple; labels are -100 on the request, so the loss covers the answer only.

    With `loss` "whole" the request is labelled, too, and the model learns to write the two texts as well.
    Texts too long for `max_tokens` are shortened word by word from their ends; the answer is never cut.
    """
    request, answer = fit_texts(row, chat, partial(token_ids, tokenizer), max_tokens)
    hidden = [-100] * len(request) if loss == "answer" else request
    return {"input_ids": request + answer, "labels": hidden + answer}


def encode_table(
    tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame, chat: str, max_tokens: int, loss: str = "answer"
) -> Dataset:
    """All rows encoded. Raises InputError for missing columns, blank cells or an unfit tokenizer; no row is dropped."""
    check_training(table)
    stop_ids(tokenizer, chat_of(chat).after_model)
    return Dataset.from_list([encode_row(tokenizer, row, chat, max_tokens, loss) for _, row in table.iterrows()])


def attach_adapter(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """A fresh LoRA adapter in fp32 on a frozen base: W x + (alpha / rank) B A x, with B = 0 at the start.

    Source: Hu et al., LoRA, 2021. fp32, so that a resumed run goes on from what it saved.
    """
    if settings.quantise:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    model = get_peft_model(model, config)
    return adapters_in_fp32(model)


def adapters_in_fp32(model: PeftModel) -> PeftModel:
    """Cast what is trained to fp32. TRL casts adapters on a 4-bit base to bf16, while a resumed run reads fp32 ones."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def answer_loss(
    model: PeftModel, inputs: dict[str, torch.Tensor], count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross-entropy over the answer's tokens, with logits at those positions only.

    inputs: input_ids, attention_mask, labels, each [n, t]. Hidden states [n, t, d] are indexed where the next label
    is not -100 -> [m, d], then lm_head -> [m, vocabulary]: m is some 20 a row instead of t.
    `count` overrides the divisor (gradient accumulation divides by the answer tokens of all its batches).
    """
    labels = inputs["labels"][:, 1:]
    answered = labels != -100
    if not answered.any():
        raise InputError("a batch has no answer tokens: the labels are all masked; check the template")
    base = model.get_base_model()
    hidden = base.model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state
    # of a model on two cards, the hidden states lie on the last one and the labels on the first
    logits = base.lm_head(hidden[:, :-1][answered.to(hidden.device)]).float()  # [m, vocabulary]
    total = F.cross_entropy(logits, labels[answered].to(logits.device), reduction="sum")
    count = answered.sum() if count is None else count
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


def finetune(
    train: pd.DataFrame,
    validation: pd.DataFrame,
    base_model: str,
    out: str | Path,
    settings: LoraSettings | None = None,
    chat: str = "gemma",
    held_out_scs: Callable[[PreTrainedModel, PreTrainedTokenizerBase], float] | None = None,
) -> pd.DataFrame:
    """Fine-tune and save the best adapter (peft format) in `out`; returns the history: step, loss, eval_loss, scs, learning_rate.

    The processes of a launcher train together (DDP, FSDP or ZeRO). Their steps see the rows that one process would see,
    but for those that fill up an epoch's last batches.

    Checkpoints lie in `out`/checkpoints; started again with the same `out`, training goes on from the last one.
    A finished run is not repeated; a folder that holds a run with other settings or data is refused (InputError).
    `held_out_scs(model, tokenizer)` is called at every evaluation; without it, or where the weights are sharded (FSDP:
    a process cannot generate alone), the lowest loss decides.
    """
    settings, out = settings or LoraSettings(), Path(out)
    passing = ("time_budget", "report_to", *(["loss"] if settings.loss == "answer" else []))  # older runs name no loss
    if from_first(lambda: claim_folder(out, settings, train, base_model, ADAPTER, passing)):
        return read_table(out / "history.csv")
    set_seed(settings.seed)
    tokenizer = load_tokenizer(base_model)
    data = {
        name: encode_table(tokenizer, table, chat, settings.max_tokens, settings.loss)
        for name, table in (("train", train), ("eval", validation))
    }
    model = attach_adapter(load_model(base_model, settings.quantise), settings)
    score = (lambda current: held_out_scs(current, tokenizer)) if held_out_scs and not sharded() else None
    trainer = AnswerOnlyTrainer(
        model=model,
        args=training_arguments(settings, out / "checkpoints", by_scs=score is not None),
        rows_a_group=settings.batch_size,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        loss=answer_loss,
        held_out_scs=score,
        callbacks=[TimeBudget(settings.time_budget), Bar()],
    )
    adapters_in_fp32(trainer.model)
    trainer.remove_callback(PrinterCallback)  # the history holds the log
    with full_disk_named(out):
        trainer.train(resume_from_checkpoint=from_first(lambda: last_checkpoint(out / "checkpoints")))
        history = training_history(trainer.state.log_history)
        save_run(trainer, tokenizer, history, out)
    del trainer, model  # a notebook loads the model again: free a single card's memory first
    gc.collect()
    torch.cuda.empty_cache()
    return history


def save_run(trainer: AnswerOnlyTrainer, tokenizer: PreTrainedTokenizerBase, history: pd.DataFrame, out: Path) -> None:
    """Write adapter, tokenizer and history from the first process; sharded weights are gathered from all of them."""
    state = trainer.accelerator.get_state_dict(trainer.model) if sharded() else None
    if first():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(out)
        write_table(history, out / "history.csv")
    barrier()


def load_adapters(
    base_model: str, adapters: dict[str, str | Path], quantise: bool = True
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A base with several named adapters, the first one active; switch with model.set_adapter(name)."""
    for name, path in adapters.items():
        if not (Path(path) / ADAPTER).is_file():
            raise InputError(f"adapter {name}: {path} has no {ADAPTER}; run Part 2 (promptrec finetune) or attach one")
    (first, path), *others = adapters.items()
    model = PeftModel.from_pretrained(load_model(base_model, quantise), str(path), adapter_name=first)
    for name, other in others:
        model.load_adapter(str(other), adapter_name=name)
    return model.eval(), load_tokenizer(base_model)


def merge_adapter(base_model: str, adapter: str | Path, out: str | Path) -> Path:
    """Write a full model with the adapter folded into the full-precision base (never into the 4-bit one: that rounds twice)."""
    model, tokenizer = load_adapters(base_model, {"adapter": adapter}, quantise=False)
    model.merge_and_unload().save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    return Path(out)
