"""Gemma in Keras on JAX, the TPU path: loaded, sharded over however many devices there are, answering in batches.

The rewriter stands at the end; fine-tuning (lora_keras.py) uses the rest. KERAS_BACKEND=jax must be set before Keras
is imported; profiles.activate() does that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.errors import InputError
from promptrec.profiles import attach_hint, model_name
from promptrec.tables import progress, read_json
from promptrec.templates import REWRITE_WRAPS, chat_of, rewrite_request

BUCKETS = (128, 256, 512, 1024)  # lengths (tokens) to which a batch is padded: one compilation each

# Weight (regular expression over its path) -> axis of the mesh for each of its dimensions, and why. A LoRA factor is
# split like the kernel it stands beside, so it never has to be gathered; what no rule names lies on every device.
KEY_VALUE = ".*(key|value)/(kernel|lora_kernel_a)"
LAYOUT = {
    "token_embedding/embeddings": (
        ("model", None),
        "vocabulary: the logits, the largest tensor, come out split as well",
    ),
    ".*query/(kernel|lora_kernel_a)": (("model", None, None), "heads: each attends without the others"),
    KEY_VALUE: (("model", None, None), "heads, where there are enough of them"),
    ".*attention_output/(kernel|lora_kernel_a)": (("model", None, None), "heads; their sum is one all-reduce"),
    ".*ffw_gating(_2)?/(kernel|lora_kernel_b)": ((None, "model"), "feed-forward columns: each is computed alone"),
    ".*ffw_linear/(kernel|lora_kernel_a)": (("model", None), "feed-forward rows; their sum is one all-reduce"),
}
WHOLE = "small, or too few heads to share out: a copy on every device"


def check_preset(path: str | Path) -> None:
    """Raise InputError, saying what to attach, unless a directory holds a Keras preset or a Hugging Face model."""
    if not (Path(path) / "config.json").is_file():
        hint = attach_hint(path, "check the path")
        raise InputError(f"{path}: no Gemma preset there (config.json is missing); {hint}")


def gemma_config(path: str | Path) -> dict:
    """The sizes of a Gemma in Keras' words, read from the config.json of a Keras preset or a Hugging Face folder."""
    check_preset(path)
    raw = read_json(Path(path) / "config.json")
    if "config" in raw:
        return raw["config"]
    if raw.get("model_type") not in ("gemma", "gemma2"):
        raise InputError(f"{path}: a {raw.get('model_type')!r} model; this path runs Gemma and Gemma 2")
    second = raw["model_type"] == "gemma2"
    return {
        "num_layers": raw["num_hidden_layers"],
        "num_query_heads": raw["num_attention_heads"],
        "num_key_value_heads": raw["num_key_value_heads"],
        "head_dim": raw["head_dim"],
        "hidden_dim": raw["hidden_size"],
        "intermediate_dim": 2 * raw["intermediate_size"],  # Keras counts gate and up projection together
        "vocabulary_size": raw["vocab_size"],
        "use_post_ffw_norm": second,
        "use_post_attention_norm": second,
    }


def layout_rules(config: dict, devices: int) -> dict[str, tuple[tuple, str]]:
    """LAYOUT for a model of these sizes: key and value stay whole where their heads cannot be shared out.

    Raises InputError where the devices cannot share the query heads, the feed-forward columns or the vocabulary.
    """
    shared = {
        "query heads": config["num_query_heads"],
        "feed-forward columns": config["intermediate_dim"] // 2,
        "vocabulary entries": config["vocabulary_size"],
    }
    for what, count in shared.items():
        if count % devices:
            raise InputError(f"{devices} devices cannot share {count} {what} evenly; use fewer, or shard=False")
    if config["num_key_value_heads"] % devices == 0:
        return LAYOUT
    return LAYOUT | {KEY_VALUE: ((None, None, None), WHOLE)}


def shard_over_devices(config: dict):
    """Spread the weights over a mesh (1, devices): keras.distribution.ModelParallel, set as the default; None on one.

    Every model made afterwards is laid out as LAYOUT says, also while its weights are being read: no device ever
    holds the whole. The batch axis has length 1, so a batch of any size will do.
    """
    import keras

    devices = keras.distribution.list_devices()
    if len(devices) == 1:
        return None
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    for pattern, (axes, _) in layout_rules(config, len(devices)).items():
        layout[pattern] = axes
    distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    return distribution


def layout_table(model) -> pd.DataFrame:
    """Where the weights lie, one row a kind: weight, count, shape, axes, bytes_per_device, why.

    Read from the arrays themselves, not from the rules; `bytes_per_device` is the sum over the kind's weights.
    """
    rows: dict[str, dict] = {}
    for variable in model.weights:
        kind = re.sub(r"decoder_block_\d+", "decoder_block_*", variable.path)
        axes = mesh_axes(variable)
        row = rows.setdefault(kind, {"count": 0, "shape": tuple(variable.shape), "axes": axes, "bytes_per_device": 0})
        row["count"] += 1
        row["bytes_per_device"] += variable.value.addressable_shards[0].data.nbytes
        row["why"] = _reason(variable.path) if "model" in axes else WHOLE
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("weight").reset_index()


def mesh_axes(variable) -> tuple[str, ...]:
    """The mesh axis of each dimension of a weight, "-" where it is not split: ("model", "-", "-")."""
    spec = tuple(getattr(variable.value.sharding, "spec", ()))
    return tuple(axis or "-" for axis in spec) + ("-",) * (len(variable.shape) - len(spec))


def _reason(path: str) -> str:
    return next((why for pattern, (_, why) in LAYOUT.items() if re.fullmatch(pattern, path)), WHOLE)


def load_gemma(path: str | Path, shard: bool = True, recompute: bool = False):
    """(GemmaCausalLM, GemmaTokenizer) from a local preset directory, sharded where there are several devices.

    bfloat16 on a TPU, else what the preset says. The model has no preprocessor: it takes and returns token ids.
    `recompute` keeps only each block's input for the backward pass (gradient checkpointing): less memory, more time.
    """
    config = gemma_config(path)
    import jax
    import keras
    import keras_hub

    if shard:
        shard_over_devices(config)
    blocks = [f"decoder_block_{number}" for number in range(config["num_layers"])] if recompute else []
    dtype = {"dtype": "bfloat16"} if jax.default_backend() == "tpu" else {}
    with keras.RematScope("list_of_layers", layer_names=blocks) if recompute else nullcontext():
        try:
            model = keras_hub.models.GemmaCausalLM.from_preset(str(path), **dtype)
        except Exception as error:  # h5py, Keras and TensorFlow have classes of their own for a damaged file
            said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be read as a Gemma preset ({said}); copy or attach it again") from None
    tokenizer, model.preprocessor = model.preprocessor.tokenizer, None
    return model, tokenizer


def token_ids(tokenizer, text: str, begin: bool = True) -> list[int]:
    """Ids of a full prompt, as language_model.token_ids: beginning-of-sequence once, or not at all (`begin` = False)."""
    ids = [int(token) for token in tokenizer(text)]
    return ids if not begin or ids[:1] == [tokenizer.start_token_id] else [tokenizer.start_token_id, *ids]


def bucket_of(length: int) -> int:
    """The length (tokens) to which a text of this length is padded."""
    return next((size for size in BUCKETS if size >= length), -(-length // BUCKETS[-1]) * BUCKETS[-1])


@dataclass(frozen=True)
class KerasGeneration:
    """How answers are generated: greedily, all batches of one size, so that JAX compiles once per length bucket."""

    max_new_tokens: int = 32
    batch_size: int = 16


def generate(
    model,
    tokenizer,
    requests: Sequence[str],
    settings: KerasGeneration | None = None,
    stop: str = "",
    description: str = "generate",
    on_batch: Callable[[list[int], list[str]], None] | None = None,
    stop_after: float | None = None,
) -> list[str]:
    """Answers to `requests`, in their order; the contract of language_model.generate, sorted by length as there.

    `stop` is a token that ends an answer (besides EOS). `on_batch(positions, answers)` is called as batches finish.
    After `stop_after` seconds the remaining answers are empty strings.
    """
    settings = settings or KerasGeneration()
    encoded = [token_ids(tokenizer, request) for request in requests]
    order = sorted(range(len(encoded)), key=lambda position: len(encoded[position]), reverse=True)
    answers, ends = [""] * len(encoded), end_ids(tokenizer, stop)
    bar, started = progress(range(0, len(order), settings.batch_size), desc=description), time.monotonic()
    for start in bar:
        if stop_after is not None and time.monotonic() - started > stop_after:
            break
        positions = order[start : start + settings.batch_size]
        texts = _generate_batch(model, tokenizer, [encoded[p] for p in positions], settings, ends)
        for position, text in zip(positions, texts, strict=True):
            answers[position] = text
        if on_batch:
            on_batch(positions, texts)
    return answers


def _generate_batch(model, tokenizer, rows: list[list[int]], settings: KerasGeneration, ends: list[int]) -> list[str]:
    width = bucket_of(max(map(len, rows))) + settings.max_new_tokens
    filled = rows + [rows[-1]] * (settings.batch_size - len(rows))  # one batch shape only
    ids, mask = padded(filled, width)
    output = model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=ends)["token_ids"]  # [n, width]
    return [
        _answer(tokenizer, output[number, len(row) : len(row) + settings.max_new_tokens], ends)
        for number, row in enumerate(rows)
    ]


def padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and padding mask, both [n, width] int32, zeros behind each row's end."""
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return ids, mask


def _answer(tokenizer, ids: Sequence[int], ends: list[int]) -> str:
    ids = [int(token) for token in ids]
    length = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.detokenize([ids[:length]])[0]).strip()


def end_ids(tokenizer, stop: str) -> list[int]:
    """Token ids that end an answer: EOS, and `stop` where it is a token of its own (as <end_of_turn> is).

    Raises InputError when a mark such as <end_of_turn> is not one token, as language_model.stop_ids does.
    """
    ids = [int(token) for token in tokenizer(stop)] if stop else []
    if len(ids) > 1 and stop.startswith("<"):
        raise InputError(f"the preset's tokenizer has no chat mark {stop}; use an instruction-tuned Gemma")
    return [tokenizer.end_token_id] + (ids if len(ids) == 1 else [])


@dataclass
class KerasGemmaRewriter:
    """Rewrites with keras_hub's GemmaCausalLM from a local preset directory (Keras preset or Hugging Face folder)."""

    path: str
    seed: int = 0
    max_new_tokens: int = 384
    batch_size: int = 16
    shard: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        check_preset(self.path)
        import keras

        self.name = self.name or f"keras:{model_name(self.path)}"
        keras.utils.set_random_seed(self.seed)
        self.model, self.tokenizer = load_gemma(self.path, self.shard)

    def rewrite(self, originals: list[str], prompts: list[str]) -> list[str]:
        """One rewritten text per pair; batches share a length bucket, so JAX compiles once per bucket."""
        requests = [
            rewrite_request(original, prompt, wrap=len(original + prompt) % len(REWRITE_WRAPS))
            for original, prompt in zip(originals, prompts, strict=True)
        ]
        settings = KerasGeneration(self.max_new_tokens, self.batch_size)
        return generate(self.model, self.tokenizer, requests, settings, chat_of("gemma").after_model, self.name)
