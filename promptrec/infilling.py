"""BERT fills in the prompt: as many [MASK]s as it has tokens stand between the two texts, and all are filled at once.

    original. The task is to rewrite this narrative with the given blanks: [MASK] ... [MASK] rewritten

The loss sees the masks only: cross-entropy, the expected SCS of what would be filled in, or a mixture. How long a prompt
is, nobody tells the model: a length is drawn as training prompts have it, or the likeliest of several is taken.
Source: the text-infilling section of Gan et al., 2024 (BERT, T5 and SCS as the loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForMaskedLM

from promptrec.errors import InputError
from promptrec.inference import check_pairs, normalise
from promptrec.profiles import override
from promptrec.scoring import minilm_directory
from promptrec.small_models import autocast, check_training_texts, device, frame, load, optimise
from promptrec.tables import progress
from promptrec.text_features import LAST, text_encoder

if TYPE_CHECKING:
    from promptrec.methods import Task

TASK = ". the task is to rewrite this narrative with the given blanks:"
LENGTH_CHOICES = ("drawn", "likelihood")


@dataclass(frozen=True)
class InfillingSettings:
    """How a masked language model learns to fill in prompts; the defaults suit one CPU core, `BERT` a GPU."""

    model: str = ""  # folder or name of a masked language model; empty: MiniLM's encoder with a fresh head
    kept_layers: int = 3  # from the bottom; 0: all. MiniLM's upper ones mean sentences, a blank needs words
    trained_layers: int = 3  # from the top of those kept, besides the head; 0: every weight
    # --- optimisation
    steps: int = 180
    batch_size: int = 16
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    dropout: float = 0.0  # hundreds of steps are too few to overfit
    scs_share: float = 0.0  # of the loss; the rest is cross-entropy
    shown: float = 0.0  # of a prompt's tokens in training, at most, drawn for each row; 0: masks only, as in the paper
    # --- text
    max_tokens: int = 56  # of the whole sequence; both texts are cut alike
    longest_prompt: int = 24  # tokens
    # --- answers
    length: str = "drawn"  # from the training prompts' lengths; "likelihood": the best of `lengths_tried`
    lengths_tried: int = 4  # quantiles of the training prompts' lengths
    passes: int = 1  # 1: all masks at once; more: the surest first, the others again with these in place
    answer_batch: int = 64
    seed: int = 0


BERT = InfillingSettings(
    model="bert-base-uncased",
    kept_layers=0,
    trained_layers=0,
    steps=3000,
    learning_rate=5e-5,
    dropout=0.1,
    max_tokens=512,
    longest_prompt=64,
    lengths_tried=8,
)


class SoftScorer:
    """MiniLM's SCS of token distributions instead of tokens: differentiable, so that it can be a loss.

    A mask's expected input embedding, its distribution times the embedding table, stands where a token's would.
    Where all distributions are certain, it is the SCS of the text.
    """

    def __init__(self) -> None:
        model, self.tokenizer = load(AutoModel, minilm_directory())
        self.model = model.to(device()).eval().requires_grad_(False)
        self.table = self.model.get_input_embeddings().weight  # [V, d]

    def __call__(
        self, shares: torch.Tensor, used: np.ndarray, counts: Sequence[int], truth: torch.Tensor
    ) -> torch.Tensor:
        """SCS [n]: distributions [m, v] of all rows' masks over the tokens `used` [v], masks a row (sum m), truth [n, d]."""
        ends = self.table[[self.tokenizer.cls_token_id, self.tokenizer.sep_token_id]]
        rows = [torch.cat([ends[:1], row, ends[1:]]) for row in (shares @ self.table[used]).float().split(list(counts))]
        mask = pad_sequence([torch.ones(len(row), device=ends.device) for row in rows], batch_first=True)
        embedded = pad_sequence(rows, batch_first=True)
        hidden = self.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return F.cosine_similarity((hidden * mask[..., None]).sum(1).float(), truth) ** 3  # length does not matter


class InfillingRecoverer:
    """A masked language model fine-tuned to fill in the prompt between the two texts."""

    def __init__(self, settings: InfillingSettings | None = None, name: str = "infilling") -> None:
        self.settings, self.name = settings or InfillingSettings(), name
        if self.settings.length not in LENGTH_CHOICES:
            raise InputError(f"length {self.settings.length!r} is unknown; choose one of {', '.join(LENGTH_CHOICES)}")
        torch.manual_seed(self.settings.seed)
        path = self.settings.model or minilm_directory()
        dropout = self.settings.dropout
        changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        if self.settings.kept_layers:
            changes["num_hidden_layers"] = self.settings.kept_layers
        (model, info), self.tokenizer = load(AutoModelForMaskedLM, path, output_loading_info=True, **changes)
        self.model, self.fresh_head = model.to(device()), any("transform" in key for key in info["missing_keys"])
        self.task = self._ids([TASK], len(TASK))[0]
        self.lengths: np.ndarray | None = None
        self.losses: list[float] = []  # of every training step

    def fit(self, train: pd.DataFrame, bank: Sequence[str] = ()) -> InfillingRecoverer:
        """Fit on triples (original_text, rewrite_prompt, rewritten_text); answers use their prompts' and the bank's tokens."""
        check_training_texts(train)
        settings = self.settings
        self._prepare(self._ids(train["rewrite_prompt"], settings.longest_prompt), bank)
        train = train.sample(min(settings.steps * settings.batch_size, len(train)), random_state=settings.seed)
        texts, prompts = self.encode(train), self._ids(train["rewrite_prompt"], settings.longest_prompt)
        truth = self._truth(train["rewrite_prompt"].tolist()) if settings.scs_share else None
        rng = np.random.default_rng(settings.seed)

        def loss(batch: np.ndarray) -> torch.Tensor:
            hidden = [self._hide(len(prompts[row]), rng) for row in batch]
            wanted = [np.array(prompts[row]) for row in batch]
            return self._loss(
                [texts[row] for row in batch], wanted, hidden, truth[batch] if settings.scs_share else None
            )

        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.losses = optimise(trained, loss, len(train), settings, self.name)
        self.model.eval()
        return self

    def _truth(self, prompts: list[str]) -> torch.Tensor:
        """What the SCS loss compares with: MiniLM's embeddings of the prompts, [n, d]."""
        self.scorer = SoftScorer()
        if self.scorer.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise InputError("scs_share: the model and MiniLM have different vocabularies; use an uncased BERT")
        return torch.from_numpy(text_encoder().encode(prompts, "embed prompts")[:, LAST]).to(device())

    def _hide(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Which of a training prompt's tokens are masked, [length]: all, or a share drawn at random; one at least."""
        hidden = rng.random(length) >= self.settings.shown * rng.random()
        hidden[rng.integers(length)] = True
        return hidden

    def _loss(self, texts: Sequence, wanted: list[np.ndarray], hidden: list[np.ndarray], truth) -> torch.Tensor:
        """Loss at the hidden ones of the wanted tokens: cross-entropy, and SCS where there is a `truth` [n, d]."""
        mask, share = self.tokenizer.mask_token_id, self.settings.scs_share
        slots = [np.where(away, mask, ids).tolist() for away, ids in zip(hidden, wanted, strict=True)]
        logits = self._logits(texts, slots)  # [m, v]
        labels = np.searchsorted(self.used, np.concatenate(wanted)[np.concatenate(hidden)])  # places among the used
        entropy = F.cross_entropy(logits, torch.from_numpy(labels).to(logits.device))
        if truth is None:
            return entropy
        expected = self.scorer(logits.softmax(-1), self.used, [int(away.sum()) for away in hidden], truth)
        return (1 - share) * entropy - share * expected.mean()

    def recover(self, table: pd.DataFrame) -> list[str]:
        """One prompt for each row: every mask gets its likeliest token, whatever the others get."""
        if self.lengths is None:
            raise InputError(f"{self.name} is not fitted; call fit first")
        texts = self.encode(check_pairs(table))
        tried = [self.fill(texts, lengths) for lengths in self._lengths(len(table))]
        best = np.argmax([likelihood for _, likelihood in tried], axis=0)
        return [normalise(tried[choice][0][row]) for row, choice in enumerate(best)]

    def encode(self, table: pd.DataFrame) -> list[tuple[list[int], list[int]]]:
        """Token ids of each row's original and rewritten text."""
        columns = (self._ids(table[name], self.settings.max_tokens) for name in ("original_text", "rewritten_text"))
        return list(zip(*columns, strict=True))

    def fill(
        self, texts: Sequence[tuple[list[int], list[int]]], lengths: Sequence[int]
    ) -> tuple[list[str], np.ndarray]:
        """What stands on each row's masks, `lengths` of them, and the mean log-probability of its tokens, [n].

        In several passes the surest tokens stay and the others are asked for again (Ghazvininejad et al., 2019, but that
        no token is taken back).
        """
        filled, likelihoods, size = [], [], self.settings.answer_batch
        for start in progress(range(0, len(texts), size), desc=self.name):
            slots = [[self.tokenizer.mask_token_id] * int(length) for length in lengths[start : start + size]]
            sure = np.zeros(len(slots))  # sum of log-probabilities
            for left in range(self.settings.passes, 0, -1):
                sure += self._fill_once(texts[start : start + size], slots, left)
            filled += [self.tokenizer.decode(row, skip_special_tokens=True) for row in slots]
            likelihoods += [total / len(row) for total, row in zip(sure, slots, strict=True)]
        return filled, np.array(likelihoods)

    def _fill_once(self, texts: Sequence, slots: list[list[int]], left: int) -> np.ndarray:
        """Put the surest tokens, 1 / `left` of those missing, into the slots; their log-probabilities' sums, [n]."""
        mask = self.tokenizer.mask_token_id
        counts = [row.count(mask) for row in slots]
        with torch.inference_mode(), autocast():
            best = self._logits(texts, slots).log_softmax(-1).max(-1)
        sums = np.zeros(len(slots))
        for number, (row, ids, values) in enumerate(
            zip(slots, best.indices.cpu().split(counts), best.values.cpu().split(counts), strict=True)
        ):
            open_places = [place for place, token in enumerate(row) if token == mask]
            for one in values.argsort(descending=True, stable=True)[: -(-len(values) // left)].tolist():
                row[open_places[one]] = int(self.used[ids[one]])
                sums[number] += float(values[one])
        return sums

    def _lengths(self, rows: int) -> np.ndarray:
        """Numbers of masks to try, [tried, rows]: one drawn for each row, or quantiles, the same for all."""
        if self.settings.length == "drawn":
            return np.random.default_rng(self.settings.seed).choice(self.lengths, size=(1, rows))
        share = (np.arange(self.settings.lengths_tried) + 0.5) / self.settings.lengths_tried
        return np.tile(np.unique(np.quantile(self.lengths, share).round().astype(int))[:, None], rows)

    def _prepare(self, prompts: list[list[int]], bank: Sequence[str]) -> None:
        """Note lengths and tokens, freeze what is not trained; a fresh head begins with how often tokens occur."""
        self.lengths = np.array([len(prompt) for prompt in prompts])
        model, layers, head = self.model.train(), self.settings.trained_layers, self.model.get_output_embeddings()
        more = self._ids(bank, self.settings.longest_prompt)
        self.used = np.unique(np.concatenate([*prompts, *more]))  # a tenth of the vocabulary, and of its cost
        if layers:
            model.base_model.requires_grad_(False)  # the head's weights with it: they are the input embeddings
            model.base_model.encoder.layer[-layers:].requires_grad_(True)
        if self.fresh_head:
            counts = np.bincount(np.concatenate(prompts), minlength=len(head.bias)) + 0.1
            head.bias.data = torch.from_numpy(np.log(counts / counts.sum())).float().to(device())

    def _logits(self, texts: Sequence[tuple[list[int], list[int]]], slots: Sequence[list[int]]) -> torch.Tensor:
        """Logits of the used tokens at the masks among all rows' slots, in order, [m, v] in fp32."""
        tokenizer, room = self.tokenizer, self.settings.max_tokens - 2
        first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        bodies = [frame(*pair, self.task + row, room) for pair, row in zip(texts, slots, strict=True)]
        rows = [torch.tensor(first + body + last) for body in bodies]
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id).to(device())  # [n, t]
        hidden = self.model.base_model(input_ids=ids, attention_mask=ids != tokenizer.pad_token_id).last_hidden_state
        found = self.model.cls.predictions.transform(hidden[ids == tokenizer.mask_token_id])  # masks only: [m, d]
        head = self.model.get_output_embeddings()
        return F.linear(found, head.weight[self.used], head.bias[self.used]).float()

    def _ids(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        texts = [text.replace(self.tokenizer.mask_token, "") for text in texts]  # a text's own is no blank
        if not texts:
            return []
        rows = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]
        return [row or [self.tokenizer.unk_token_id] for row in rows]


def build(task: Task, **options: object) -> InfillingRecoverer:
    """A model fitted to the task's training triples; options as InfillingSettings has them."""
    base = InfillingSettings() if task.profile.name == "local" else BERT
    if options.get("scs_share"):
        base = replace(base, steps=base.steps // 2)  # such a step takes up to twice as long
    settings = override(base, seed=task.seed, **options)
    likelihood = "-likelihood" if settings.length == "likelihood" else ""
    how = "-scs" if settings.scs_share else "-iterative" if settings.passes > 1 else likelihood
    return InfillingRecoverer(settings, f"infilling{how}").fit(task.train, task.bank)
