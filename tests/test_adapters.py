"""One adapter in torch and in Keras: what is converted says the same, in both directions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from promptrec import adapters
from promptrec.adapters import Factors
from promptrec.errors import InputError
from promptrec.profiles import ASSETS

TINY = str(ASSETS / "tiny-gemma")
TEXT = "The ferry leaves at nine. Bring a coat."


def random_peft(folder: Path, rank: int, alpha: int, targets=tuple(adapters.TARGETS), scale: float = 0.05):
    """A torch model carrying a random adapter, saved in `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model

    from promptrec.language_model import load_model

    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(load_model(TINY, quantise=False), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=scale)
    model.save_pretrained(folder)
    return model.eval()


def measure_both_ways(out: Path) -> None:
    """Logits of torch and Keras with one adapter, made in peft, then in Keras; written to `out`/measured.json."""
    import torch
    from peft import PeftModel

    from promptrec.language_model import load_model
    from promptrec.lora_keras import ALL_LINEAR, save_adapter, use_adapter
    from promptrec.rewriters.keras_gemma import load_gemma, padded, token_ids

    tokenizer = load_gemma(TINY)[1]
    ids = token_ids(tokenizer, TEXT)
    inputs = dict(zip(("token_ids", "padding_mask"), padded([ids], len(ids)), strict=True))

    def in_torch(model, ids=ids) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits.numpy()

    def in_keras(adapter: Path | None) -> np.ndarray:
        model = load_gemma(TINY)[0]
        if adapter:
            use_adapter(model, adapter)
        return np.asarray(model(inputs))

    plain, measured = in_keras(None), {}
    for rank, alpha in ((2, 6), (5, 4)):  # below and above the rank at which Keras needs the whole of a head
        torch_logits = in_torch(random_peft(out / f"peft-{rank}", rank, alpha))
        path = adapters.peft_to_keras(out / f"peft-{rank}", out / f"keras-{rank}" / "adapter.lora.h5", TINY)
        keras_logits = in_keras(path)
        measured[f"there {rank}"] = float(abs(torch_logits - keras_logits).max())
        measured[f"moved {rank}"] = float(abs(keras_logits - plain).max())
    measured["losses"] = losses(load_gemma(TINY), in_torch)
    random_peft(out / "some", 3, 3, targets=("k_proj", "down_proj"))
    few = adapters.peft_to_keras(out / "some", out / "some" / "adapter.lora.h5", TINY)
    some = PeftModel.from_pretrained(load_model(TINY, quantise=False), out / "some").eval()
    measured["some"] = float(abs(in_torch(some) - in_keras(few)).max())

    model = load_gemma(TINY)[0]
    model.backbone.enable_lora(3, target_layer_names=list(ALL_LINEAR))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=0.05, size=variable.shape))
    save_adapter(model, out / "made" / "adapter.lora.h5")
    adapters.keras_to_peft(out / "made", out / "peft-made", TINY)
    back = PeftModel.from_pretrained(load_model(TINY, quantise=False), out / "peft-made").eval()
    measured["back"] = float(abs(in_torch(back) - np.asarray(model(inputs))).max())
    measured["back ranks"] = json.loads((out / "peft-made" / "adapter_config.json").read_text())["rank_pattern"]
    adapters.keras_to_peft(out / "keras-2", out / "peft-again", TINY)
    adapters.peft_to_keras(out / "peft-5", out / "thin" / "adapter.lora.h5", TINY, rank=8)
    (out / "measured.json").write_text(json.dumps(measured))


def losses(loaded, in_torch) -> list[float]:
    """The mean loss of two answers, as Keras' training sees it and from torch's logits."""
    import torch

    from promptrec.language_model import load_model
    from promptrec.lora_keras import KerasLoraSettings, attach_lora, compile_for_training, encode_table, evaluate

    model, tokenizer = loaded
    answers = ["Shout it.", "Make it sound like a lawyer from the harbour."]
    table = pd.DataFrame({"original_text": TEXT, "rewrite_prompt": answers, "rewritten_text": TEXT.upper()})
    rows = encode_table(tokenizer, table, "gemma", 128)
    attach_lora(model, KerasLoraSettings(rank=1))
    compile_for_training(model, KerasLoraSettings())
    base, total, count = load_model(TINY, quantise=False), 0.0, 0
    for row in rows:
        logits = torch.tensor(in_torch(base, row.ids))[0, row.answer - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.answer :]), reduction="sum"))
        count += len(logits)
    return [evaluate(model, rows, 4), total / count]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    script = "import sys; from pathlib import Path; from promptrec.profiles import activate, get_profile; "
    script += "activate(get_profile('local')); import test_adapters as t; t.measure_both_ways(Path(sys.argv[1]))"
    environment = os.environ | {
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": str(Path(__file__).parent),
        "PROMPTREC_OUT": str(folder),
    }
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def measured(out) -> dict:
    return json.loads((out / "measured.json").read_text())


@pytest.mark.parametrize("rank", [2, 5])
def test_an_adapter_from_peft_says_the_same_in_keras(measured, rank):
    assert measured[f"there {rank}"] < 1e-4 and measured[f"moved {rank}"] > 0.1


def test_both_frameworks_see_the_same_loss(measured):
    in_keras, in_torch = measured["losses"]
    assert in_keras == pytest.approx(in_torch, rel=1e-4)


def test_an_adapter_on_some_targets_is_carried_over(measured):
    assert measured["some"] < 1e-4


def test_an_adapter_from_keras_says_the_same_in_peft(measured):
    assert measured["back"] < 1e-4
    expected = dict.fromkeys(("q_proj", "k_proj", "v_proj"), 8 * 3)
    assert measured["back ranks"] == expected | dict.fromkeys(("o_proj", "gate_proj", "up_proj", "down_proj"), 3)


def test_there_and_back_an_adapter_has_its_rank_and_its_product(out):
    first, again = (adapters.read_peft(out / name) for name in ("peft-2", "peft-again"))
    assert first.keys() == again.keys()
    assert all(again[key].rank == 2 and adapters.relative_error(first[key], again[key]) < 1e-5 for key in first)


def test_what_was_converted_is_noted(out):
    run = json.loads((out / "keras-2" / "run.json").read_text())
    assert run["base_model"] == "tiny-gemma" and run["converted_from"] == "peft-2" and run["relative_error"] < 1e-6
    assert run["settings"]["rank"] == 16  # eight heads of rank 2
    thin = json.loads((out / "thin" / "run.json").read_text())
    assert thin["settings"]["rank"] == 8 and 0.1 < thin["relative_error"] < 1


@pytest.mark.parametrize(("heads", "rank"), [(4, 2), (4, 3), (1, 3), (None, 3)])
def test_cutting_by_heads_changes_no_product(heads, rank):
    rng, size = np.random.default_rng(0), 8
    update = Factors(rng.normal(size=(6, rank)), rng.normal(size=(rank, size * (heads or 1))))
    product = update.left @ update.right  # [in, heads * size]
    keras = adapters.to_keras_cut(update, heads)
    by_head = (keras.left @ keras.right).reshape(heads or 1, 6, size)
    assert np.allclose(by_head.transpose(1, 0, 2).reshape(6, -1), product)
    assert keras.rank == min((heads or 1) * rank, size if heads else rank)
    back = adapters.to_peft_cut(keras, heads)
    assert np.allclose(back.left @ back.right, product)
    assert adapters.compress(back).rank == rank


def test_compressing_finds_the_nearest_product():
    rng = np.random.default_rng(0)
    update = Factors(rng.normal(size=(9, 5)), rng.normal(size=(5, 7)))
    thin, product = adapters.compress(update, 2), update.left @ update.right
    values = np.linalg.svd(product, compute_uv=False)
    assert np.linalg.norm(product - thin.left @ thin.right) == pytest.approx(np.linalg.norm(values[2:]))
    expected = np.linalg.norm(values[2:]) / np.linalg.norm(values)
    assert adapters.relative_error(update, thin) == pytest.approx(expected)


def test_a_fresh_adapter_has_a_product_of_zero():
    thin = adapters.compress(Factors(np.ones((4, 3)), np.zeros((3, 5))))
    assert thin.rank == 1 and not (thin.left @ thin.right).any()


def peft_folder(folder: Path, tensors: dict, **options) -> Path:
    folder.mkdir()
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4} | options))
    return folder


QUERY = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 64),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (64, 2),
}


def test_alpha_is_read_as_peft_reads_it(tmp_path):
    key = (0, "q_proj")
    plain = adapters.read_peft(peft_folder(tmp_path / "a", QUERY))[key]
    stabilised = adapters.read_peft(peft_folder(tmp_path / "b", QUERY, use_rslora=True))[key]
    except_for = adapters.read_peft(peft_folder(tmp_path / "c", QUERY, alpha_pattern={"q_proj": 6}))[key]
    assert [float(f.right[0, 0]) for f in (plain, stabilised, except_for)] == pytest.approx([2, 4 / 2**0.5, 3])


def test_an_adapter_in_bfloat16_is_read(tmp_path):
    folder = peft_folder(tmp_path / "a", QUERY)
    save_torch(
        {name: torch.ones(shape).bfloat16() for name, shape in QUERY.items()}, folder / "adapter_model.safetensors"
    )
    assert adapters.read_peft(folder)[0, "q_proj"].left.dtype == np.float64


def test_what_keras_cannot_carry_is_named(tmp_path):
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 64)}
    with pytest.raises(InputError, match="cannot carry embed_tokens; it can q_proj"):
        adapters.read_peft(peft_folder(tmp_path / "a", QUERY | embedding))
    with pytest.raises(InputError, match="no place for use_dora, bias"):
        adapters.read_peft(peft_folder(tmp_path / "b", QUERY, use_dora=True, bias="all"))
    with pytest.raises(InputError, match="no peft adapter there"):
        adapters.read_peft(tmp_path)


def test_another_base_is_refused(tmp_path):
    with pytest.raises(InputError, match="q_proj of layer 0 is 64 x 64; the base is another one"):
        adapters.peft_to_keras(peft_folder(tmp_path / "a", QUERY), tmp_path / "x.lora.h5", TINY)


def test_files_hold_fp32(out):
    assert {array.dtype for array in load_file(out / "peft-made" / "adapter_model.safetensors").values()} == {
        np.dtype("f4")
    }
