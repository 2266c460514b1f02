"""Real models as rewriters, at tiny size: torch and Keras read the same files and say the same."""

import json
import os
import subprocess
import sys

import pytest

from promptrec.errors import InputError
from promptrec.language_model import GenerationSettings
from promptrec.profiles import ASSETS
from promptrec.rewriters import Rewriter
from promptrec.rewriters.hf import HuggingFaceRewriter

TINY = str(ASSETS / "tiny-gemma")
ORIGINALS = ["The ferry leaves at nine. Bring a coat.", "The cat slept."]
PROMPTS = ["Tell it like a pirate.", "Turn it into a headline."]
KERAS = """
import json, sys
from promptrec.profiles import activate, get_profile
activate(get_profile("local"))
import keras, keras_hub
import numpy as np
from promptrec.rewriters import keras_gemma
rewriter = keras_gemma.KerasGemmaRewriter(sys.argv[1], max_new_tokens=16, batch_size=2)
query = rewriter.model.backbone.get_layer("decoder_block_0").attention.query_dense.kernel
ids, mask = keras_gemma.padded([[2, *range(300, 340)]], 41)
measured = {
    "devices": len(keras.distribution.list_devices()), "name": rewriter.name,
    "shards": len({str(shard.index) for shard in query.value.addressable_shards}),
    "logits": np.asarray(rewriter.model({"token_ids": ids, "padding_mask": mask}))[0, -1].tolist(),
    "texts": rewriter.rewrite(*json.loads(sys.argv[2])),
}
rewriter.model.backbone.enable_lora(2, target_layer_names=["query", "attention_output", "ffw_gating", "ffw_linear"])
measured["layout"] = keras_gemma.layout_table(rewriter.model).to_dict("records")
one_head = {
    "num_layers": 1, "num_query_heads": 8, "num_key_value_heads": 1, "head_dim": 4, "hidden_dim": 32,
    "intermediate_dim": 64, "vocabulary_size": 64,
}
keras.distribution.set_distribution(None)
keras_gemma.shard_over_devices(one_head)
measured["one head"] = keras_gemma.layout_table(keras_hub.models.GemmaBackbone(**one_head)).to_dict("records")
print(json.dumps(measured))
"""
SPLIT = {  # what eight devices hold of the tiny Gemma
    "token_embedding/embeddings": ["model", "-"],
    "attention/query/kernel": ["model", "-", "-"],
    "attention/key/kernel": ["model", "-", "-"],
    "attention/value/kernel": ["model", "-", "-"],
    "attention/attention_output/kernel": ["model", "-", "-"],
    "ffw_gating/kernel": ["-", "model"],
    "ffw_gating_2/kernel": ["-", "model"],
    "ffw_linear/kernel": ["model", "-"],
    "pre_attention_norm/scale": ["-"],
    "pre_ffw_norm/scale": ["-"],
    "final_normalization/scale": ["-"],
    "attention/query/lora_kernel_a": ["model", "-", "-"],
    "attention/query/lora_kernel_b": ["-", "-"],
    "attention/attention_output/lora_kernel_a": ["model", "-", "-"],
    "attention/attention_output/lora_kernel_b": ["-", "-"],
    "ffw_gating/lora_kernel_a": ["-", "-"],
    "ffw_gating/lora_kernel_b": ["-", "model"],
    "ffw_linear/lora_kernel_a": ["model", "-"],
    "ffw_linear/lora_kernel_b": ["-", "-"],
}


@pytest.fixture(scope="module")
def torch_texts() -> list[str]:
    rewriter = HuggingFaceRewriter(TINY, quantise=False, settings=GenerationSettings(max_new_tokens=16))
    assert isinstance(rewriter, Rewriter) and rewriter.name == "hf:tiny-gemma"
    return rewriter.rewrite(ORIGINALS, PROMPTS)


def keras_run(devices: int) -> dict:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "KERAS_BACKEND": "jax",
    }
    command = [sys.executable, "-c", KERAS, TINY, json.dumps([ORIGINALS, PROMPTS])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_torch_rewrites_every_row(torch_texts):
    assert len(torch_texts) == 2 and all(text.strip() for text in torch_texts)
    assert not any("<end_of_turn>" in text for text in torch_texts)


def test_quantised_weights_rewrite_too():
    texts = HuggingFaceRewriter(TINY, settings=GenerationSettings(max_new_tokens=8, batch_size=1)).rewrite(
        ORIGINALS, PROMPTS
    )
    assert len(texts) == 2 and all(texts)


@pytest.fixture(scope="module")
def on_one_device() -> dict:
    return keras_run(1)


@pytest.fixture(scope="module")
def on_eight_devices() -> dict:
    return keras_run(8)


def test_keras_on_one_device_says_what_torch_says(on_one_device, torch_texts):
    assert on_one_device["devices"] == 1 and on_one_device["texts"] == torch_texts


def test_keras_sharded_over_eight_devices_says_the_same(on_one_device, on_eight_devices, torch_texts):
    assert on_eight_devices["devices"] == 8 and on_eight_devices["shards"] == 8
    assert on_eight_devices["texts"] == torch_texts
    assert on_eight_devices["logits"] == pytest.approx(on_one_device["logits"], abs=1e-4)


def test_every_kind_of_weight_is_split_as_the_layout_says(on_one_device, on_eight_devices):
    layout = {row["weight"].replace("decoder_block_*/", ""): row for row in on_eight_devices["layout"]}
    assert {name: row["axes"] for name, row in layout.items()} == SPLIT
    for whole in on_one_device["layout"]:
        row = layout[whole["weight"].replace("decoder_block_*/", "")]
        pieces = 8 if "model" in row["axes"] else 1
        assert row["bytes_per_device"] * pieces == whole["bytes_per_device"] and row["why"]
    assert layout["attention/query/kernel"]["count"] == 4 and layout["attention/query/kernel"]["shape"] == [8, 256, 32]


def test_a_single_key_and_value_head_stays_whole(on_eight_devices):
    axes = {row["weight"].split("/", 1)[1]: row["axes"] for row in on_eight_devices["one head"]}
    assert axes["attention/key/kernel"] == axes["attention/value/kernel"] == ["-", "-", "-"]
    assert axes["attention/query/kernel"] == ["model", "-", "-"]


def test_a_missing_model_names_what_to_attach():
    missing = "/kaggle/input/gemma/transformers/7b-it/3"
    with pytest.raises(InputError, match="attach the Kaggle model google/gemma"):
        HuggingFaceRewriter(missing)


def test_a_missing_keras_preset_names_what_to_attach():
    from promptrec.rewriters.keras_gemma import KerasGemmaRewriter

    with pytest.raises(InputError, match="gemma_instruct_7b_en"):
        KerasGemmaRewriter("/kaggle/input/gemma/keras/gemma_instruct_7b_en")


def test_the_seed_of_a_rewriter_is_that_of_its_draws(monkeypatch):
    monkeypatch.setenv(
        "PROMPTREC_SETTINGS", '{"GenerationSettings.temperature": 1.0, "GenerationSettings.max_new_tokens": 12}'
    )
    texts = [
        HuggingFaceRewriter(TINY, seed=seed, quantise=False).rewrite(["The ferry leaves."], ["Shout it"])[0]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="pickled weights are not loaded"):
        HuggingFaceRewriter(str(tmp_path))
