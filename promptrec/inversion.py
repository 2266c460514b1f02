"""Inversion: a decoder that writes a prompt from an embedding, trained on prompts alone, fed the predicted one.

The vector becomes a few prefix vectors before a small causal LM (GEIA, Li et al., Sentence embedding leaks more
information than you expect, 2023; vec2text, Morris et al., 2023; the competition's 4th place). At test time the vector
is a prediction, so it is trained on vectors with noise. What it writes may be polished by a token search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import get_cosine_schedule_with_warmup

from promptrec.decoding import DecodingSettings, improve
from promptrec.embedding import EmbeddingRecoverer, build_embedding
from promptrec.errors import InputError
from promptrec.inference import answer_column, check_pairs, normalise
from promptrec.language_model import load_model, load_tokenizer, token_ids
from promptrec.predictor import Posterior
from promptrec.profiles import preset
from promptrec.scoring import Scorer
from promptrec.sft_trainer import LengthGroupedSampler
from promptrec.tables import progress, require_columns

if TYPE_CHECKING:
    from promptrec.methods import Task


@dataclass(frozen=True)
class InversionSettings:
    """How the decoder is trained and asked; the defaults suit the tiny Gemma on a CPU, `REAL_SIZE` GPT-2 on a GPU."""

    decoder: str = ""  # a causal LM's folder or name; empty: the profile's base model
    prefix: int = 4  # vectors that the embedding becomes
    # --- training
    steps: int = 180
    batch_size: int = 24
    learning_rate: float = 4e-3
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    noise: float = 1.0  # of the vectors in training: 1 is as large as the predictor's error
    calibration_rows: int = 64  # held-out triples that this error is measured on
    # --- answering
    max_tokens: int = 32
    samples: int = 3  # beside the greedy answer; the best by expected SCS is kept
    temperature: float = 0.7
    answered: int = 128  # rows decoded together
    evaluations: int = 30  # strings a row that polishing may encode
    seed: int = 0


REAL_SIZE = InversionSettings(
    decoder="openai-community/gpt2",
    prefix=8,
    steps=20_000,
    batch_size=128,
    learning_rate=2e-4,
    samples=16,
    evaluations=100,
)


class EmbeddingDecoder(nn.Module):
    """A causal LM behind a linear map of a unit vector [d] to prefix vectors [k, width]; all of it is trained."""

    def __init__(self, path: str, dimensions: int, prefix: int) -> None:
        super().__init__()
        self.model, self.tokenizer = load_model(path, quantise=False).float(), load_tokenizer(path)
        self.embed = self.model.get_input_embeddings()
        self.prefix = nn.Linear(dimensions, prefix * self.embed.embedding_dim).to(self.model.device)
        tokens = self.embed(torch.arange(self.embed.num_embeddings, device=self.model.device))
        nn.init.normal_(self.prefix.weight, std=tokens.std().item())  # a unit vector becomes as large as tokens are

    def prefixed(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [n, d] as what the model reads in place of tokens, [n, k, width]."""
        return self.prefix(vectors.to(self.prefix.weight)).view(len(vectors), -1, self.embed.embedding_dim)

    def encode(self, prompt: str, max_tokens: int) -> torch.Tensor:
        """Token ids of a prompt, cut, with the end mark, [t]."""
        ids = token_ids(self.tokenizer, prompt, begin=False)[: max_tokens - 1]
        return torch.tensor([*ids, self.tokenizer.eos_token_id])

    def forward(self, vectors: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of the prompts' tokens (a list of n rows of ids) given their vectors [n, d]."""
        labels = pad_sequence(list(rows), batch_first=True, padding_value=-100).to(self.model.device)  # [n, t]
        prefix = self.prefixed(vectors)
        read = torch.cat(
            [prefix, self.embed(labels.clamp(min=0))], 1
        )  # padding follows: what is labelled never sees it
        labels = torch.cat([labels.new_full(prefix.shape[:2], -100), labels], 1)
        return self.model(inputs_embeds=read, labels=labels, use_cache=False).loss

    @torch.inference_mode()
    def write(
        self, vectors: np.ndarray, max_tokens: int, samples: int = 0, temperature: float = 1.0
    ) -> list[list[str]]:
        """Texts for each vector [n, d]: the greedy one, or so many samples."""
        read = self.prefixed(torch.as_tensor(vectors))
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": samples}
        ids = self.model.eval().generate(
            inputs_embeds=read,
            attention_mask=torch.ones(read.shape[:2], dtype=torch.long, device=read.device),
            max_new_tokens=max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **(how if samples else {"do_sample": False}),
        )
        texts = [normalise(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [texts[start : start + max(samples, 1)] for start in range(0, len(texts), max(samples, 1))]


def noise_of(cosine: float) -> float:
    """Length of the noise, at right angles to a unit vector, that leaves it at this cosine to what it was."""
    return float(np.sqrt(1 / np.clip(cosine, 0.05, 1) ** 2 - 1))


def noisy(vectors: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors [n, d] with noise of a length drawn for each row between 0 and `most`, unit again."""
    n, d = vectors.shape
    length = most * torch.rand(n, 1, generator=generator) / d**0.5
    return nn.functional.normalize(vectors + length * torch.randn(n, d, generator=generator), dim=1)


def train_decoder(
    prompts: Sequence[str], vectors: np.ndarray, path: str, settings: InversionSettings, noise: float
) -> EmbeddingDecoder:
    """A decoder that writes prompts from their unit embeddings [n, d] with noise of a length of up to `noise`."""
    if not len(prompts):
        raise InputError("no prompts to train the inversion on")
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    decoder = EmbeddingDecoder(path, vectors.shape[1], settings.prefix).train()
    rows, vectors = [decoder.encode(prompt, settings.max_tokens) for prompt in prompts], torch.as_tensor(vectors)
    optimizer = torch.optim.AdamW(decoder.parameters(), settings.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(settings.warmup * settings.steps), settings.steps)
    for batch in progress(batches([len(row) for row in rows], settings), desc="inversion"):
        loss = decoder(noisy(vectors[batch], noise, generator), [rows[place] for place in batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
    return decoder.eval()


def batches(lengths: Sequence[int], settings: InversionSettings) -> list[list[int]]:
    """Places of the rows of each step: epochs of shuffled rows, those of like length together."""
    sampler, order = LengthGroupedSampler(lengths, settings.batch_size, settings.seed), []
    while len(order) < settings.steps * settings.batch_size:
        order += sampler
        sampler.set_epoch(sampler.epoch + 1)
    return [order[step * settings.batch_size :][: settings.batch_size] for step in range(settings.steps)]


class InversionRecoverer:
    """Writes the prompt from the embedding that a fitted EmbeddingRecoverer predicts.

    Of the greedy text and the samples the one with the highest mean SCS under the row's posterior is the answer.
    """

    name = "inversion"

    def __init__(self, scorer: Scorer, embedding: EmbeddingRecoverer, path: str, settings: InversionSettings) -> None:
        self.scorer, self.embedding, self.path, self.settings = scorer, embedding, settings.decoder or path, settings
        self.decoder: EmbeddingDecoder | None = None

    def fit(self, validation: pd.DataFrame) -> InversionRecoverer:
        """Train the decoder on the embedding's bank, with the noise that its predictions have on held-out triples."""
        if validation.empty:
            raise InputError("no validation triples to measure the inversion's noise on")
        rows = min(len(validation), self.settings.calibration_rows)
        held_out = validation.sample(rows, random_state=self.settings.seed)
        truth = self.scorer.encode(held_out["rewrite_prompt"].tolist())
        self.cosine = float((self.embedding.posterior(held_out).vectors * truth).sum(1).mean())
        noise = self.settings.noise * noise_of(self.cosine)
        bank = self.embedding
        self.decoder = train_decoder(bank.bank, bank.vectors, self.path, self.settings, noise)
        return self

    def write(self, vectors: np.ndarray) -> list[list[str]]:
        """Candidates for each vector [n, d]: the greedy text, then the samples."""
        if self.decoder is None:
            raise InputError("the inversion is not fitted; call fit first")
        settings, written = self.settings, []
        torch.manual_seed(settings.seed)
        for start in progress(range(0, len(vectors), settings.answered), desc=self.name):
            batch = vectors[start : start + settings.answered]
            texts = self.decoder.write(batch, settings.max_tokens)
            if settings.samples:
                drawn = self.decoder.write(batch, settings.max_tokens, settings.samples, settings.temperature)
                texts = [greedy + more for greedy, more in zip(texts, drawn, strict=True)]
            written += texts
        return written

    def recover(self, table: pd.DataFrame) -> list[str]:
        """The candidate that is expected to score most, for each row."""
        posterior = self.embedding.posterior(check_pairs(table))
        return choose_written(posterior, self.write(posterior.vectors), self.scorer)


class PolishedRecoverer:
    """Searches on from another method's answers towards the row's predicted vector, with few encodings a row."""

    def __init__(self, answers: str, embedding: EmbeddingRecoverer, settings: InversionSettings) -> None:
        self.answers, self.embedding, self.settings = answers, embedding, settings
        self.name = f"{answers}-polished"

    def recover(self, table: pd.DataFrame) -> list[str]:
        """One string for each row; it comes no less near to the vector than the answer it starts from."""
        column, found = answer_column(self.answers), self.embedding
        require_columns(table, [column], "the table")
        decoding = DecodingSettings(evaluations=self.settings.evaluations, seed=self.settings.seed)
        return improve(found.posterior(table).vectors, table[column].tolist(), found.bank, found.scorer, decoding)


def settings_of(task: Task) -> InversionSettings:
    """The settings for the task's profile and seed."""
    return preset(task.profile, InversionSettings(), REAL_SIZE, seed=task.seed)


def build(task: Task) -> InversionRecoverer:
    """The embedding method's prediction and a decoder trained on the task's bank."""
    return InversionRecoverer(task.scorer, build_embedding(task), task.profile.base_model, settings_of(task)).fit(
        task.validation
    )


def build_polished(task: Task, answers: str = "inversion") -> PolishedRecoverer:
    """A search that starts from the answers of `answers`."""
    return PolishedRecoverer(answers, build_embedding(task), settings_of(task))


def choose_written(posterior: Posterior, candidates: Sequence[Sequence[str]], scorer: Scorer) -> list[str]:
    """Minimum-Bayes-risk choice among each row's own candidates."""
    scorer.encode([text for texts in candidates for text in texts])  # at once, and known from here on
    best = [posterior.value(row, scorer.encode(texts)).argmax() for row, texts in enumerate(candidates)]
    return [texts[place] for texts, place in zip(candidates, best, strict=True)]
