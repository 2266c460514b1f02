"""Recoverers: the normaliser, constants, shots, and a language model whose answers survive a restart."""

import numpy as np
import pandas as pd
import pytest

from promptrec.errors import InputError
from promptrec.inference import (
    LONGEST_ANSWER,
    Constant,
    LanguageModelRecoverer,
    best_constant,
    check_pairs,
    normalise,
    pick_shots,
    predict_all,
)
from promptrec.scoring import scs
from promptrec.submission import FALLBACK
from promptrec.tables import read_jsonl


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Rewrite this as a sea shanty.", "Rewrite this as a sea shanty."),
        ("  Rewrite this\n as a   shanty. \n", "Rewrite this as a shanty."),
        ('"Rewrite this as a shanty"', "Rewrite this as a shanty"),
        ("`Rewrite this`", "Rewrite this"),
        ("**Rewrite** this as a **shanty**", "Rewrite this as a shanty"),
        ("## Rewrite this", "Rewrite this"),
        ("Prompt: Rewrite this", "Rewrite this"),
        ("**Prompt:** Rewrite this", "Rewrite this"),
        ("The rewrite prompt was: Rewrite this", "Rewrite this"),
        ("Instruction - Rewrite this", "Rewrite this"),
        ("Prompt:\n\nRewrite this", "Rewrite this"),
        ("**Instruction:**\n\nRewrite this", "Rewrite this"),
        ("Sure, here is the prompt:\n\n**Prompt:** Rewrite this", "Rewrite this"),
        ("Rewrite this<end_of_turn>", "Rewrite this"),
        ("<start_of_turn>Rewrite this<eos><pad><pad>", "Rewrite this"),
        ("Rewrite this\n\nThe text was changed because ...", "Rewrite this"),
        ("Rewrite this so that 2 < 3 and 4 > 1", "Rewrite this so that 2 < 3 and 4 > 1"),
        ("Answer the letter as a pirate", "Answer the letter as a pirate"),
        ("Prompt the reader to act", "Prompt the reader to act"),
        ("書き直してください", "書き直してください"),
    ],
)
def test_raw_answers_become_one_clean_line(answer, expected):
    assert normalise(answer) == expected
    assert normalise(normalise(answer)) == expected


@pytest.mark.parametrize("answer", ["", "  \n ", "<pad><pad>", "**", '""', "...", "1234", "🎉🎉", "Prompt:"])
def test_an_answer_with_nothing_in_it_becomes_the_fallback(answer):
    assert normalise(answer) == FALLBACK
    assert normalise(answer, fallback="Rewrite it") == "Rewrite it"


def test_a_model_that_goes_on_talking_is_cut_off():
    assert normalise("word " * 500) == " ".join(["word"] * LONGEST_ANSWER)


# --- constants


def test_a_constant_answers_every_row_alike():
    assert Constant().recover(pd.DataFrame({"x": range(3)})) == [FALLBACK] * 3


@pytest.mark.parametrize("count", [1, 7, 700])
def test_the_best_constant_is_that_of_brute_force(word_scorer, count):
    rng = np.random.default_rng(count)
    words = ["rewrite", "this", "as", "a", "shanty", "poem", "letter", "pirate", "formal", "sad"]
    prompts = [" ".join(rng.choice(words, size=rng.integers(2, 7))) for _ in range(count)]
    best = best_constant(prompts, word_scorer)
    means = {one: float(word_scorer.scs([one] * count, prompts).mean()) for one in set(prompts)}
    assert means[best] == pytest.approx(max(means.values()), abs=1e-6)


def test_the_best_of_many_candidates_is_found_wherever_it_stands(word_scorer):
    prompts = ["rewrite as a poem", "rewrite as a letter"]
    candidates = [f"{letter}{n}" for letter in "az" for n in range(600)] + ["rewrite as a text"]  # sorted: number 601
    assert best_constant(prompts, word_scorer, candidates) == "rewrite as a text"


def test_candidates_may_come_from_elsewhere_and_ties_do_not_depend_on_order(word_scorer):
    prompts = ["as a poem", "as a letter", "as a song"]
    assert best_constant(prompts, word_scorer, ["boil an egg", "as a text"]) == "as a text"
    assert best_constant(prompts, word_scorer, prompts[::-1]) == best_constant(prompts[::-1], word_scorer, prompts)


def test_no_prompts_give_no_constant(word_scorer):
    with pytest.raises(InputError, match="no training prompts"):
        best_constant([], word_scorer)


def test_predictions_of_several_recoverers_stand_one_below_the_other():
    table = predict_all([Constant("a", "one"), Constant("b", "two")], pd.DataFrame({"id": ["x", "y"]}))
    assert table.to_numpy().tolist() == [["x", "a", "one"], ["y", "a", "one"], ["x", "b", "two"], ["y", "b", "two"]]


# --- shots


@pytest.fixture
def train():
    rows = [(f"text {n}", f"rewritten {n}", f"prompt {n}", n // 3) for n in range(30)]
    long = [("word " * 61, "short", "long original", 90), ("short", "word " * 61, "long rewrite", 91)]
    return pd.DataFrame(rows + long, columns=["original_text", "rewritten_text", "rewrite_prompt", "prompt_cluster"])


@pytest.mark.parametrize("seed", range(5))
def test_shots_are_short_and_of_distinct_clusters(train, seed):
    shots = pick_shots(train, 10, seed)
    assert len({int(prompt.split()[1]) // 3 for _, _, prompt in shots}) == 10
    assert all(original == f"text {prompt.split()[1]}" for original, _, prompt in shots)
    assert shots == pick_shots(train, 10, seed)


def test_another_seed_draws_other_shots(train):
    assert pick_shots(train, 3, 0) != pick_shots(train, 3, 1)


def test_more_shots_than_clusters_are_refused(train):
    with pytest.raises(InputError, match="only 10 short training triples of distinct prompts; 11 shots asked for"):
        pick_shots(train, 11)


# --- tables


GOOD = pd.DataFrame({"id": ["a", "b"], "original_text": ["x", "y"], "rewritten_text": ["X", "Y"]})


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (GOOD.drop(columns="rewritten_text"), "in.csv: no column rewritten_text"),
        (GOOD.head(0), "in.csv: there are no rows"),
        (GOOD.assign(original_text=["x", " "]), "in.csv: row 2: original_text is blank"),
        (GOOD.assign(rewritten_text=[None, "Y"]), "in.csv: row 1: rewritten_text is blank"),
        (GOOD.assign(id="a"), "id 'a' occurs twice"),
        (GOOD.assign(id=["a", None]), "row 2: id is blank"),
    ],
)
def test_tables_that_cannot_be_answered_are_refused(table, reason):
    with pytest.raises(InputError, match=reason):
        check_pairs(table, "in.csv")


def test_a_table_needs_no_ids():
    assert check_pairs(GOOD.drop(columns="id")).equals(GOOD.drop(columns="id"))


# --- a language model: random weights, real files and a real tokenizer


@pytest.fixture(scope="module")
def toy():
    """(model, tokenizer): a Gemma of one small layer that knows nothing."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    from promptrec.language_model import load_tokenizer
    from promptrec.profiles import ASSETS

    tokenizer = load_tokenizer(ASSETS / "tiny-gemma")
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=32, pad_token_id=0, eos_token_id=1,
                         bos_token_id=2)  # fmt: skip
    return GemmaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def asked(monkeypatch):
    """What the model was asked, request by request; the model still answers."""
    from promptrec import language_model

    requests, generate = [], language_model.generate

    def record(model, tokenizer, texts, *rest, **options):
        requests.extend(texts)
        return generate(model, tokenizer, texts, *rest, **options)

    monkeypatch.setattr(language_model, "generate", record)
    return requests


def rows(count: int) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"r{n}" for n in range(count)], "original_text": [f"The ferry number {n}." for n in range(count)],
                         "rewritten_text": [f"Ahoy, ferry {n}!" for n in range(count)]})  # fmt: skip


def recoverer(toy, **options):
    from promptrec.language_model import GenerationSettings

    return LanguageModelRecoverer(*toy, "toy", settings=GenerationSettings(max_new_tokens=4, batch_size=2), **options)


def test_answers_found_in_the_log_are_not_asked_again(toy, asked, tmp_path):
    table, log = rows(6), tmp_path / "answers.jsonl"
    uninterrupted = recoverer(toy).recover(table)
    asked.clear()
    recoverer(toy, log=log).recover(table.head(4))
    assert len(asked) == 4
    assert recoverer(toy, log=log).recover(table) == uninterrupted
    assert len(asked) == 6
    assert sorted(row["id"] for row in read_jsonl(log)) == table["id"].tolist()


def test_a_log_torn_by_a_kill_loses_only_its_last_answer(toy, asked, tmp_path):
    table, log = rows(4), tmp_path / "answers.jsonl"
    first = recoverer(toy, log=log).recover(table)
    log.write_bytes(log.read_bytes()[:-3])
    asked.clear()
    assert recoverer(toy, log=log).recover(table) == first
    assert len(asked) == 1 and len(read_jsonl(log)) == 4


def test_out_of_time_means_the_fallback_and_no_line_in_the_log(toy, tmp_path):
    log = tmp_path / "answers.jsonl"
    assert recoverer(toy, log=log, stop_after=-1).recover(rows(3)) == [FALLBACK] * 3
    assert not log.exists()
    assert recoverer(toy, log=log).recover(rows(3)) == recoverer(toy).recover(rows(3))


def test_a_table_without_ids_is_answered_row_by_row(toy):
    assert recoverer(toy).recover(rows(3).drop(columns="id")) == recoverer(toy).recover(rows(3))


def test_long_texts_are_cut_and_shots_are_shown(toy, asked):
    table = rows(1).assign(original_text="word " * 1000)
    recoverer(toy, longest_text=20, shots=[("a", "b", "Make it rhyme")]).recover(table)
    assert asked[0].count("word ") <= 20
    assert "Make it rhyme<end_of_turn>" in asked[0]


def test_a_request_is_that_of_the_templates(toy, asked):
    from promptrec.templates import recovery_request

    recoverer(toy, chat="plain").recover(rows(1))
    assert asked == [recovery_request("The ferry number 0.", "Ahoy, ferry 0!", "plain")]


def test_bad_rows_never_reach_the_model(toy, asked):
    with pytest.raises(InputError, match="row 1: rewritten_text is blank"):
        recoverer(toy).recover(rows(2).assign(rewritten_text=["", "x"]))
    assert asked == []


def test_scs_of_the_best_constant_is_never_below_another_constant(word_scorer):
    prompts = ["rewrite as a poem", "rewrite as a letter", "boil an egg", "rewrite as a song"]
    best = best_constant(prompts, word_scorer)
    truth = word_scorer.encode(prompts)
    mean = {one: scs(word_scorer.encode([one] * 4), truth).mean() for one in prompts}
    assert best != "boil an egg" and mean[best] == max(mean.values())
