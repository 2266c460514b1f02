"""Sentence encoders that a search can see into: unit vectors of texts, and the pull of an objective on every token.

`encode` works from the text, tokenised as the scorer tokenises it, and in fp32 where it matters. What only ranks may run
in bfloat16, two to three times faster where the CPU has it. Does not search: see token_search.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from promptrec.errors import InputError
from promptrec.profiles import quiet_frameworks
from promptrec.scoring import MINILM_SHA256, T5_EOS, HuggingFaceT5Scorer, MiniLMScorer, Scorer, minilm_directory
from promptrec.tables import check_digest
from promptrec.text_features import native_bfloat16

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 128  # special tokens included; the scorer of record reads no further
PLACEHOLDER = -1  # the mean of all input embeddings: it stands for "some token"
_WORD = re.compile(r"[A-Za-z]{2,}|[aAI]")


class SearchEncoder:
    """A sentence encoder with its input embeddings open. Subclasses say how it reads text.

    Attributes: `pieces` (the vocabulary, [V] strings), `embedding_matrix` float32 [V, D], `evaluations` (texts encoded
    so far) and `gradients` (strings sent through a backward pass so far).
    """

    name = "encoder"
    batch_size = 16  # strings that rank
    gradient_batch_size = 5  # a search sends few of these at a time, and exact strings one by one
    before: tuple[int, ...] = ()  # special tokens around every text
    after: tuple[int, ...] = ()

    def __init__(self, model, pieces: Sequence[str], dtype: str = "float32") -> None:
        import torch

        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype {dtype!r} is unknown; choose float32 or bfloat16")
        self._torch, self.ranks_exactly = torch, dtype == "float32"
        self._model = model.eval().requires_grad_(False)
        self._fast = self._model if self.ranks_exactly else copy.deepcopy(self._model).to(getattr(torch, dtype))
        self.pieces = list(pieces)
        table = model.get_input_embeddings().weight.float()[: len(self.pieces)]
        self._table = torch.cat([table, table.mean(0, keepdim=True)])  # row -1 is the placeholder
        self.embedding_matrix, self.placeholder = table.numpy(), self._table[-1].numpy()
        self.token_ids = lru_cache(maxsize=100_000)(self._token_ids)  # a candidate is counted, then encoded
        self.evaluations = self.gradients = 0

    # --- what a subclass says

    def _token_ids(self, text: str) -> tuple[int, ...]:
        """All token ids of a text, uncut, without special tokens."""
        raise TypeError(f"{type(self).__name__} does not say how to tokenise")

    def join(self, pieces: Iterable[str]) -> str:
        """The text of a sequence of pieces. Tokenised again, it may give other pieces."""
        raise TypeError(f"{type(self).__name__} does not say how to join pieces")

    def bare(self, piece: str) -> str:
        """A piece without the mark that says whether a word begins with it."""
        raise TypeError(f"{type(self).__name__} does not say how its pieces look")

    def begins_word(self, piece: str) -> bool:
        """Whether a word begins with the piece."""
        raise TypeError(f"{type(self).__name__} does not say how its pieces look")

    def is_ordinary(self, index: int) -> bool:
        """Whether text can hold the piece: neither special nor unused nor unknown."""
        raise TypeError(f"{type(self).__name__} does not say which pieces are ordinary")

    def _project(self, pooled):
        """Sentence vectors [n, d], not yet unit vectors, of mean hidden states [n, D]."""
        return pooled

    # --- what a search asks

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as the encoder reads it, special tokens included."""
        return len(self.before) + len(self.token_ids(text)) + len(self.after)

    def tokens(self, text: str) -> list[str]:
        """The ordinary pieces of a text."""
        return [self.pieces[index] for index in self.token_ids(text) if self.is_ordinary(index)]

    def whole_words(self) -> list[str]:
        """Vocabulary pieces that are English-looking words by themselves, in the vocabulary's order."""
        words = (self.bare(piece) for piece in self.pieces if self.begins_word(piece))
        return list(dict.fromkeys(word for word in words if _WORD.fullmatch(word)))

    def ordinary_pieces(self) -> list[str]:
        """Every piece that text can hold."""
        return [piece for index, piece in enumerate(self.pieces) if self.is_ordinary(index)]

    def encode(self, texts: Sequence[str], exact: bool = True) -> np.ndarray:
        """Float32 [n, d] unit vectors in the order of `texts`; each distinct string is encoded once.

        Exact in fp32; otherwise in the encoder's dtype, which is good enough to rank by.
        """
        distinct = sorted(set(texts))
        vectors: list = [None] * len(distinct)
        with self._torch.inference_mode():
            size = 1 if exact and not self.ranks_exactly else self.batch_size
            for batch, embedded, mask in self._batches([self.token_ids(text) for text in distinct], size):
                found = self._vectors(self._model if exact else self._fast, embedded, mask).numpy()
                for index, vector in zip(batch, found, strict=False):
                    vectors[index] = vector
        self.evaluations += len(distinct)
        place = {text: index for index, text in enumerate(distinct)}
        return np.stack([vectors[place[text]] for text in texts]) if len(texts) else np.zeros((0, 0), np.float32)

    def gradient(self, rows: Sequence[Sequence[int]], objectives: Sequence) -> tuple[np.ndarray, list[np.ndarray]]:
        """Vectors [n, d] of rows of token ids (PLACEHOLDER too), and how each objective changes with the embedding of
        each token: n arrays [t, D].

        One backward pass for a whole batch, although each row has its own objective: the objective's slope is known in
        closed form, only the encoder is differentiated. In the encoder's dtype.
        """
        found: list = [None] * len(rows)
        for batch, embedded, mask in self._batches(rows, self.gradient_batch_size):
            vectors = self._vectors(self._fast, embedded.requires_grad_(), mask)[: len(batch)]
            plain = vectors.detach().numpy()
            slopes = [objectives[index].slope(vector[None]) for index, vector in zip(batch, plain, strict=True)]
            vectors.backward(self._torch.from_numpy(np.concatenate(slopes)))
            for index, vector, gradient in zip(batch, plain, embedded.grad.numpy(), strict=False):
                start = len(self.before)
                found[index] = vector, gradient[start : start + len(rows[index])]
        self.gradients += len(rows)
        return np.stack([vector for vector, _ in found]), [gradient for _, gradient in found]

    def _vectors(self, model, embedded, mask):
        """Unit vectors [n, d] of embedded tokens [n, t, D] where the mask [n, t] is 1."""
        hidden = model(inputs_embeds=embedded.to(model.dtype), attention_mask=mask).last_hidden_state.float()
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self._torch.nn.functional.normalize(self._project(pooled), dim=-1)

    def _batches(self, rows: Sequence[Sequence[int]], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Rows of token ids in batches: indices, embedded tokens [size, t, D], mask [size, t].

        Every batch has the same number of rows, and t depends on the row alone. So a vector comes out the same to the
        last bit whatever it is batched with: matrix products of other shapes round otherwise.
        """
        room = MAX_TOKENS - len(self.before) - len(self.after)
        framed = [(*self.before, *row[:room], *self.after) for row in rows]
        lengths = [_rounded(len(row)) for row in framed]
        for length, group in groupby(sorted(range(len(rows)), key=lengths.__getitem__), key=lengths.__getitem__):
            alike = list(group)
            for start in range(0, len(alike), size):
                batch = alike[start : start + size]
                full = [framed[index] for index in (batch * size)[:size]]
                ids = self._torch.tensor([(*row, *[0] * (length - len(row))) for row in full])
                mask = self._torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in full])
                yield batch, self._table[ids], mask


def _rounded(length: int) -> int:
    """The length that a row is padded to: in coarse steps, so that rows share batches; in finer ones where it is short."""
    step = 4 if length <= 32 else 8
    return -(-length // step) * step


class MiniLMEncoder(SearchEncoder):
    """all-MiniLM-L6-v2, the offline proxy, with WordPiece tokens; cut to 128 tokens here, as sentence-t5 is."""

    name = "MiniLM (proxy)"

    def __init__(self, directory: str | Path | None = None, dtype: str = "float32") -> None:
        quiet_frameworks()
        directory = Path(directory) if directory else minilm_directory()
        check_digest(directory / "model.safetensors", MINILM_SHA256)
        from tokenizers import Tokenizer
        from transformers import AutoModel

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.before = (self._tokenizer.token_to_id("[CLS]"),)
        self.after = (self._tokenizer.token_to_id("[SEP]"),)
        by_id = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        # torch's fused attention is several times slower than the plain one on strings this short
        model = AutoModel.from_pretrained(directory, local_files_only=True, attn_implementation="eager")
        super().__init__(model, [piece for piece, _ in by_id], dtype)

    def _token_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def join(self, pieces: Iterable[str]) -> str:
        return " ".join(pieces).replace(" ##", "").removeprefix("##")

    def bare(self, piece: str) -> str:
        return piece.removeprefix("##")

    def begins_word(self, piece: str) -> bool:
        return not piece.startswith("##")

    def is_ordinary(self, index: int) -> bool:
        return not re.fullmatch(r"\[.+\]", self.pieces[index])


class T5Encoder(SearchEncoder):
    """The Hugging Face twin of sentence-t5 with SentencePiece tokens, from the folder that its scorer reads."""

    name = HuggingFaceT5Scorer.name

    def __init__(
        self, directory: str | Path, dtype: str = "float32", scorer: HuggingFaceT5Scorer | None = None
    ) -> None:
        quiet_frameworks()
        scorer = scorer or HuggingFaceT5Scorer(directory)
        self._sentencepiece, self._dense = scorer._pieces, scorer._dense
        self.after = (T5_EOS,)
        count = self._sentencepiece.get_piece_size()
        super().__init__(scorer._encoder, [self._sentencepiece.id_to_piece(index) for index in range(count)], dtype)

    def _token_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._sentencepiece.encode(text))

    def join(self, pieces: Iterable[str]) -> str:
        return "".join(pieces).replace("▁", " ").strip()

    def bare(self, piece: str) -> str:
        return piece.removeprefix("▁")

    def begins_word(self, piece: str) -> bool:
        return piece.startswith("▁")

    def is_ordinary(self, index: int) -> bool:
        pieces = self._sentencepiece
        return not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_unused(index))

    def _project(self, pooled):
        return pooled @ self._dense.T


def encoder_of(scorer: Scorer, dtype: str = "") -> SearchEncoder | None:
    """The encoder behind a scorer, opened for search, once per scorer; None where only its answers can be had.

    It ranks in `dtype`; without one in bfloat16 where the CPU has it. What a search accepts is exact either way.
    """
    dtype = dtype or ("bfloat16" if native_bfloat16() else "float32")
    opened = vars(scorer).setdefault("_search_encoders", {})
    if dtype not in opened:
        opened[dtype] = None
        if isinstance(scorer, MiniLMScorer):
            opened[dtype] = MiniLMEncoder(scorer.directory, dtype)
        elif isinstance(scorer, HuggingFaceT5Scorer):
            opened[dtype] = T5Encoder(scorer.directory, dtype, scorer)
    return opened[dtype]
