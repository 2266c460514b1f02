"""From a file to an adapter: splits made or checked, settings by profile, the manifest."""

import json

import pandas as pd
import pytest
from test_lora import make_toy_base

from promptrec import finetuning
from promptrec.errors import InputError
from promptrec.lora import T4, LoraSettings
from promptrec.profiles import PROFILES, get_profile

PLACES = (
    "ferry",
    "bakery",
    "museum",
    "stadium",
    "library",
    "harbour",
    "orchard",
    "garage",
    "chapel",
    "market",
    "airport",
    "kitchen",
)
REQUESTS = (
    "Turn it into a sea shanty",
    "Make it sound like a lawyer",
    "Summarise in three words",
    "Add a dragon to the story",
    "Write it as a weather forecast",
    "Explain it to a toddler",
    "Use only questions",
    "Translate into pirate speech",
    "Make it a love letter",
    "List the facts as bullet points",
    "Tell it backwards",
    "Set it on the moon",
)


def write_triples(path, **extra):
    rows = [
        {
            "original_text": f"The {place} opens at {hour} on Mondays and Fridays.",
            "rewrite_prompt": f"{request}.",
            "rewritten_text": f"{request.upper()} about the {place} ({hour} o'clock)!",
        }
        for hour, (place, request) in enumerate(zip(PLACES, REQUESTS, strict=True), 1)
    ]
    pd.DataFrame(rows).assign(**extra).to_csv(path, index=False)
    return path


@pytest.fixture
def profile(tmp_path):
    import dataclasses

    return dataclasses.replace(get_profile("local"), base_model=str(make_toy_base(tmp_path / "base")))


def test_local_and_kaggle_settings_differ_and_changes_are_checked():
    assert finetuning.settings_for(PROFILES["local"]) == LoraSettings()
    assert finetuning.settings_for(PROFILES["kaggle-t4x2"]) == T4
    assert finetuning.settings_for(PROFILES["local"], rank=3).rank == 3
    with pytest.raises(InputError, match="no setting rnak"):
        finetuning.settings_for(PROFILES["local"], rnak=3)


def test_a_file_without_splits_is_clustered_and_split(tmp_path, minilm):
    table = finetuning.split_triples(write_triples(tmp_path / "t.csv"))
    assert len(table) == 12 and table["prompt_cluster"].nunique() == 12
    assert table.groupby("prompt_cluster")["split"].nunique().eq(1).all()


def test_a_split_without_clusters_is_kept(tmp_path, minilm):
    split = ["train"] * 8 + ["test"] * 4
    table = finetuning.split_triples(write_triples(tmp_path / "t.csv", split=split))
    assert table["split"].tolist() == split and table["prompt_cluster"].nunique() == 12


def test_a_leaking_split_of_the_file_is_refused(tmp_path, minilm):
    path = write_triples(tmp_path / "t.csv", prompt_cluster=1, split=["train"] * 6 + ["test"] * 6)
    with pytest.raises(InputError, match="prompt_cluster"):
        finetuning.split_triples(path)


def test_a_file_without_validation_rows_is_refused(tmp_path, profile):
    path = write_triples(tmp_path / "t.csv", prompt_cluster=range(12), split="train")
    with pytest.raises(InputError, match="12 training and 0 validation rows"):
        finetuning.finetune_file(path, tmp_path / "adapter", profile)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_comes_with_history_and_manifest(tmp_path, profile):
    path = write_triples(tmp_path / "t.csv", prompt_cluster=range(12), split=["train"] * 8 + ["validation"] * 4)
    history = finetuning.finetune_file(
        path, tmp_path / "adapter", profile, steps=4, evaluate_every=2, batch_size=4, rank=2
    )
    assert history["scs"].notna().sum() == 2
    manifest = json.loads((tmp_path / "adapter.manifest.json").read_text())
    assert manifest["rows"] == 8 and manifest["config"]["settings"]["rank"] == 2
    assert manifest["config"]["scorer"] == "MiniLM (proxy)"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_manifest_counts_the_seconds_of_all_calls(tmp_path, profile):
    path = write_triples(tmp_path / "t.csv", prompt_cluster=range(12), split=["train"] * 8 + ["validation"] * 4)
    manifest = tmp_path / "adapter.manifest.json"
    changes = {"steps": 4, "evaluate_every": 2, "batch_size": 4, "rank": 2}
    finetuning.finetune_file(path, tmp_path / "adapter", profile, **changes)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seconds": 3600.0}))
    finetuning.finetune_file(path, tmp_path / "adapter", profile, **changes)  # finished already
    assert 3600 <= json.loads(manifest.read_text())["seconds"] < 3700
