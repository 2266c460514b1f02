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
import keras
from promptrec.rewriters.keras_gemma import KerasGemmaRewriter
rewriter = KerasGemmaRewriter(sys.argv[1], max_new_tokens=16, batch_size=2)
query = rewriter.model.backbone.get_layer("decoder_block_0").attention.query_dense.kernel
print(json.dumps({
    "devices": len(keras.distribution.list_devices()), "name": rewriter.name,
    "shards": len({str(shard.index) for shard in query.value.addressable_shards}),
    "texts": rewriter.rewrite(*json.loads(sys.argv[2])),
}))
"""


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


def test_keras_on_one_device_says_what_torch_says(torch_texts):
    run = keras_run(1)
    assert run["devices"] == 1 and run["texts"] == torch_texts


def test_keras_sharded_over_eight_devices_says_the_same(torch_texts):
    run = keras_run(8)
    assert run["devices"] == 8 and run["shards"] == 8
    assert run["texts"] == torch_texts


def test_a_missing_model_names_what_to_attach():
    missing = "/kaggle/input/gemma/transformers/7b-it/3"
    with pytest.raises(InputError, match="attach the Kaggle model google/gemma"):
        HuggingFaceRewriter(missing)


def test_a_missing_keras_preset_names_what_to_attach():
    from promptrec.rewriters.keras_gemma import KerasGemmaRewriter

    with pytest.raises(InputError, match="gemma_instruct_7b_en"):
        KerasGemmaRewriter("/kaggle/input/gemma/keras/gemma_instruct_7b_en")


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="pickled weights are not loaded"):
        HuggingFaceRewriter(str(tmp_path))
