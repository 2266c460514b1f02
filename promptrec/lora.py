"""LoRA fine-tuning on a 4-bit base (QLoRA) with torch, peft, bitsandbytes and TRL's trainer.

The loss covers the answer only, and logits are computed at the answer's positions only: with Gemma's 256,000-entry
vocabulary the logits of a whole sequence, not the weights, are what fills a T4. The best checkpoint is the one with
the highest SCS on held-out prompt clusters, not the one with the lowest loss.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from promptrec.data import check_cells, text_id
from promptrec.errors import InputError
from promptrec.language_model import compute_dtype, load_model, load_tokenizer, stop_ids, token_ids
from promptrec.profiles import model_name
from promptrec.tables import full_disk_named, read_table, require_columns, write_json, write_table
from promptrec.templates import chat_of, recovery_answer, recovery_request

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
    # --- watching
    evaluate_every: int = 80
    validation_rows: int = 64
    report_to: str = "none"  # "tensorboard" or "wandb"
    seed: int = 0
    time_budget: float = 0.0  # seconds; 0: none. Training stops and saves before it is over


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


def encode_row(tokenizer: PreTrainedTokenizerBase, row: pd.Series, chat: str, max_tokens: int) -> dict[str, list[int]]:
    """input_ids and labels of one triple; labels are -100 on the request, so the loss covers the answer only.

    Texts too long for `max_tokens` are shortened word by word from their ends; the answer is never cut.
    """
    answer = tokenizer(recovery_answer(row["rewrite_prompt"], chat), add_special_tokens=False)["input_ids"]
    original, rewritten = row["original_text"], row["rewritten_text"]
    request = token_ids(tokenizer, recovery_request(original, rewritten, chat))
    while len(request) + len(answer) > max_tokens:
        share = (max_tokens - len(answer)) / len(request) * 0.95
        if share <= 0.05:
            raise InputError(
                f"max_tokens={max_tokens} leaves no room for the texts beside an answer of {len(answer)} tokens"
            )
        original, rewritten = (shorten(text, share) for text in (original, rewritten))
        request = token_ids(tokenizer, recovery_request(original, rewritten, chat))
    return {"input_ids": request + answer, "labels": [-100] * len(request) + answer}


def shorten(text: str, share: float) -> str:
    """The first `share` of a text's words, at least one."""
    words = text.split(" ")
    return " ".join(words[: max(1, int(len(words) * share))])


def encode_table(tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame, chat: str, max_tokens: int) -> Dataset:
    """All rows encoded. Raises InputError for missing columns, blank cells or an unfit tokenizer; no row is dropped."""
    columns = ["original_text", "rewrite_prompt", "rewritten_text"]
    require_columns(table, columns, "training data")
    check_cells(table.reset_index(drop=True), columns, "training data")
    stop_ids(tokenizer, chat_of(chat).after_model)
    rows = [encode_row(tokenizer, row, chat, max_tokens) for _, row in table.iterrows()]
    return Dataset.from_list(rows)


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
    logits = base.lm_head(hidden[:, :-1][answered]).float()  # [m, vocabulary]
    total = F.cross_entropy(logits, labels[answered].to(logits.device), reduction="sum")
    return total / (count if count is not None else answered.sum())


class LengthGroupedSampler(Sampler):
    """Shuffled rows whose batches hold texts of similar length, so that little is spent on padding.

    The order depends on (seed, epoch) alone; a run resumed in its third epoch sees the rows as the uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 16) -> None:
        self.lengths, self.batch_size, self.seed, self.pool, self.epoch = np.asarray(lengths), batch_size, seed, pool, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order, size = rng.permutation(len(self.lengths)), self.batch_size * self.pool
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        ordered = np.concatenate([pool[np.argsort(-self.lengths[pool], kind="stable")] for pool in pools])
        batches = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        full = len(self.lengths) // self.batch_size  # a last, shorter batch stays last
        order = [*rng.permutation(full), *range(full, len(batches))]
        return iter(np.concatenate([batches[number] for number in order]).tolist())


class AnswerOnlyTrainer(SFTTrainer):
    """TRL's SFTTrainer with the answer-only loss and SCS on held-out prompts as an evaluation metric."""

    def __init__(self, *args, held_out_scs: Callable[[PreTrainedModel], float] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.held_out_scs = held_out_scs
        self.model_accepts_loss_kwargs = True  # num_items_in_batch reaches compute_loss

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = answer_loss(self.accelerator.unwrap_model(model), inputs, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super(SFTTrainer, self).log(logs, *args, **kwargs)  # SFTTrainer's own adds metrics from whole-sequence logits

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.held_out_scs is not None:
            metrics["eval_scs"] = self.held_out_scs(self.model)
            self.log({"eval_scs": metrics["eval_scs"]})
        return metrics


class TimeBudget(TrainerCallback):
    """Stops training, after saving, before a notebook session is cut off."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started = seconds, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.seconds and time.monotonic() - self.started > self.seconds:
            control.should_save = control.should_evaluate = control.should_training_stop = True
        return control


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

    Checkpoints lie in `out`/checkpoints; started again with the same `out`, training goes on from the last one.
    A finished run is not repeated; a folder that holds a run with other settings or data is refused (InputError).
    `held_out_scs(model, tokenizer)` is called at every evaluation; without it the lowest loss decides.
    """
    settings, out = settings or LoraSettings(), Path(out)
    if claim_folder(out, settings, train, base_model):
        return read_table(out / "history.csv")
    set_seed(settings.seed)
    tokenizer = load_tokenizer(base_model)
    data = {
        name: encode_table(tokenizer, table, chat, settings.max_tokens)
        for name, table in (("train", train), ("eval", validation))
    }
    model = attach_adapter(load_model(base_model, settings.quantise), settings)
    score = (lambda current: held_out_scs(current, tokenizer)) if held_out_scs else None
    trainer = AnswerOnlyTrainer(
        model=model,
        args=training_arguments(settings, out / "checkpoints", by_scs=score is not None),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        held_out_scs=score,
        callbacks=[TimeBudget(settings.time_budget)],
    )
    adapters_in_fp32(trainer.model)
    trainer.remove_callback(PrinterCallback)  # the history holds the log
    with full_disk_named(out):
        trainer.train(resume_from_checkpoint=last_checkpoint(out / "checkpoints"))
        trainer.model.save_pretrained(out, safe_serialization=True)
        tokenizer.save_pretrained(out)
        history = training_history(trainer.state.log_history)
        write_table(history, out / "history.csv")
    del trainer, model  # a notebook loads the model again: free a single card's memory first
    gc.collect()
    torch.cuda.empty_cache()
    return history


def claim_folder(out: Path, settings: LoraSettings, train: pd.DataFrame, base_model: str | Path) -> bool:
    """Mark `out` as belonging to this run; True when the run is finished there already.

    Raises InputError when the folder belongs to another run: mixing two would resume one with the other's settings.
    """
    lasting = {key: value for key, value in asdict(settings).items() if key not in ("time_budget", "report_to")}
    digest = text_id(*train[["original_text", "rewrite_prompt", "rewritten_text"]].to_numpy().ravel())
    run = json.loads(json.dumps({"settings": lasting, "data": digest, "base_model": model_name(base_model)}))
    mark = out / "run.json"
    if mark.is_file() and (found := json.loads(mark.read_text())) != run:
        differs = [key for key in run if found.get(key) != run[key]]
        raise InputError(f"{out}: this folder holds a run with other {', '.join(differs)}; name a new one or remove it")
    write_json(run, mark)
    if not (out / "history.csv").is_file() or not (out / "adapter_model.safetensors").is_file():
        return False
    return int(read_table(out / "history.csv")["step"].max()) >= settings.steps


def training_arguments(settings: LoraSettings, folder: Path, by_scs: bool = True) -> SFTConfig:
    """The settings in the trainer's terms."""
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=int(settings.warmup * settings.steps),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.clip,
        optim=settings.optimizer,
        gradient_checkpointing=settings.gradient_checkpointing,
        eval_strategy="steps",
        save_strategy="steps",
        logging_steps=max(1, settings.evaluate_every // 5),
        eval_steps=settings.evaluate_every,
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_scs" if by_scs else "eval_loss",
        greater_is_better=by_scs,
        use_cpu=not on_gpu,
        fp16=on_gpu and compute_dtype() == torch.float16,
        bf16=on_gpu and compute_dtype() == torch.bfloat16,
        report_to=settings.report_to,
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, or None. A checkpoint is complete once its trainer state is written (last)."""
    complete = [path for path in Path(folder).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def training_history(log: Sequence[dict]) -> pd.DataFrame:
    """The trainer's log as one row a step: step, loss, eval_loss, scs, learning_rate (NaN where not measured)."""
    names = {"loss": "loss", "eval_loss": "eval_loss", "eval_scs": "scs", "learning_rate": "learning_rate"}
    rows: dict[int, dict] = {}
    for entry in log:
        rows.setdefault(entry["step"], {}).update({ours: entry[key] for key, ours in names.items() if key in entry})
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(names.values())).sort_index()
    return table.rename_axis("step").reset_index().astype({"step": np.int64})


def load_adapters(
    base_model: str, adapters: dict[str, str | Path], quantise: bool = True
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A base with several named adapters, the first one active; switch with model.set_adapter(name)."""
    for name, path in adapters.items():
        if not (Path(path) / "adapter_model.safetensors").is_file():
            raise InputError(
                f"adapter {name}: {path} has no adapter_model.safetensors; run Part 2 (promptrec finetune) or attach one"
            )
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
