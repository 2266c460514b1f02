"""Fine-tuning on a toy Gemma in the real format: loss, resume, kill -9, adapters, merging."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import GemmaConfig, GemmaForCausalLM

from promptrec import language_model, lora
from promptrec.errors import InputError
from promptrec.profiles import ASSETS, override
from promptrec.templates import recovery_request

QUICK = lora.LoraSettings(rank=2, alpha=4, steps=6, batch_size=4, max_tokens=160, evaluate_every=2, validation_rows=4)


def make_toy_base(folder: Path, layers: int = 1) -> Path:
    """A random Gemma with the shipped tokenizer: real files, no knowledge."""
    tokenizer = language_model.load_tokenizer(ASSETS / "tiny-gemma")
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    GemmaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_toy_base(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def triples() -> pd.DataFrame:
    rows = [
        (f"The ferry number {n} leaves at nine.", f"Shout it {n} times.", f"THE FERRY {n} LEAVES AT NINE!")
        for n in range(24)
    ]
    return pd.DataFrame(rows, columns=["original_text", "rewrite_prompt", "rewritten_text"])


@pytest.fixture(scope="module")
def tokenizer(base):
    return language_model.load_tokenizer(base)


@pytest.fixture(scope="module")
def trained(base, triples, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    lora.finetune(triples[:16], triples[16:], str(base), out, QUICK)
    return out


def test_labels_cover_the_answer_and_nothing_else(tokenizer, triples):
    row = lora.encode_row(tokenizer, triples.iloc[0], "gemma", 200)
    answered = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(answered) == "Shout it 0 times.<end_of_turn>"
    assert len(row["input_ids"]) == len(row["labels"])
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_training_and_asking_share_one_template(tokenizer, triples):
    first = triples.iloc[0]
    row = lora.encode_row(tokenizer, first, "gemma", 200)
    request = language_model.token_ids(tokenizer, recovery_request(first["original_text"], first["rewritten_text"]))
    assert row["input_ids"][: len(request)] == request


def test_long_texts_are_shortened_and_the_answer_is_kept(tokenizer):
    long = pd.Series({"original_text": "word " * 400, "rewrite_prompt": "Shout it.", "rewritten_text": "WORD " * 400})
    row = lora.encode_row(tokenizer, long, "gemma", 120)
    assert len(row["input_ids"]) <= 120
    kept = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(kept) == "Shout it.<end_of_turn>"


def test_no_room_for_the_texts_is_said(tokenizer):
    row = pd.Series({"original_text": "a b", "rewrite_prompt": "word " * 100, "rewritten_text": "A B"})
    with pytest.raises(InputError, match="max_tokens=40"):
        lora.encode_row(tokenizer, row, "gemma", 40)


def test_blank_cells_are_refused_before_training(tokenizer, triples):
    bad = triples.copy()
    bad.loc[3, "rewritten_text"] = "  "
    with pytest.raises(InputError, match="row 4: rewritten_text"):
        lora.encode_table(tokenizer, bad, "gemma", 160)


def test_answer_only_logits_give_the_loss_of_full_logits(base, tokenizer, triples):
    model = lora.attach_adapter(language_model.load_model(base, quantise=False), override(QUICK, quantise=False))
    model.eval()
    rows = [lora.encode_row(tokenizer, row, "gemma", 160) for _, row in triples[:3].iterrows()]
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    full = model(**inputs).loss
    assert lora.answer_loss(model, inputs).item() == pytest.approx(full.item(), rel=1e-5)


def test_all_masked_labels_fail_loudly(base):
    model = lora.attach_adapter(language_model.load_model(base, quantise=False), override(QUICK, quantise=False))
    ids = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(InputError, match="no answer tokens"):
        lora.answer_loss(model, {"input_ids": ids, "attention_mask": ids, "labels": torch.full((1, 5), -100)})


def test_a_fresh_adapter_changes_nothing(base, tokenizer):
    ids = torch.tensor([language_model.token_ids(tokenizer, "The ferry leaves at nine.")])
    plain = language_model.load_model(base)
    with torch.inference_mode():
        before = plain(ids).logits
        after = lora.attach_adapter(plain, QUICK).eval()(ids).logits
    assert torch.allclose(before, after, atol=1e-5)


def test_only_the_adapter_is_trained_and_in_fp32(base):
    model = lora.attach_adapter(language_model.load_model(base), QUICK)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(
        "lora_" in name and parameter.dtype == torch.float32 for name, parameter in trainable.items()
    )
    assert {name.split(".")[-4] for name in trainable} == set(lora.ALL_LINEAR)


def test_finetune_saves_a_peft_adapter_and_its_history(trained):
    assert {"adapter_model.safetensors", "adapter_config.json", "history.csv", "tokenizer.json"} <= {
        p.name for p in trained.iterdir()
    }
    history = pd.read_csv(trained / "history.csv")
    assert history["step"].is_monotonic_increasing and history["eval_loss"].notna().sum() == 3
    assert not [path for path in trained.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_finished_run_called_again_trains_no_further(base, triples, trained):
    before = load_file(trained / "adapter_model.safetensors")
    lora.finetune(triples[:16], triples[16:], str(base), trained, QUICK)
    after = load_file(trained / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_checkpoint_with_the_best_scs_is_kept(base, triples, tmp_path):
    scores = iter([0.1, 0.9, 0.2])
    history = lora.finetune(
        triples[:16], triples[16:], str(base), tmp_path, QUICK, held_out_scs=lambda model, tokenizer: next(scores)
    )
    assert history["scs"].dropna().tolist() == [0.1, 0.9, 0.2]
    best = load_file(tmp_path / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(best[name], saved[name]) for name in best)


def test_a_time_budget_stops_and_saves(base, triples, tmp_path):
    history = lora.finetune(
        triples[:16], triples[16:], str(base), tmp_path, override(QUICK, steps=500, time_budget=2.0)
    )
    assert history["step"].max() < 500
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_several_adapters_are_loaded_switched_and_disabled(base, trained, tokenizer):
    first = trained / "checkpoints" / "checkpoint-4"
    model, _ = lora.load_adapters(str(base), {"late": trained, "early": first})
    ids = torch.tensor([language_model.token_ids(tokenizer, "The ferry leaves at nine.")])
    outputs = {}
    with torch.inference_mode():
        for name in ("late", "early"):
            model.set_adapter(name)
            outputs[name] = model(ids).logits
        with model.disable_adapter():
            outputs["none"] = model(ids).logits
        plain = language_model.load_model(base)(ids).logits
    assert torch.allclose(outputs["none"], plain, atol=1e-5)
    assert not torch.allclose(outputs["late"], plain, atol=1e-5)


def test_a_missing_adapter_is_named(base, tmp_path):
    with pytest.raises(InputError, match=r"adapter mine: .*adapter_model.safetensors"):
        lora.load_adapters(str(base), {"mine": tmp_path})


def test_merging_keeps_what_base_and_adapter_say(base, trained, tokenizer, tmp_path):
    merged = language_model.load_model(lora.merge_adapter(str(base), trained, tmp_path / "merged"), quantise=False)
    apart, _ = lora.load_adapters(str(base), {"adapter": trained}, quantise=False)
    ids = torch.tensor([language_model.token_ids(tokenizer, "The ferry leaves at nine.")])
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, apart(ids).logits, atol=1e-4)


KILLED = textwrap.dedent("""
    import multiprocessing, random, sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from promptrec import lora
    from promptrec.profiles import activate, get_profile
    from test_lora import KILL_SETTINGS, kill_rows
    activate(get_profile("local"))
    rows, rng = kill_rows(), random.Random(5)
    interrupted = Path(sys.argv[2]) / "interrupted"

    def train(out):
        lora.finetune(rows[:16], rows[16:], sys.argv[1], out, KILL_SETTINGS)

    def last():
        return lora.last_checkpoint(interrupted / "checkpoints")

    # By the clock alone a busy machine would be killed before its first checkpoint each time: every other kill waits
    # until the run has got further, however long that takes.
    for kill in range(10):
        before, child = last(), multiprocessing.get_context("fork").Process(target=train, args=[interrupted])
        child.start()
        while kill % 2 and last() == before and child.is_alive():
            time.sleep(0.01)
        child.join(rng.uniform(0, 0.5) if kill % 2 else rng.uniform(0.3, 2.5))
        child.kill()
        child.join()
        print("after kill", kill, "last checkpoint", last(), flush=True)
    train(interrupted)
    train(Path(sys.argv[2]) / "whole")
""")
KILL_SETTINGS = override(QUICK, steps=60, evaluate_every=3)


def kill_rows() -> pd.DataFrame:
    rows = [(f"The ferry number {n} leaves.", f"Shout it {n} times.", f"THE FERRY {n} LEAVES!") for n in range(20)]
    return pd.DataFrame(rows, columns=["original_text", "rewrite_prompt", "rewritten_text"])


def test_killed_ten_times_training_goes_on_and_ends_where_an_undisturbed_run_ends(base, tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(base), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reached = [line.rsplit("checkpoint-", 1)[-1] for line in done.stdout.splitlines() if line.startswith("after kill")]
    steps = [int(step) if step.isdigit() else 0 for step in reached]
    assert len(steps) == 10 and steps == sorted(steps) and steps[-1] > 0
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("interrupted", "whole")]
    # rounding differs between processes; a lost optimiser state or another order of rows would show in the first digits
    assert all(torch.allclose(adapters[0][key], adapters[1][key], atol=2e-3) for key in adapters[1])
    histories = [pd.read_csv(tmp_path / name / "history.csv") for name in ("interrupted", "whole")]
    assert histories[0]["step"].tolist() == histories[1]["step"].tolist()
    assert histories[0]["eval_loss"].dropna().tolist() == pytest.approx(
        histories[1]["eval_loss"].dropna().tolist(), abs=2e-3
    )


def test_a_folder_with_another_run_is_refused(base, triples, trained):
    with pytest.raises(InputError, match="other settings"):
        lora.finetune(triples[:16], triples[16:], str(base), trained, override(QUICK, rank=3))
