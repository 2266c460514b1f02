"""What a pair of texts says about its prompt, as numbers: sentence-encoder states, words that came and went, style.

The encoder is MiniLM, read at several depths: early layers know words and layout, late ones meaning. It is what costs,
so texts are sorted by length, run in bfloat16 where the CPU has it, and kept on disk by content: nothing is embedded
twice. Does not predict: see embedding.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.cache import cache_folder, digest, packed, read_arrays, save_arrays, unpacked
from promptrec.cleaning import strip_lead_in
from promptrec.profiles import quiet_frameworks
from promptrec.scoring import MINILM_SHA256, minilm_directory, unit
from promptrec.tables import check_digest, progress

WIDTH = 384  # of MiniLM
LAYERS = (1, 3, 5, 6)  # of 6; mean-pooled each
POOLS = (*(f"layer {layer}" for layer in LAYERS), "highest", "opening")
LAST = POOLS.index("layer 6")  # the pool that is MiniLM's own sentence embedding
HIGHEST, FIRST = POOLS.index("highest"), POOLS.index("opening")
SHOWN_POOLS = [POOLS.index("layer 5"), LAST, HIGHEST, FIRST]  # of the residual, as directions
OPENING = 24  # tokens
LONGEST = 256  # tokens of a text; MiniLM was trained no further
SHOWN_WORDS = 40  # of those that came or went
CAME_POOLS = (0, 1, 3)
KEPT_DIMS = {"residual": 400, "words": 300, "style": 0}  # by PCA; 0: all
_WORD = re.compile(r"[a-z']+")
_NUMBERED = re.compile(r"\s*\d+[.)]")
MARKS = ".,!?:;\"'()#@*-\n&/$%"
WORD_GROUPS = (
    "i me my",
    "you your",
    "we our us",
    "he she his her they",
    "thou thee thy doth hath",
    "is are am",
    "was were had",
    "will shall",
    "the a an",
    "oh ah o alas",
    "not never no",
    "and but or",
)


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself; elsewhere bfloat16 is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


class TextEncoder:
    """MiniLM read at several depths: float16 [n, pools, 384] of texts, each distinct text once, kept on disk."""

    batch_size = 32

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache or cache_folder() / f"minilm-{MINILM_SHA256[:12]}-{'-'.join(map(str, LAYERS))}"
        self._known: dict[str, np.ndarray] = {}
        self._shards: set[Path] = set()  # read already
        self._model = self._tokenizer = None

    def encode(self, texts: Sequence[str], description: str = "embed texts") -> np.ndarray:
        """Float32 [n, pools, 384]; the pools are named in POOLS and not normalised."""
        keys = {text: digest(text) for text in dict.fromkeys(texts)}
        self._read(keys.values())
        new = {key: text for text, key in keys.items() if key not in self._known}
        if new:
            self._keep(list(new), self._encode(list(new.values()), description))
        return np.stack([self._known[keys[text]] for text in texts]).astype(np.float32)

    def _encode(self, texts: list[str], description: str) -> np.ndarray:
        import torch

        model, tokenizer = self._loaded()
        vectors = np.zeros((len(texts), len(POOLS), WIDTH), np.float16)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # little padding
        for start in progress(range(0, len(order), self.batch_size), desc=description):
            rows = order[start : start + self.batch_size]
            batch = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            with torch.inference_mode():
                states = model(**batch, output_hidden_states=True).hidden_states
                vectors[rows] = _pool(torch, states, batch["attention_mask"][..., None].float()).numpy()
        return vectors

    def _loaded(self):
        if self._model is None:
            import torch

            quiet_frameworks()
            directory = minilm_directory()
            check_digest(directory / "model.safetensors", MINILM_SHA256)
            from transformers import AutoModel, AutoTokenizer

            kind = torch.bfloat16 if native_bfloat16() else torch.float32
            self._model = AutoModel.from_pretrained(directory, local_files_only=True, dtype=kind).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return self._model, self._tokenizer

    def _read(self, keys) -> None:
        """Load the shards not read yet, unless every key is known."""
        if set(keys) <= self._known.keys():
            return
        for shard in sorted(set(self.cache.glob("[!.]*.npz")) - self._shards):
            self._shards.add(shard)
            if saved := read_arrays(shard):
                self._known.update(zip(saved["keys"].tolist(), saved["vectors"], strict=True))

    def _keep(self, keys: list[str], vectors: np.ndarray) -> None:
        """Remember, and write one more shard (named by its content, so writers never clash)."""
        self._known.update(zip(keys, vectors, strict=True))
        shard = self.cache / f"{digest(*keys)}.npz"
        self._shards.add(shard)
        save_arrays(shard, keys=np.array(keys), vectors=vectors)


def text_encoder() -> TextEncoder:
    """The one of this process and cache folder: what it has read from there, hundreds of megabytes, is read once."""
    return _text_encoder(cache_folder())


@lru_cache(maxsize=1)
def _text_encoder(_: Path) -> TextEncoder:
    return TextEncoder()


def _pool(torch, states, mask):
    """Layer states [n, t, 384] and mask [n, t, 1] -> float16 [n, pools, 384]."""
    last, length = states[LAYERS[-1]].float(), mask.sum(1)
    means = [(states[layer].float() * mask).sum(1) / length for layer in LAYERS]
    highest = last.masked_fill(mask == 0, -1e4).max(1).values
    early = mask[:, :OPENING]
    opening = (last[:, :OPENING] * early).sum(1) / early.sum(1)
    return torch.stack([*means, highest, opening], 1).half()


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return _WORD.findall(text.lower())


def frequent_words(prompts: Sequence[str], size: int = 3000) -> tuple[str, ...]:
    """The most frequent words of the prompts, letters left out: what a readable string is made of."""
    said = (word.strip("'") for prompt in prompts for word in words(prompt))
    return tuple(word for word, _ in Counter(word for word in said if len(word) > 1).most_common(size))


def came_words(before: Sequence[str], after: Sequence[str], rarity: Counter, total: int) -> list[str]:
    """For each pair, the words of `after` that are not in `before`: the rarest 40, in their order, as one string."""
    found = []
    for old, new in zip(before, after, strict=True):
        had = set(words(old))
        came = [word for word in dict.fromkeys(words(new)) if len(word) > 2 and word not in had]
        rare = sorted(came, key=lambda word: -min(np.log(total / (1 + rarity[word])), 6.0))[:SHOWN_WORDS]
        kept = set(rare)
        found.append(" ".join(word for word in came if word in kept) or "nothing")
    return found


def style_counts(text: str) -> list[float]:
    """Length, layout, punctuation, readability and function words of one text, as rates of comparable size."""
    said, lines = words(text), [line for line in text.split("\n") if line.strip()]
    count, size, rows = max(len(said), 1), max(len(text), 1), max(len(lines), 1)
    tally = Counter(said)
    shape = [
        np.log1p(count),
        10 * len(lines) / count,
        sum(map(len, said)) / count,
        len(tally) / count,
        10 * sum(letter.isupper() for letter in text) / size,
        20 * sum(letter.isdigit() for letter in text) / size,
        sum(line.lstrip()[:1] in ("-", "*", "•") for line in lines) / rows,
        sum(bool(_NUMBERED.match(line)) for line in lines) / rows,
        sum(line.strip().endswith(":") for line in lines) / rows,
        float("**" in text),
    ]
    marks = [50 * text.count(mark) / size for mark in MARKS]
    groups = [20 * sum(tally[word] for word in group.split()) / count for group in WORD_GROUPS]
    return [*shape, *marks, *groups]


class PairFeatures:
    """Features of (original, rewritten) pairs, fitted on the training pairs: a flat block and 15 directions.

    The flat block [n, f] joins three parts, each standardised and the first two reduced by PCA: what is in the rewritten
    text beyond what the original explains (the residual of a ridge regression, pool by pool), the words that came and
    went, and style counts of both texts. The directions [n, 15, 384] are unit vectors that a prompt may resemble: the two
    texts, their difference, and most of the embeddings that the first two parts are made of.
    Everything fitted is in `state`, a dict of arrays.
    """

    def __init__(self, encoder: TextEncoder, state: dict[str, np.ndarray] | None = None) -> None:
        self.encoder, self.state = encoder, state or {}

    @cached_property
    def rarity(self) -> Counter:
        """In how many training rewrites each word occurs."""
        return Counter(dict(zip(unpacked(self.state["words"]), self.state["word_rows"].tolist(), strict=True)))

    def fit_transform(self, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Fit on a table with original_text and rewritten_text; its (flat [n, f], directions [n, 15, 384]), float32."""
        before, after = _texts(pairs)
        rarity = Counter(word for text in after for word in set(words(text)))
        old, new = unit(self.encoder.encode(before)), unit(self.encoder.encode(after))
        lines = [_ridge(old[:, pool], new[:, pool]) for pool in range(len(POOLS))]
        self.state = {
            "rows": np.array(len(after)),
            "words": packed(rarity),
            "word_rows": np.array(list(rarity.values())),
            "slopes": np.stack([slope for slope, _ in lines]),
            "intercepts": np.stack([intercept for _, intercept in lines]),
        }
        self.__dict__.pop("rarity", None)
        blocks = self._blocks(before, after, old, new)
        for name, block in blocks.items():
            self.state |= _fit_scale(name, _rows(block), KEPT_DIMS[name])
        return self._joined(blocks, old, new)

    def fit(self, pairs: pd.DataFrame) -> PairFeatures:
        """Fit on a table with original_text and rewritten_text."""
        self.fit_transform(pairs)
        return self

    def __call__(self, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """(flat [n, f], directions [n, 15, 384]) of pairs, float32."""
        before, after = _texts(pairs)
        old, new = unit(self.encoder.encode(before)), unit(self.encoder.encode(after))
        return self._joined(self._blocks(before, after, old, new), old, new)

    def _blocks(self, before: list[str], after: list[str], old: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of the flat block before they are scaled: residual [n, pools, 384], words [n, 6, 384], style [n, s]."""
        explained = np.einsum("npi,pij->npj", old, self.state["slopes"]) + self.state["intercepts"]
        return {
            "residual": unit(new - explained),
            "words": self._words(before, after),
            "style": _style(before, after),
        }

    def _joined(self, blocks: dict[str, np.ndarray], old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = [_scaled(self.state, name, _rows(block)) for name, block in blocks.items()]
        texts = np.stack([old[:, LAST], new[:, LAST], unit(new[:, LAST] - old[:, LAST])], axis=1)
        shown = [texts, blocks["residual"][:, SHOWN_POOLS], unit(blocks["words"]), new[:, [HIGHEST, FIRST]]]
        return np.concatenate(flat, axis=1).astype(np.float32), np.concatenate(shown, axis=1).astype(np.float32)

    def _words(self, before: list[str], after: list[str]) -> np.ndarray:
        total = int(self.state["rows"])
        came, went = (
            self.encoder.encode(came_words(*texts, self.rarity, total), "embed changed words")
            for texts in ((before, after), (after, before))
        )
        parts = [*(unit(came[:, pool]) for pool in CAME_POOLS), *(unit(went[:, pool]) for pool in (0, LAST))]
        return np.stack([*parts, unit(came[:, LAST] - went[:, LAST])], axis=1)


def _rows(block: np.ndarray) -> np.ndarray:
    return block.reshape(len(block), -1)


def _ridge(given: np.ndarray, wanted: np.ndarray, alpha: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Slope [i, j] and intercept [j] of a ridge regression."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=alpha).fit(given, wanted)
    return model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)


def _fit_scale(name: str, table: np.ndarray, dims: int = 0) -> dict[str, np.ndarray]:
    """What standardises a block of features and, with dims, turns it to principal components of tempered size."""
    state = {f"{name}_mean": table.mean(0), f"{name}_deviation": table.std(0) + 1e-6}
    if dims:
        from sklearn.decomposition import PCA

        standard = _standard(state, name, table)
        pca = PCA(min(dims, *table.shape), random_state=0, svd_solver="randomized").fit(standard)
        size = np.sqrt(pca.explained_variance_)
        real = size > 1e-3 * size[0]  # few rows leave directions of no size, that unseen rows would be blown up along
        axes = 3 * pca.components_[real].T / np.sqrt(size[real] * size[0])
        state |= {f"{name}_axes": axes, f"{name}_centre": pca.mean_}
    return {key: value.astype(np.float32) for key, value in state.items()}


def _scaled(state: dict[str, np.ndarray], name: str, table: np.ndarray) -> np.ndarray:
    standard = _standard(state, name, table)
    return (standard - state[f"{name}_centre"]) @ state[f"{name}_axes"] if f"{name}_axes" in state else standard


def _standard(state: dict[str, np.ndarray], name: str, table: np.ndarray) -> np.ndarray:
    """Mean 0, deviation 1, outliers clipped at 5."""
    return np.clip((table - state[f"{name}_mean"]) / state[f"{name}_deviation"], -5, 5)


def _texts(pairs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Originals and rewritten texts; a lead-in would tell the training prompts apart, and no test row has one."""
    after = [strip_lead_in(text) or text for text in pairs["rewritten_text"]]
    return pairs["original_text"].tolist(), after


def _style(before: list[str], after: list[str]) -> np.ndarray:
    old, new = (np.array([style_counts(text) for text in texts]) for texts in (before, after))
    return np.concatenate([old, new, new - old], axis=1)
