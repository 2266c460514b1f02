"""Make promptrec/assets/tiny-gemma: a Gemma of a few million parameters trained on this project's text alone.

    python scripts/train_tiny_gemma.py [--minutes 40] [--out promptrec/assets/tiny-gemma]

It learns to continue text and to follow a rewrite prompt in Gemma's turns. It never sees the recovery task, nor any
original or triple of the validation and test splits, nor the wordings that the series asks with (it is asked with the
grammar's `base` wordings). Besides rewriting it practises copying, and naming the kind of a text. Two cores, bf16
autocast; deterministic up to the number of steps that fit the minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import sentencepiece
import torch
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer

from promptrec.cleaning import strip_lead_in
from promptrec.data import shipped_originals, shipped_triples
from promptrec.profiles import ASSETS
from promptrec.prompt_bank import grammar_prompts, shipped_prompts
from promptrec.rewriters.rules import RulesRewriter
from promptrec.templates import chat_of, rewrite_request

VOCABULARY = 4096
WINDOW = 256  # tokens of a packed training row
INPUT_WEIGHT = 0.3  # language-modelling loss on the request beside loss 1 on the answer
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def spans(texts: list[str], rng: random.Random, count: int) -> list[str]:
    """Runs of whole sentences of 6 to 36 words, now and then with a sentence from elsewhere, so that no text is met
    often enough to be learned by heart: what is to be learned is to copy."""
    sentences = [[part.strip() for part in re.split(r"(?<=[.!?]) |\n+", text) if part.strip()] for text in texts]
    found = []
    while len(found) < count:
        ours = rng.choice(sentences)
        start = rng.randrange(len(ours))
        run = ours[start : start + rng.randint(1, 3)]
        if rng.random() < 0.3:
            run.insert(rng.randint(0, len(run)), rng.choice(rng.choice(sentences)))
        text = " ".join(run)
        if 6 <= len(text.split()) <= 36:
            found.append(text)
    return found


def rewriting_examples(texts: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """(request, answer) pairs made by the stand-in from the grammar's base wordings."""
    rng = random.Random(seed)
    prompts = grammar_prompts(3000, seed=seed, part="base")["rewrite_prompt"].tolist()
    originals, asked = spans(texts, rng, count), [rng.choice(prompts) for _ in range(count)]
    rewritten = RulesRewriter(seed=seed).rewrite(originals, asked)
    return [
        (rewrite_request(text, prompt, wrap=rng.randrange(3)), strip_lead_in(new))
        for text, prompt, new in zip(originals, asked, rewritten, strict=True)
    ]


def copying_examples(texts: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Texts and shuffled words to be repeated word for word: this is where copying is learned fastest."""
    rng = random.Random(seed + 1)
    words = sorted({word for text in texts for word in text.split()})
    salad = [" ".join(rng.choices(words, k=rng.randint(5, 24))) for _ in range(count // 2)]
    asked = ("Repeat this text", "Copy the text word for word", "Return the text unchanged", "Say it again")
    chosen = salad + spans(texts, rng, count - len(salad))
    return [(rewrite_request(text, rng.choice(asked), wrap=rng.randrange(3)), text) for text in chosen]


def kind_examples(originals: pd.DataFrame, count: int, seed: int) -> list[tuple[str, str]]:
    """Original texts whose kind is asked for ("a film plot"): an answer about a text, but none about a rewrite."""
    rng = random.Random(seed + 2)
    rows = originals[["text", "kind"]].to_numpy().tolist()
    pairs = [(spans([text], rng, 1)[0], kind) for text, kind in rng.choices(rows, k=count)]
    return [
        (rewrite_request(text, "What kind of text is this?", wrap=rng.randrange(3)), f"It is from a {kind}.")
        for text, kind in pairs
    ]


def train_tokenizer(texts: list[str], folder: Path) -> GemmaTokenizer:
    """A SentencePiece model that serves Keras and Hugging Face with the same ids."""
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus.txt"
        corpus.write_text("\n".join(text.replace("\n", " ") for text in texts), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(temporary) / "tokenizer"),
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n"],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        shutil.copy(Path(temporary) / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = GemmaTokenizer.from_pretrained(
        folder, add_bos_token=True, additional_special_tokens=["<start_of_turn>", "<end_of_turn>"]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


class Stream:
    """Endless packed batches: (ids, weights), each [rows, WINDOW + 1]."""

    def __init__(
        self, texts: list[list[int]], turns: list[tuple[list[int], list[int]]], share_of_turns: float, seed: int
    ) -> None:
        self.texts, self.turns, self.share, self.rng = texts, turns, share_of_turns, random.Random(seed)

    def row(self) -> tuple[list[int], list[float]]:
        ids, weights = [], []
        while len(ids) <= WINDOW:
            if self.rng.random() < self.share:
                request, answer = self.rng.choice(self.turns)
                ids += request + answer
                weights += [INPUT_WEIGHT] * len(request) + [1.0] * len(answer)
            else:
                text = self.rng.choice(self.texts)
                ids += text
                weights += [1.0] * len(text)
        return ids[: WINDOW + 1], weights[: WINDOW + 1]

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self.row() for _ in range(rows)]
        return torch.tensor([ids for ids, _ in pairs]), torch.tensor([weights for _, weights in pairs])


def weighted_loss(model: GemmaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, weighted: ids and weights [n, t + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def train(model: GemmaForCausalLM, stream: Stream, minutes: float, rows: int = 16, peak: float = 3e-3) -> dict:
    """Train for a wall-clock time under a cosine schedule over that time; returns steps and the last losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    started, step, losses = time.time(), 0, []
    while (share := (time.time() - started) / (60 * minutes)) < 1:
        rate = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = weighted_loss(model, *stream.batch(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            print(
                f"step {step}  {time.time() - started:.0f} s  loss {np.mean(losses[-50:]):.3f}  lr {rate:.1e}",
                flush=True,
            )
    return {"steps": step, "tokens": step * rows * WINDOW, "loss": round(float(np.mean(losses[-100:])), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--examples", type=int, default=30000)
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny-gemma")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    originals = shipped_originals().query("split == 'train'")
    triples = shipped_triples(["train"])
    texts = originals["text"].tolist() + [strip_lead_in(text) for text in triples["rewritten_text"]]
    examples = rewriting_examples(texts, args.examples, args.seed)
    others = copying_examples(texts, args.examples // 6, args.seed) + kind_examples(
        originals, args.examples // 12, args.seed
    )
    real = [
        (rewrite_request(row.original_text, row.rewrite_prompt), strip_lead_in(row.rewritten_text))
        for row in triples.itertuples()
    ]
    wordings = shipped_prompts()["rewrite_prompt"].tolist() + triples["rewrite_prompt"].tolist()
    tokenizer = train_tokenizer(texts * 2 + wordings + [answer for _, answer in examples[:4000]], args.out)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    bos, eos, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id], chat_of("gemma").after_model
    turns = [(bos + encode(request), encode(answer + end) + eos) for request, answer in examples + others + real * 3]
    turns = [(request, answer) for request, answer in turns if len(request) + len(answer) <= WINDOW]
    plain = [
        bos + encode(text) + eos
        for text in texts + ["\n".join(wordings[i : i + 8]) for i in range(0, len(wordings), 8)]
    ]

    torch.manual_seed(args.seed)
    model = GemmaForCausalLM(GemmaConfig(**CONFIG))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(turns)} turns, {len(plain)} texts", flush=True
    )
    report = train(model, Stream(plain, turns, 0.85, args.seed), args.minutes)
    model.to(torch.bfloat16).save_pretrained(args.out, safe_serialization=True)
    report |= {
        "parameters": model.num_parameters(),
        "minutes": args.minutes,
        "seed": args.seed,
        "turns": len(turns),
        "texts": len(plain),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(report)


if __name__ == "__main__":
    main()
