"""One LoRA adapter, two frameworks: from peft (torch) to Keras and back, for one Gemma base.

Both add a product of two thin matrices to a kernel, but they cut the kernel differently. peft sees a matrix
[out, in], heads and head size flattened; Keras keeps the heads apart, [heads, hidden, head_dim] for query, key and
value, and cuts off the last dimension only:

    peft    q: B [heads * head_dim, r] A [r, hidden]
    Keras   q: A [heads, hidden, R]    B [R, head_dim]     the heads share B

A peft adapter of rank r therefore has rank R = min(heads * r, head_dim) in Keras, and a Keras one of rank R has rank
heads * R in peft, at most; both are exact. The other four kernels keep their rank. The frozen base is the
full-precision one: an adapter trained on an NF4 base carries over, the error of quantisation stays behind.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promptrec.errors import InputError
from promptrec.lora_keras import ADAPTER, adapted_layers, adapter_file
from promptrec.profiles import model_name
from promptrec.rewriters.keras_gemma import gemma_config
from promptrec.tables import read_json, write_json

TARGETS = {  # peft's name -> Keras' name
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "gate_proj": "ffw_gating",
    "up_proj": "ffw_gating_2",
    "down_proj": "ffw_linear",
}
BY_HEAD = {"q_proj": "num_query_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
WEIGHT = re.compile(r"\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight$")
MLP = ("gate_proj", "up_proj", "down_proj")
UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class Factors:
    """One kernel's update as a product left [m, r] @ right [r, n]."""

    left: np.ndarray
    right: np.ndarray

    @property
    def rank(self) -> int:
        return self.left.shape[1]


Update = dict[tuple[int, str], Factors]  # (block, peft's name of the target) -> factors


def peft_to_keras(peft_dir: str | Path, keras_file: str | Path, base: str | Path, rank: int | None = None) -> Path:
    """Write a peft adapter as a Keras LoRA file (adapter.lora.h5) for the same base; alpha / rank is multiplied in.

    Keras gives every layer one rank, here the largest that any needs; `rank` caps it: the nearest adapter of that
    rank, in the sense of least squares, with its largest relative error noted in run.json beside the file.
    Raises InputError for a target or an option that Keras LoRA has no place for.
    """
    config, update = gemma_config(base), read_peft(Path(peft_dir))
    check_sizes(update, config, peft_dir)
    cut = {key: to_keras_cut(factors, heads_of(key[1], config)) for key, factors in update.items()}
    thin = {key: compress(factors, rank) for key, factors in cut.items()}
    largest = max(factors.rank for factors in thin.values())
    targets = [keras for peft, keras in TARGETS.items() if any(target == peft for _, target in thin)]
    path = write_keras(Path(keras_file), thin, largest, config)
    run = {
        "settings": {"rank": largest, "target_layer_names": targets},
        "base_model": model_name(base),
        "converted_from": str(Path(peft_dir).name),
        "relative_error": max(relative_error(cut[key], thin[key]) for key in cut),
    }
    write_json(run, path.with_name("run.json"))
    return path


def keras_to_peft(keras_file: str | Path, out_dir: str | Path, base: str | Path) -> Path:
    """Write a Keras LoRA file (or its folder) as a peft adapter folder; each target has the rank it needs, alpha = rank."""
    config, path, out = gemma_config(base), adapter_file(keras_file), Path(out_dir)
    cut = {key: to_peft_cut(factors, heads_of(key[1], config)) for key, factors in read_keras(path, config).items()}
    update = {key: compress(factors) for key, factors in cut.items()}
    ranks: dict[str, int] = {}
    for (_, target), factors in update.items():
        ranks[target] = max(ranks.get(target, 1), factors.rank)
    write_peft(out, update, ranks, base)
    return out


def heads_of(target: str, config: dict) -> int | None:
    """How many heads a target's output is cut into; None where Keras does not cut it."""
    return config[BY_HEAD[target]] if target in BY_HEAD else None


def to_keras_cut(update: Factors, heads: int | None) -> Factors:
    """From left [in, r] @ right [r, out] to Keras' matrix: [heads * in, head_dim] for query, key and value.

    Row (head, i) of the new left holds row i of the old one in its head's own r columns, as long as they are fewer
    than head_dim; otherwise it is the update itself, and the right factor is the identity.
    """
    if heads is None or heads == 1:
        return update
    size, rank = update.right.shape[1] // heads, update.rank
    by_head = update.right.reshape(rank, heads, size).transpose(1, 0, 2)  # [heads, r, head_dim]
    if heads * rank > size:
        return Factors((update.left @ by_head).reshape(-1, size), np.eye(size))
    return Factors(np.kron(np.eye(heads), update.left), by_head.reshape(heads * rank, size))


def to_peft_cut(update: Factors, heads: int | None) -> Factors:
    """The way back: from left [heads * in, R] @ right [R, head_dim] to [in, heads * R] @ [heads * R, heads * head_dim]."""
    if heads is None or heads == 1:
        return update
    by_head = update.left.reshape(heads, -1, update.rank)  # [heads, in, R]
    return Factors(np.concatenate(list(by_head), axis=1), np.kron(np.eye(heads), update.right))


def compress(update: Factors, rank: int | None = None, tolerance: float = 1e-6) -> Factors:
    """The same product with as few columns as it needs, or the nearest one (least squares) with `rank` columns.

    QR of both factors leaves a small matrix [r, r]; its singular values below `tolerance` of the largest are rounding.
    """
    left_basis, left_rest = np.linalg.qr(update.left)
    right_basis, right_rest = np.linalg.qr(update.right.T)
    rows, values, columns = np.linalg.svd(left_rest @ right_rest.T)
    needed = max(1, int((values > tolerance * values[0]).sum()))
    kept = needed if rank is None else min(rank, needed)
    scale = np.sqrt(values[:kept])
    return Factors(left_basis @ (rows[:, :kept] * scale), (columns[:kept].T * scale).T @ right_basis.T)


def relative_error(exact: Factors, near: Factors) -> float:
    """Frobenius norm of the difference over that of the exact product, from the thin factors alone."""
    both = Factors(np.hstack([exact.left, -near.left]), np.vstack([exact.right, near.right]))
    return _norm(both) / max(_norm(exact), 1e-30)


def _norm(update: Factors) -> float:
    squared = np.sum((update.left.T @ update.left) * (update.right @ update.right.T))
    return float(np.sqrt(max(squared, 0.0)))


def read_peft(folder: Path) -> Update:
    """The updates of a peft adapter, left [in, r] @ right [r, out], scaled, in float64."""
    from safetensors.torch import load_file  # NumPy has no bfloat16

    if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: no peft adapter there (adapter_config.json and adapter_model.safetensors)")
    options = read_json(folder / "adapter_config.json")
    if odd := [name for name in UNSUPPORTED if options.get(name)] + ["bias"] * (options.get("bias", "none") != "none"):
        raise InputError(f"{folder}: Keras LoRA has no place for {', '.join(odd)}; train the adapter without")
    parts: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        found = WEIGHT.search(name)
        if not found or found[3] not in TARGETS:
            raise InputError(f"{folder}: Keras LoRA cannot carry {_target(name)}; it can {', '.join(TARGETS)}")
        parts.setdefault((int(found[1]), found[3]), {})[found[4]] = tensor.double().numpy()
    return {
        key: Factors(part["A"].T, _scale(options, key, len(part["A"])) * part["B"].T) for key, part in parts.items()
    }


def _scale(options: dict, key: tuple[int, str], rank: int) -> float:
    """alpha / rank of one module, with peft's pattern of exceptions and its rank-stabilised variant."""
    name = module_name(*key)
    exceptions = [v for k, v in (options.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", name)]
    return (exceptions or [options["lora_alpha"]])[0] / (rank**0.5 if options.get("use_rslora") else rank)


def module_name(block: int, target: str) -> str:
    """peft's name of an adapted module."""
    return f"base_model.model.model.layers.{block}.{'mlp' if target in MLP else 'self_attn'}.{target}"


def _target(name: str) -> str:
    """embed_tokens of base_model.model.model.embed_tokens.lora_embedding_A."""
    return name.split(".lora_")[0].rsplit(".", 1)[-1]


def check_sizes(update: Update, config: dict, where: str | Path) -> None:
    """Raise InputError unless every factor, left [in, r] @ right [r, out], fits a kernel of the base."""
    for (block, target), factors in update.items():
        shape = kernel_shape(target, config)
        expected = (shape[1], shape[0] * shape[2]) if target in BY_HEAD else (math.prod(shape[:-1]), shape[-1])
        found = (factors.left.shape[0], factors.right.shape[1])
        if block >= config["num_layers"] or found != expected:
            raise InputError(f"{where}: {target} of layer {block} is {found[0]} x {found[1]}; the base is another one")


def layer_numbers(config: dict) -> dict[tuple[int, str], int]:
    """(block, peft's name) -> the number by which Keras' adapter file knows the layer.

    Keras counts the layers of the built model. A doll's house with the same blocks counts alike, and needs no weights.
    """
    from keras_hub.models import GemmaBackbone

    norms = {name: config.get(name, False) for name in ("use_post_ffw_norm", "use_post_attention_norm")}
    doll = GemmaBackbone(
        vocabulary_size=2,
        num_layers=config["num_layers"],
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=2,
        intermediate_dim=4,
        head_dim=2,
        **norms,
    )
    layers = [layer for layer in doll._flatten_layers(include_self=False) if layer.weights]
    numbers = {id(layer): number for number, layer in enumerate(layers)}
    return {
        (block, peft): numbers[id(layer)]
        for block, decoder in enumerate(doll.transformer_layers)
        for peft, keras in TARGETS.items()
        for layer in decoder._flatten_layers()
        if layer.name == keras
    }


def write_keras(path: Path, update: Update, rank: int, config: dict) -> Path:
    """The file that save_lora_weights would write, zeros in the columns that a layer does not need."""
    import h5py

    if not path.name.endswith(".lora.h5"):
        raise InputError(f"{path}: name a file ending in .lora.h5, such as {ADAPTER}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, numbers = path.with_name(f".{path.name}"), layer_numbers(config)
    targets = {target for _, target in update}
    with h5py.File(temporary, "w") as file:
        file["lora/vars/rank"] = rank
        for (block, target), number in numbers.items():
            if target not in targets:
                continue
            shape = kernel_shape(target, config)
            a, b = np.zeros((math.prod(shape[:-1]), rank), np.float32), np.zeros((rank, shape[-1]), np.float32)
            if factors := update.get((block, target)):
                a[:, : factors.rank], b[: factors.rank] = factors.left, factors.right
            file[f"lora/{number}/vars/lora_kernel_a"] = a.reshape(*shape[:-1], rank)
            file[f"lora/{number}/vars/lora_kernel_b"] = b
    os.replace(temporary, path)
    return path


def kernel_shape(target: str, config: dict) -> tuple[int, ...]:
    """The shape of a target's kernel in Keras."""
    hidden, size, wide = config["hidden_dim"], config["head_dim"], config["intermediate_dim"] // 2
    if target in BY_HEAD:
        return config[BY_HEAD[target]], hidden, size
    return {
        "o_proj": (config["num_query_heads"], size, hidden),
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }[target]


def read_keras(path: Path, config: dict) -> Update:
    """The updates of a Keras LoRA file, left [everything but the last dimension, R] @ right [R, last], in float64."""
    import h5py

    _, adapted = adapted_layers(path)
    names = {number: key for key, number in layer_numbers(config).items()}
    if not set(adapted) <= set(names):
        raise InputError(f"{path}: adapts layers that the base does not have; it was made for another one")
    update: Update = {}
    with h5py.File(path, "r") as file:
        for number in adapted:
            a, b = (file[f"lora/{number}/vars/lora_kernel_{part}"][()].astype(np.float64) for part in "ab")
            shape = kernel_shape(names[number][1], config)
            if (*a.shape[:-1], b.shape[-1]) != shape:
                raise InputError(
                    f"{path}: a kernel is {(*a.shape[:-1], b.shape[-1])}, the base has {shape}: another one"
                )
            update[names[number]] = Factors(a.reshape(-1, a.shape[-1]), b)
    return update


def write_peft(out: Path, update: Update, ranks: dict[str, int], base: str | Path) -> None:
    """adapter_model.safetensors (fp32) and adapter_config.json."""
    from safetensors.numpy import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for (block, target), factors in update.items():
        fill = ((0, 0), (0, ranks[target] - factors.rank))
        for letter, array in (("A", np.pad(factors.left, fill).T), ("B", np.pad(factors.right.T, fill))):
            tensors[f"{module_name(block, target)}.lora_{letter}.weight"] = np.ascontiguousarray(
                array, dtype=np.float32
            )
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(options, out / "adapter_config.json")
