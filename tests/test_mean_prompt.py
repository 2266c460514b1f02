"""Mean prompts: halves by cluster, one string a seed, better than the constant it starts from, one line for bad input."""

import dataclasses
import json
import operator

import numpy as np
import pandas as pd
import pytest

from promptrec import mean_prompt as module
from promptrec.errors import InputError
from promptrec.inference import best_constant
from promptrec.mean_prompt import halves, joined, mean_prompt
from promptrec.prompt_bank import shipped_prompts
from promptrec.search_encoders import MiniLMEncoder
from promptrec.tables import read_table, write_table
from promptrec.token_search import Objective, SearchSettings

PROMPTS = shipped_prompts()["rewrite_prompt"].tolist()[::110]
WORDS = tuple(sorted({word.strip(".,") for prompt in PROMPTS[::2] for word in prompt.lower().split()}))
QUICK = SearchSettings(evaluations=120, candidates=12, places=4, vocabulary=WORDS)


@pytest.fixture(scope="module")
def found(minilm):
    return mean_prompt(PROMPTS, minilm, QUICK)


def test_the_figures_are_those_of_the_string(found, minilm):
    clusters, searched = halves(PROMPTS)
    values = (minilm.encode(PROMPTS) @ minilm.encode([found["text"]])[0]) ** 3
    assert found["train"]["mean_scs"] == pytest.approx(values[searched].mean(), abs=1e-6)
    assert found["held_out"]["mean_scs"] == pytest.approx(values[~searched].mean(), abs=1e-6)
    assert found["held_out"]["low"] < found["held_out"]["mean_scs"] < found["held_out"]["high"]
    assert found["train"]["n"] + found["held_out"]["n"] == len(PROMPTS)
    assert not set(clusters[searched]) & set(clusters[~searched])
    constant = (minilm.encode(PROMPTS) @ minilm.encode([found["constant"]])[0]) ** 3
    assert found["gain"]["mean_scs"] == pytest.approx((values - constant)[~searched].mean(), abs=1e-6)


def test_the_search_ends_above_the_best_constant_and_above_its_start(found, minilm):
    train = [text for text, chosen in zip(PROMPTS, halves(PROMPTS)[1], strict=True) if chosen]
    assert found["constant"] == best_constant(train, minilm)
    constant = minilm.scs([found["constant"]] * len(train), train).mean()
    assert found["train"]["mean_scs"] > constant + 1e-4
    assert 0 < found["share_interval"][0] < found["share_of_vector"] < found["share_interval"][1] < 1.5
    values = [value for _, _, value in found["curve"]]
    assert constant < values[0] < values[-1] and values == sorted(values)
    assert values[-1] == pytest.approx(found["train"]["mean_scs"], abs=1e-5)
    assert found["evaluations"] <= QUICK.evaluations and 0 < found["seconds_to_best"] <= found["seconds"]
    assert (found["scorer"], found["stopped"], found["probes"]) == ("MiniLM (proxy)", False, None)


def test_the_same_seed_gives_the_same_string_and_another_other_halves(found, minilm):
    assert mean_prompt(PROMPTS, minilm, QUICK)["text"] == found["text"]
    assert (halves(PROMPTS, 0)[1] == halves(PROMPTS, 0)[1]).all() and (
        halves(PROMPTS, 0)[1] != halves(PROMPTS, 1)[1]
    ).any()


@pytest.mark.parametrize("seed", range(5))
def test_halves_do_not_depend_on_the_order_and_keep_copies_together(minilm, seed):
    prompts = PROMPTS[:20] + PROMPTS[:3] + [PROMPTS[0].upper()]
    clusters, searched = halves(prompts, seed)
    assert len(set(searched[[0, 20, 23]])) == 1 and clusters[0] == clusters[20] == clusters[23]
    assert abs(len(set(clusters[searched])) - len(set(clusters[~searched]))) <= 1
    assert (halves(prompts[::-1], seed)[1] == searched[::-1]).all()


def test_the_token_budget_holds_for_the_start_too(minilm):
    tight = mean_prompt(PROMPTS, minilm, dataclasses.replace(QUICK, max_tokens=9, evaluations=20))
    count = module.encoder_of(minilm).count_tokens
    assert count(tight["constant"]) <= 9 and count(tight["text"]) <= 9
    with pytest.raises(InputError, match="no prompt has 3 tokens or fewer"):
        mean_prompt(PROMPTS, minilm, dataclasses.replace(QUICK, max_tokens=3))


def test_probes_weigh_the_searched_half(found, minilm):
    texts = ["Write a poem", "Make it formal", "Tell it as a story for a child"]
    train = minilm.encode(PROMPTS)[halves(PROMPTS)[1]]
    poems = train @ minilm.encode(["poem"])[0]
    weights = np.exp(6 * poems) / np.exp(6 * poems).sum()
    weighed = mean_prompt(PROMPTS, minilm, QUICK, (texts, (minilm.encode(texts) @ train.T) ** 3 @ weights))
    assert weighed["probes"]["n"] == 3 and 1 < weighed["probes"]["effective_prompts"] < len(train)
    assert weighed["probes"]["residual"] < 1e-3 < weighed["probes"]["residual_before"]
    assert weighed["text"] != found["text"]


def test_joined_prompts_score_more_than_any_of_them_within_the_budget(minilm):
    vectors, encoder = minilm.encode(PROMPTS), module.search_encoder(minilm)
    objective = Objective.mean(vectors)
    texts = [joined(PROMPTS, vectors, objective, encoder, max_tokens) for max_tokens in (40, 128)]
    values = objective.value(minilm.encode(texts))
    assert objective.value(vectors).max() < values[0] < values[1]
    assert all(map(operator.le, map(encoder.count_tokens, texts), (40, 128)))


def test_a_scorer_without_gradients_says_so(word_scorer):
    with pytest.raises(InputError, match="has no gradient to search by; use --scorer minilm or t5-hf"):
        mean_prompt(PROMPTS, word_scorer, QUICK)


def test_stopping_by_hand_keeps_the_best_so_far(minilm, monkeypatch):
    started = []

    def stopped(encoder, objective, start, settings, note):
        started.append(start)
        note(module.Step(1, 0.5, 0.1, start))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "search", stopped)
    early = mean_prompt(PROMPTS, minilm, QUICK)
    assert early["stopped"] and early["text"] == started[0] and early["evaluations"] == 1
    assert "(stopped by hand)" in module.summary(early)


# --- the command


@pytest.fixture
def inputs(tmp_path, monkeypatch, minilm):
    monkeypatch.setattr(MiniLMEncoder, "whole_words", lambda self: list(WORDS))
    monkeypatch.setattr(MiniLMEncoder, "ordinary_pieces", lambda self: [*WORDS, "##s", "##ing"])
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "few.txt").write_text("Make it a poem\nmake it a poem\nSing it\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    write_table(pd.DataFrame({"rewrite_prompt": PROMPTS}), tmp_path / "prompts.csv")
    write_table(pd.DataFrame({"rewrite_prompt": ["a", None]}), tmp_path / "null.jsonl")
    write_table(pd.DataFrame({"rewrite_prompt": ["Make it a poem"], "score": [0.05]}), tmp_path / "probes.csv")
    write_table(pd.DataFrame({"rewrite_prompt": ["Make it a poem"], "score": [61]}), tmp_path / "percent.csv")
    return tmp_path


BAD = {
    "prompts.txt": "Missing option '--out'",
    "nowhere.txt --out m.txt": "nowhere.txt: no such file",
    "blank.txt --out m.txt": "blank.txt: holds no prompts; write one a line",
    "few.txt --out m.txt": "3 prompts in 2 clusters are too few; give at least 4 that differ",
    "latin.txt --out m.txt": "latin.txt: not UTF-8",
    "null.jsonl --out m.txt": "null.jsonl: row 2: rewrite_prompt is blank",
    "probes.csv --out m.csv": "name a file ending in .txt",
    "prompts.txt --out prompts.txt": "is a file that is read; name another",
    "prompts.txt --out few.txt/m.txt": "choose another place",
    "prompts.txt --out m.txt --max-tokens 2": "max_tokens must be 3 to 128",
    "prompts.txt --out m.txt --seconds -1": "seconds must be 0 (no limit) or more",
    "prompts.txt --out m.txt --evaluations 0": "evaluations must be at least 1",
    "prompts.txt --out m.txt --level letter": "level 'letter' is unknown; choose one of word, token",
    "prompts.txt --out m.txt --seed -1": "Invalid value for '--seed'",
    "prompts.txt --out m.txt --scorer bleu": "scorer 'bleu' is unknown",
    "prompts.txt --out m.txt --probes prompts.csv": "prompts.csv: no column score",
    "prompts.txt --out m.txt --probes percent.csv": "percent.csv: row 1: score 61.0 is not a number from -1 to 1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_writes_nothing(cli, inputs, line):
    before = sorted(inputs.rglob("*"))
    code, out, err = cli("mean-prompt", *line.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and BAD[line] in err
    assert sorted(inputs.rglob("*")) == before


def test_a_scorer_of_record_has_no_gradients(cli, inputs, word_scorer, monkeypatch):
    monkeypatch.setattr("promptrec.scoring.get_scorer", lambda *_: word_scorer)
    code, _, err = cli("mean-prompt", "prompts.txt", "--out", "m.txt", "--scorer", "t5-tf")
    assert (code, err.count("\n")) == (2, 1) and "no gradient to search by" in err


@pytest.mark.parametrize("level", ["word", "token"])
@pytest.mark.parametrize("source", ["prompts.txt", "prompts.csv"])
def test_the_command_writes_the_string_and_a_manifest(cli, inputs, source, level):
    options = ("--evaluations", 50, "--level", level, "--max-tokens", 30, "--seed", 2, "--json")
    code, out, err = cli("mean-prompt", source, "--out", "m.txt", *options)
    result, manifest = json.loads(out), json.loads((inputs / "m.txt.manifest.json").read_text())
    assert (code, err) == (0, "") and (inputs / "m.txt").read_text(encoding="utf-8") == result["text"] + "\n"
    assert {key: manifest[key] for key in ("artefact", "profile", "seed", "rows")} == {
        "artefact": "m.txt", "profile": "local", "seed": 2, "rows": len(read_table(inputs / "prompts.csv"))
    }  # fmt: skip
    assert manifest["config"]["text"] == result["text"] and manifest["config"]["settings"]["level"] == level


def test_a_person_reads_the_string_first_then_what_it_is_worth(cli, inputs):
    code, out, err = cli("mean-prompt", "prompts.txt", "--out", "m.txt", "--evaluations", 50, "--probes", "probes.csv")
    lines = out.splitlines()
    assert (
        (code, err) == (0, "") and len(lines) == 6 and lines[0] + "\n" == (inputs / "m.txt").read_text(encoding="utf-8")
    )
    assert lines[1].startswith("held-out mean SCS 0.") and lines[1].endswith("scorer: MiniLM (proxy)")
    assert lines[5].startswith("1 probes: RMS 0.")


def test_the_command_has_the_defaults_of_a_search():
    import inspect

    from promptrec.cli import mean_prompt as command

    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    assert all(
        defaults[name] == getattr(SearchSettings(), name) for name in ("max_tokens", "evaluations", "level", "seed")
    )
