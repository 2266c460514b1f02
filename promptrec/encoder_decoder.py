"""An encoder reads the two texts, a decoder writes the prompt, and a bridge decides what the decoder gets to see.

Three bridges: "none" hands over BERT's hidden states as they are (EncoderDecoderModel); "pooled" is the paper's own (Gan et
al., 2024), one max-pooled vector through three linear layers; "sequence" keeps every token and encodes how the texts differ,
which is what the paper set out to capture. Teacher forcing in training, free running in answers.
Source: the encoder-decoder section of Gan et al., 2024; Rothe et al., 2020, for BERT with GPT-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertTokenizer,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.modeling_outputs import BaseModelOutput

from promptrec.errors import InputError
from promptrec.inference import check_pairs, normalise
from promptrec.profiles import preset
from promptrec.scoring import minilm_directory
from promptrec.small_models import IGNORED, autocast, check_training_texts, device, frame, load, optimise
from promptrec.tables import progress

if TYPE_CHECKING:
    from promptrec.methods import Task

BETWEEN, AFTER = "rewrite the previous text into", "using this prompt:"


@dataclass(frozen=True)
class EncoderDecoderSettings:
    """Encoder, bridge, decoder and their training; the defaults suit one CPU core, `BERT_GPT2` a GPU."""

    bridge: str = "none"  # or "pooled", "sequence"
    # --- models
    encoder: str = ""  # folder or name; empty: MiniLM's encoder
    decoder: str = ""  # folder or name of a GPT-2; empty: a small one from scratch
    decoder_layers: int = 2  # of the small one
    train_encoder: bool = False  # frozen, its hidden states are computed once
    # --- optimisation
    rows: int = 1800  # training triples, drawn at random; 0: all
    steps: int = 180
    batch_size: int = 24
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    # --- text
    max_tokens: int = 64  # of both texts together
    longest_prompt: int = 24  # tokens of a prompt, learnt or written
    answer_batch: int = 100
    seed: int = 0


BERT_GPT2 = EncoderDecoderSettings(
    encoder="bert-base-uncased",
    decoder="gpt2",
    train_encoder=True,
    rows=0,
    steps=3000,
    batch_size=16,
    learning_rate=5e-5,
    max_tokens=512,
    longest_prompt=100,
)


class Plain(nn.Module):
    """No bridge: the decoder attends to the encoder's hidden states of the pair."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [n, parts, t, d] and mask [n, parts, t] -> what the decoder attends to [n, s, d], its mask [n, s]."""
        return hidden[:, 0], mask[:, 0]


class Pooled(nn.Module):
    """The paper's bridge: adaptive max-pooling over all tokens, then three linear layers; the decoder sees one vector.

    Between the layers a GELU, without which the three were one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Plain, with s = 1."""
        tokens = hidden[:, 0].masked_fill(~mask[:, 0, :, None], -1e4).transpose(1, 2)  # [n, d, t]
        return self.layers(F.adaptive_max_pool1d(tokens, 1).transpose(1, 2)), mask[:, 0, :1]


class Difference(nn.Module):
    """A bridge that keeps the sequence: each rewritten token, and what of it the original does not explain.

    The two texts are encoded apart. Each rewritten token attends to the original; what it finds there is subtracted. The
    difference of the two mean vectors comes first in the sequence.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 6, batch_first=True)
        self.joined, self.norm = nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Plain, with s = t + 1; part 0 is the original, part 1 the rewritten text."""
        original, rewritten = hidden.unbind(1)
        found, _ = self.attention(rewritten, original, original, key_padding_mask=~mask[:, 0], need_weights=False)
        tokens = self.norm(self.joined(torch.cat([rewritten, rewritten - found], -1)))
        means = (hidden * mask[..., None]).sum(2) / mask.sum(2, keepdim=True)  # [n, 2, d]
        changed = means[:, 1:] - means[:, :1]
        return torch.cat([changed.to(tokens.dtype), tokens], 1), torch.cat([mask[:, 1, :1], mask[:, 1]], 1)


BRIDGES = {"none": Plain, "pooled": Pooled, "sequence": Difference}


class EncoderDecoderRecoverer:
    """BERT's encoder, a bridge, and a GPT-2 with cross-attention that writes the prompt."""

    def __init__(self, settings: EncoderDecoderSettings | None = None, name: str = "encoder-decoder") -> None:
        self.settings, self.name = settings or EncoderDecoderSettings(), name
        if self.settings.bridge not in BRIDGES:
            raise InputError(f"bridge {self.settings.bridge!r} is unknown; choose one of {', '.join(BRIDGES)}")
        self.encoder, self.reader = load(AutoModel, self.settings.encoder or minilm_directory())
        self.model: EncoderDecoderModel | None = None
        self.losses: list[float] = []  # of every training step

    def fit(self, train: pd.DataFrame) -> EncoderDecoderRecoverer:
        """Fit on triples (original_text, rewrite_prompt, rewritten_text)."""
        check_training_texts(train)
        settings = self.settings
        torch.manual_seed(settings.seed)
        self._build(train["rewrite_prompt"].tolist())
        if settings.rows and settings.rows < len(train):
            train = train.sample(settings.rows, random_state=settings.seed)
        ids, labels = self._read(train), self._labels(train["rewrite_prompt"])
        kept = None if settings.train_encoder else torch.cat([self._hidden(part).half() for part in self._parts(ids)])

        def loss(batch: np.ndarray) -> torch.Tensor:
            hidden = self._hidden(ids[batch]) if kept is None else kept[batch].to(device()).float()
            return self._loss(hidden, ids[batch], labels[batch])

        modules = (self.bridge, self.model.decoder, *([self.model.encoder] if settings.train_encoder else []))
        trained = [weight for module in modules for weight in module.parameters()]
        self.losses = optimise(trained, loss, len(train), settings, self.name)
        self.model.eval()
        return self

    def recover(self, table: pd.DataFrame) -> list[str]:
        """One prompt for each row, token by token, each the likeliest."""
        if self.model is None:
            raise InputError(f"{self.name} is not fitted; call fit first")
        answers = []
        for ids in progress(self._parts(self._read(check_pairs(table))), desc=self.name):
            with torch.inference_mode(), autocast():
                context, mask = self._context(self._hidden(ids), ids)
                written = self.model.generate(
                    encoder_outputs=BaseModelOutput(context.float()),
                    attention_mask=mask.long(),
                    max_new_tokens=self.settings.longest_prompt,
                    do_sample=False,
                )
            answers += self.writer.batch_decode(written, skip_special_tokens=True)
        return [normalise(answer) for answer in answers]

    def _build(self, prompts: list[str]) -> None:
        """Decoder, bridge and the model that joins them with the encoder."""
        decoder, self.writer = self._small_decoder(prompts) if not self.settings.decoder else self._loaded_decoder()
        self.model = EncoderDecoderModel(encoder=self.encoder, decoder=decoder).to(device()).train()
        self.bridge = BRIDGES[self.settings.bridge](self.encoder.config.hidden_size).to(device())
        if not self.settings.train_encoder:
            self.encoder.eval().requires_grad_(False)
        start, end = (self.writer.bos_token_id, self.writer.eos_token_id)
        for config in (self.model.config, self.model.generation_config):
            config.decoder_start_token_id, config.eos_token_id = start, end
            config.pad_token_id = self.writer.pad_token_id

    def _loaded_decoder(self) -> tuple:
        decoder, writer = load(AutoModelForCausalLM, self.settings.decoder, add_cross_attention=True)
        writer.pad_token = writer.pad_token or writer.eos_token
        return decoder, writer

    def _small_decoder(self, prompts: list[str]) -> tuple:
        """A GPT-2 from scratch that knows only the pieces of prompts, which begin with the encoder's vectors for them."""
        reader = self.reader
        known = sorted({piece for row in reader(prompts)["input_ids"] for piece in row} | set(reader.all_special_ids))
        pieces = {piece: place for place, piece in enumerate(reader.convert_ids_to_tokens(known))}
        writer = BertTokenizer(vocab=pieces, bos_token=reader.cls_token, eos_token=reader.sep_token)
        config = GPT2Config(
            vocab_size=len(writer),
            n_positions=self.settings.longest_prompt + 2,
            n_embd=self.encoder.config.hidden_size,
            n_layer=self.settings.decoder_layers,
            n_head=6,
            bos_token_id=writer.bos_token_id,
            eos_token_id=writer.eos_token_id,
            add_cross_attention=True,
        )
        decoder = GPT2LMHeadModel(config)
        decoder.transformer.wte.weight.data = self.encoder.get_input_embeddings().weight.data[known].clone()
        return decoder, writer

    def _read(self, table: pd.DataFrame) -> torch.Tensor:
        """What the encoder reads, [n, parts, t]: the pair in one sequence, or, for "sequence", each text in its own."""
        ids, (between, after) = self._ids, self._ids([BETWEEN, AFTER])
        texts = zip(ids(table["original_text"]), ids(table["rewritten_text"]), strict=True)
        first, last, room = self.reader.cls_token_id, self.reader.sep_token_id, self.settings.max_tokens
        if self.settings.bridge == "sequence":
            rows = [[first, *text[: room // 2 - 2], last] for pair in texts for text in pair]
        else:
            room -= 2 + len(after)
            rows = [[first, *frame(*pair, [last, *between], room), *after, last] for pair in texts]
        pad = self.reader.pad_token_id
        padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
        return padded.view(len(table), -1, padded.shape[-1])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        longest = self.settings.max_tokens
        return self.reader(list(texts), add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]

    def _labels(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids of prompts and the end, [n, t], IGNORED beyond."""
        longest, end = self.settings.longest_prompt - 1, [self.writer.eos_token_id]
        ids = self.writer(list(prompts), add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]
        return pad_sequence([torch.tensor(row + end) for row in ids], batch_first=True, padding_value=IGNORED)

    def _parts(self, ids: torch.Tensor) -> Sequence[torch.Tensor]:
        return ids.split(self.settings.answer_batch)

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The encoder's last hidden states of ids [n, parts, t]: [n, parts, t, d]."""
        flat = ids.flatten(0, 1).to(device())
        with torch.set_grad_enabled(self.settings.train_encoder and torch.is_grad_enabled()), autocast():
            hidden = self.encoder(input_ids=flat, attention_mask=flat != self.reader.pad_token_id).last_hidden_state
        return hidden.view(*ids.shape, -1).float()

    def _context(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.bridge(hidden, (ids != self.reader.pad_token_id).to(device()))

    def _loss(self, hidden: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the prompts' tokens, each written after the true ones before it."""
        context, mask = self._context(hidden, ids)
        labels = labels.to(device())
        given = self.model.prepare_decoder_input_ids_from_labels(labels)
        logits = self.model(
            encoder_outputs=BaseModelOutput(context),
            attention_mask=mask.long(),
            decoder_input_ids=given,
            decoder_attention_mask=torch.ones_like(given),  # padding comes last, no token sees it
        ).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def build(task: Task, **options: object) -> EncoderDecoderRecoverer:
    """A model fitted to the task's training triples; options as EncoderDecoderSettings has them."""
    settings = preset(task.profile, EncoderDecoderSettings(), BERT_GPT2, seed=task.seed, **options)
    name = "encoder-decoder" if settings.bridge == "none" else f"bridge-{settings.bridge}"
    return EncoderDecoderRecoverer(settings, name).fit(task.train)
