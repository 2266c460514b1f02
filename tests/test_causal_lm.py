"""What is trained on: the loss and its labels, subsets of the triples, adapters that differ by one setting."""

import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from promptrec import causal_lm, lora
from promptrec.data import shipped_triples
from promptrec.errors import InputError
from promptrec.language_model import load_tokenizer
from promptrec.methods import Task
from promptrec.profiles import get_profile, override
from promptrec.training_run import claim_folder

SMALL = {"steps": 2, "evaluate_every": 2, "validation_rows": 2, "rank": 2, "batch_size": 4, "max_tokens": 96}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    train, validation = (shipped_triples([split]).head(rows) for split, rows in (("train", 24), ("validation", 6)))
    return Task(get_profile("local"), train, validation, tmp_path_factory.mktemp("adapter"), seed=3)


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer")
    return causal_lm.train_adapter(task, folder, **SMALL)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setenv("PROMPTREC_SETTINGS", json.dumps({f"LoraSettings.{key}": value for key, value in SMALL.items()}))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / lora.ADAPTER)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- the loss


def test_the_whole_loss_labels_every_token_and_changes_nothing_else(task):
    tokenizer = load_tokenizer(task.profile.base_model)
    for _, row in task.train.head(3).iterrows():
        answer, whole = (lora.encode_row(tokenizer, row, "gemma", 120, loss) for loss in lora.LOSSES)
        assert answer["input_ids"] == whole["input_ids"] == whole["labels"]
        kept = [label for label in answer["labels"] if label != -100]
        assert 0 < len(kept) < len(whole["labels"]) and whole["labels"][-len(kept) :] == kept


def test_the_whole_loss_is_the_language_model_s_own(task):
    base = lora.load_model(task.profile.base_model, quantise=False)
    model = lora.attach_adapter(base, lora.LoraSettings(quantise=False)).eval()
    tokenizer = load_tokenizer(task.profile.base_model)
    row = lora.encode_row(tokenizer, task.train.iloc[0], "gemma", 96, "whole")
    ids = torch.tensor([row["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([row["labels"]])}
    assert lora.answer_loss(model, inputs).item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)


def test_an_unknown_loss_is_named():
    with pytest.raises(InputError, match="loss 'prompt' is unknown; choose one of answer, whole"):
        override(lora.LoraSettings(), loss="prompt")


def test_a_run_from_before_there_was_a_choice_goes_on_and_another_loss_is_refused(task, trained):
    mark = trained / "run.json"
    assert "loss" not in json.loads(mark.read_text())["settings"]  # as it was written before
    before = os.stat(trained / lora.ADAPTER).st_mtime_ns
    assert causal_lm.train_adapter(task, trained, **SMALL) == trained
    assert os.stat(trained / lora.ADAPTER).st_mtime_ns == before  # finished: not trained again
    with pytest.raises(InputError, match="a run with other settings"):
        causal_lm.train_adapter(task, trained, **SMALL, loss="whole")


def test_a_whole_run_is_marked_and_an_answer_run_refused_in_its_folder(task, tmp_path):
    settings = override(causal_lm.COMPARED, **SMALL, seed=3, loss="whole")
    assert not claim_folder(tmp_path, settings, task.train, task.profile.base_model, lora.ADAPTER)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["loss"] == "whole"
    with pytest.raises(InputError, match="a run with other settings"):
        causal_lm.train_adapter(task, tmp_path, **SMALL)


# --- adapters


def test_the_same_seed_gives_the_same_adapter_and_another_loss_another(task, trained, tmp_path):
    again = causal_lm.train_adapter(task, tmp_path / "again", **SMALL)
    whole = causal_lm.train_adapter(task, tmp_path / "whole", **SMALL, loss="whole")
    assert same(weights(trained), weights(again)) and not same(weights(trained), weights(whole))


def test_a_run_that_evaluates_on_its_way_is_watched_by_score(task, trained, tmp_path):
    causal_lm.train_adapter(task, tmp_path, **SMALL | {"evaluate_every": 1})
    assert pd.read_csv(tmp_path / "history.csv")["scs"].notna().sum() == 2
    assert pd.read_csv(trained / "history.csv")["scs"].isna().all()


def test_the_builder_trains_on_its_rows_and_answers(task, small, tmp_path):
    built = causal_lm.build(task, "small", rows=8)
    answers = built.recover(task.validation.drop(columns="rewrite_prompt").head(3))
    assert built.name == "fine-tuned-small" and len(answers) == 3 and all(answer.strip() for answer in answers)
    rows = causal_lm.subset(task.train, task.clusters, 8, seed=task.seed)
    expected = weights(causal_lm.train_adapter(replace(task, train=rows), tmp_path))
    held = {name.replace(".recovery", ""): weight for name, weight in built.model.state_dict().items()}
    assert all(torch.equal(held[name], weight) for name, weight in expected.items())


# --- subsets


def table(sizes: list[int]) -> tuple[pd.DataFrame, np.ndarray]:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return pd.DataFrame({"rewrite_prompt": [f"prompt {place}" for place in range(len(groups))]}), groups


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_subset_has_as_many_rows_of_few_clusters(seed):
    train, groups = table([1] * 40 + [9, 5, 4, 8, 3])
    wide = causal_lm.subset(train, groups, 12, seed=seed)
    narrow = causal_lm.subset(train, groups, 12, clusters=3, seed=seed)
    assert len(wide) == len(narrow) == 12
    assert narrow["prompt_cluster"].value_counts().tolist() == [4, 4, 4]
    assert set(narrow["prompt_cluster"]) <= {40, 41, 42, 43} and wide["prompt_cluster"].nunique() > 3
    for part in (wide, narrow):
        assert part["rewrite_prompt"].is_unique
        assert (groups[part["rewrite_prompt"].str.split().str[1].astype(int)] == part["prompt_cluster"]).all()


def test_subsets_follow_their_seed():
    train, groups = table([6] * 8)
    one, again, other = (causal_lm.subset(train, groups, 12, 2, seed) for seed in (0, 0, 1))
    assert one.equals(again) and not one.equals(other)


def test_a_table_with_less_gives_what_it_has():
    train, groups = table([3, 2, 1])
    assert len(causal_lm.subset(train, groups, 100)) == 6
    assert set(causal_lm.subset(train, groups, 4, 2)["prompt_cluster"]) == {0, 1}


@pytest.mark.parametrize(("rows", "clusters"), [(0, 0), (-1, 0), (3, 4)])
def test_too_few_rows_are_refused(rows, clusters):
    with pytest.raises(InputError, match="training rows cannot hold"):
        causal_lm.subset(*table([3, 3]), rows, clusters)
