"""LoRA in Keras on eight virtual devices: sharded and unsharded runs agree, a killed run ends where a whole one ends.

JAX counts its devices when it is imported, so `kill_in_the_middle` and `measure_everything` run in their own process.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from promptrec import finetuning, lora_keras, methods
from promptrec.errors import InputError
from promptrec.lora_keras import Encoded, KerasGeneration, KerasLoraSettings
from promptrec.profiles import ASSETS, PROFILES, get_profile, override
from promptrec.rewriters import keras_gemma
from promptrec.rewriters.keras_gemma import bucket_of, gemma_config, layout_rules

TINY = str(ASSETS / "tiny-gemma")
QUICK = KerasLoraSettings(
    rank=2, steps=6, learning_rate=1e-2, batch_size=2, accumulation=2, max_tokens=160, evaluate_every=2
)
SHORT = KerasGeneration(max_new_tokens=8, batch_size=4)


def triples() -> pd.DataFrame:
    rows = [(f"The ferry {n} leaves at nine.", f"Shout it {n} times.", f"THE FERRY {n} LEAVES!") for n in range(16)]
    table = pd.DataFrame(rows, columns=["original_text", "rewrite_prompt", "rewritten_text"])
    return table.assign(id=[f"r{n}" for n in range(16)])


def train(out: Path, settings: KerasLoraSettings = QUICK, **options) -> pd.DataFrame:
    return lora_keras.finetune(triples()[:12], triples()[12:], TINY, out, settings, **options)


def kill_in_the_middle(out: Path) -> None:
    """SIGKILL while the second checkpoint is being written: the adapter is there, the history is not."""
    write, written = lora_keras.write_json, []

    def dying(value, path):
        if path.name == "history.json" and written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.extend([path] if path.name == "history.json" else [])
        return write(value, path)

    lora_keras.write_json = dying
    train(out / "killed")


def measure_everything(out: Path) -> None:
    """Every run that the tests compare; figures go to `out`/measured.json."""
    import keras

    measured = {"after kill": [path.name for path in lora_keras.complete_checkpoints(out / "killed" / "checkpoints")]}
    train(out / "killed")
    train(out / "whole")
    measured["budget"] = by_profile(out, time_budget=1e-3)["step"].tolist()
    measured["scs"] = by_profile(out)["scs"].tolist()
    measured |= answers(out)
    keras.distribution.set_distribution(None)
    scores = iter([0.1, 0.9, 0.2])
    plain = override(QUICK, gradient_checkpointing=False)
    train(out / "unsharded", plain, held_out_scs=lambda model, tokenizer: next(scores), shard=False)
    (out / "measured.json").write_text(json.dumps(measured))


def keras_profile():
    """The TPU's way of fine-tuning and answering, with the base that is shipped."""
    return dataclasses.replace(get_profile("local"), rewriter="keras")


def by_profile(out: Path, **changes) -> pd.DataFrame:
    """The run that `promptrec finetune` makes on a Keras profile."""
    splits = ["train"] * 12 + ["validation"] * 4
    triples().assign(split=splits, prompt_cluster=range(16)).to_csv(out / "triples.csv", index=False)
    finetuning.profile_scorer = lambda profile: Exact()
    quick = {key: value for key, value in dataclasses.asdict(QUICK).items() if key not in ("seed", "time_budget")}
    quick |= {"evaluate_every": 6} | changes
    return finetuning.finetune_file(out / "triples.csv", out / "budget", keras_profile(), **quick)


def answers(out: Path) -> dict:
    """What recoverers with and without adapters say, and how often generation was compiled for it."""
    from keras_hub.models import GemmaCausalLM

    compiled, step = [], GemmaCausalLM.generate_step

    def counting(self, inputs, stop_token_ids=None):
        compiled.append(inputs["token_ids"].shape)
        return step(self, inputs, stop_token_ids)

    GemmaCausalLM.generate_step = counting
    tuned = methods.make_recoverer("fine-tuned", keras_profile(), adapter=out / "whole")
    assert isinstance(tuned, lora_keras.KerasRecoverer) and tuned.name == "fine-tuned"
    tuned.settings, tuned.log = SHORT, out / "log.jsonl"
    model, table = tuned.model, triples().drop(columns="rewrite_prompt").tail(6)
    table.loc[14:, "original_text"] = "The ferry leaves at nine. " * 22
    logits = lambda: np.asarray(model(lora_keras.batch_of([Encoded((2, *range(300, 340)), 5)], 1)[0]))  # noqa: E731
    plain = logits()
    found = {"first": tuned.recover(table[:4])}
    before, adapted = len(compiled), logits()
    base = lora_keras.KerasRecoverer(model, tuned.tokenizer, "zero-shot", settings=SHORT)
    found["zero-shot"] = base.recover(table[:4])
    found |= {"off": float(abs(logits() - plain).max()), "on": float(abs(adapted - plain).max())}
    found["all"] = tuned.recover(table)
    lora_keras.save_adapter(model, out / "saved.lora.h5")
    found |= {"compiled": compiled, "compiled before": before, "log": len((out / "log.jsonl").read_text().splitlines())}
    found["no mark"] = refused(lambda: keras_gemma.end_ids(tuned.tokenizer, "<end_of_speech>"))
    found["refused"] = refused(lambda: lora_keras.use_adapter(model, out / "queries.lora.h5"))
    return found


class Exact:
    """A scorer for which only equal texts are alike."""

    name = "exact (test)"

    def encode(self, texts) -> np.ndarray:
        return np.stack([np.random.default_rng(sum(text.encode())).normal(size=8) for text in texts])


def refused(call) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def run(function: str, out: Path) -> subprocess.CompletedProcess:
    script = "import sys; from pathlib import Path; from promptrec.profiles import activate, get_profile; "
    script += f"activate(get_profile('local')); import test_lora_keras as t; t.{function}(Path(sys.argv[1]))"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": str(Path(__file__).parent),
        "PROMPTREC_OUT": str(out),
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),  # the runs share their training step
    }
    command = [sys.executable, "-c", script, str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    with h5py.File(out / "queries.lora.h5", "w") as file:
        file["lora/vars/rank"], file["lora/5/vars/lora_kernel_a"] = 2, np.zeros(1)
    assert run("kill_in_the_middle", out).returncode == -signal.SIGKILL
    done = run("measure_everything", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def measured(runs) -> dict:
    return json.loads((runs / "measured.json").read_text())


def adapter(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")


def test_sharded_and_unsharded_training_have_the_same_losses(runs):
    """The sharded run also recomputes its activations; that changes no loss either."""
    sharded, unsharded = history(runs / "whole"), history(runs / "unsharded")
    assert sharded["step"].tolist() == [2, 4, 6]
    for column in ("loss", "eval_loss"):
        assert sharded[column].tolist() == pytest.approx(unsharded[column].tolist(), rel=1e-3)
    assert sharded["eval_loss"].iloc[-1] < sharded["eval_loss"].iloc[0]


def test_a_killed_run_ends_where_an_undisturbed_one_ends(runs, measured):
    assert measured["after kill"] == ["checkpoint-2"]
    killed, whole = adapter(runs / "killed" / "adapter.lora.h5"), adapter(runs / "whole" / "adapter.lora.h5")
    assert killed.keys() == whole.keys() and len(whole) == 1 + 2 * 7 * 4
    assert all(np.allclose(killed[name], whole[name], atol=2e-3) for name in whole)
    pd.testing.assert_frame_equal(history(runs / "killed"), history(runs / "whole"), rtol=1e-3)


def test_a_finished_run_is_not_repeated_and_another_one_is_refused(runs):
    assert len(train(runs / "whole")) == 3  # at once: Keras is not even imported here
    with pytest.raises(InputError, match="other settings"):
        train(runs / "whole", override(QUICK, rank=3))
    run = json.loads((runs / "whole" / "run.json").read_text())
    assert run["base_model"] == "tiny-gemma" and run["settings"]["rank"] == 2 and run["settings"]["seed"] == 0
    assert run["settings"]["target_layer_names"] == list(lora_keras.ALL_LINEAR)


def test_the_checkpoint_with_the_best_scs_is_kept(runs):
    assert history(runs / "unsharded")["scs"].tolist() == [0.1, 0.9, 0.2]
    best = adapter(runs / "unsharded" / "checkpoints" / "checkpoint-4" / "adapter.lora.h5")
    saved = adapter(runs / "unsharded" / "adapter.lora.h5")
    assert all(np.array_equal(best[name], saved[name]) for name in best)


def test_a_time_budget_stops_and_the_run_goes_on_from_there(runs, measured):
    assert measured["budget"] == [1]
    assert history(runs / "budget")["step"].tolist() == [1, 6]
    assert history(runs / "budget")["eval_loss"].iloc[-1] == pytest.approx(
        history(runs / "whole")["eval_loss"].iloc[-1], rel=1e-3
    )


def test_nothing_is_pickled(runs):
    checkpoint = runs / "whole" / "checkpoints" / "checkpoint-6"
    assert {path.name for path in checkpoint.iterdir()} == {"adapter.lora.h5", "optimizer.npz", "history.json"}
    with np.load(checkpoint / "optimizer.npz", allow_pickle=False) as state:
        assert int(state["0"]) == 12 and not any(state[name].dtype == object for name in state)


def test_saving_and_loading_an_adapter_is_exact(runs):
    whole, saved = adapter(runs / "whole" / "adapter.lora.h5"), adapter(runs / "saved.lora.h5")
    assert whole.keys() == saved.keys() and all(np.array_equal(whole[name], saved[name]) for name in whole)


def test_an_adapter_is_switched_on_and_off(measured):
    assert measured["off"] < 1e-5 < 1e-2 < measured["on"]
    assert measured["first"] != measured["zero-shot"]


def test_generation_is_compiled_once_for_every_length_bucket(measured):
    assert measured["compiled before"] == 1
    assert measured["compiled"] == [[4, 128 + 8], [4, 256 + 8]]


def test_answers_are_logged_and_found_again(measured):
    assert measured["all"][:4] == measured["first"] and len(measured["all"]) == 6
    assert measured["log"] == 6  # four from the first call, two from the second


def test_a_keras_profile_fine_tunes_in_keras(runs, measured):
    manifest = json.loads((runs / "budget.manifest.json").read_text())
    assert manifest["rows"] == 12 and manifest["config"]["settings"]["target_layer_names"][0] == "query"
    assert all(-1 <= score <= 1 for score in measured["scs"])
    assert finetuning.settings_for(PROFILES["kaggle-tpu"]) == lora_keras.V3_8


def test_an_adapter_for_other_layers_is_refused(measured):
    assert "adapts 1 layers, the model carries LoRA on 28" in measured["refused"]


def test_a_tokenizer_that_knows_no_chat_is_refused(measured):
    assert "no chat mark <end_of_speech>; use an instruction-tuned Gemma" in measured["no mark"]


def test_the_loss_counts_the_answer_only():
    row = Encoded((2, 10, 11, 12, 20, 21), answer=4)
    inputs, following, weights = lora_keras.batch_of([row], 3)
    assert inputs["token_ids"].shape == following.shape == weights.shape == (3, 128)
    assert following[0][weights[0] == 1].tolist() == [20, 21]
    assert inputs["padding_mask"].sum(1).tolist() == [5, 5, 5] and weights[1:].sum() == 0


def test_batches_depend_on_seed_and_epoch_alone_and_hold_one_bucket():
    rows = [Encoded((2, *range(length)), 3) for length in [*range(20, 60), *range(140, 180)]]
    whole = list(lora_keras.training_batches(rows, 4, 0, 0, 45))
    parts = [*lora_keras.training_batches(rows, 4, 0, 0, 17), *lora_keras.training_batches(rows, 4, 0, 17, 45)]
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(whole, parts, strict=True))
    epoch = lora_keras.epoch_of(rows, 4, np.random.default_rng(1))
    assert sorted(len(row.ids) for batch in epoch for row in batch) == [len(row.ids) for row in rows]
    assert all(len({bucket_of(len(row.ids) - 1) for row in batch}) == 1 for batch in epoch)


def test_unknown_targets_and_schedules_are_named():
    with pytest.raises(InputError, match="q_proj; choose from query"):
        lora_keras.attach_lora(None, override(QUICK, target_layer_names=("query", "q_proj")))
    with pytest.raises(InputError, match="linear"):
        lora_keras.learning_rates(override(QUICK, schedule="linear"))


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(InputError, match=r"adapter.lora.h5: no such adapter; run Part 2"):
        lora_keras.adapter_file(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(InputError, match="peft_to_keras"):
        lora_keras.adapter_file(tmp_path)
    (tmp_path / "torn.lora.h5").write_bytes(b"torn")
    with pytest.raises(InputError, match="not a Keras LoRA file"):
        lora_keras.adapted_layers(tmp_path / "torn.lora.h5")


def test_another_family_s_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="a 'llama' model; this path runs Gemma and Gemma 2"):
        gemma_config(tmp_path)


def test_heads_that_cannot_be_shared_out_stay_whole():
    config = gemma_config(TINY)
    key_value = ".*(key|value)/(kernel|lora_kernel_a)"
    assert layout_rules(config, 8)[key_value][0] == ("model", None, None)
    assert layout_rules(config | {"num_key_value_heads": 1}, 8)[key_value][0] == (None, None, None)
    with pytest.raises(InputError, match="3 devices cannot share 8 query heads"):
        layout_rules(config, 3)
