"""Choosing among other methods' answers: what is rated highest is answered, whatever the order, and faults are named."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from promptrec.choosing import (
    Asked,
    BayesRisk,
    Chooser,
    ChoosingSettings,
    agreement,
    build_agreement,
    build_judge,
    build_likelihood,
    candidates_of,
    first_token_logs,
    judge_request,
)
from promptrec.data import shipped_triples, slice_words
from promptrec.embedding import EmbeddingRecoverer
from promptrec.errors import InputError
from promptrec.inference import Constant
from promptrec.language_model import TINY_GEMMA, answer_log_likelihood, load_model, load_tokenizer
from promptrec.methods import Joint, Method, Task
from promptrec.predictor import PredictorSettings
from promptrec.profiles import get_profile
from promptrec.rewriters.rules import RulesRewriter
from promptrec.templates import rewrite_request

QUICK = PredictorSettings(folds=2, epochs=2, batch_size=16, hidden=32)
TEXTS = ["original_text", "rewritten_text"]


@pytest.fixture(scope="module")
def triples() -> dict[str, pd.DataFrame]:
    """A few shipped triples of each split, their texts shortened."""
    sizes = {"train": 16, "validation": 6, "test": 5}
    tables = {split: shipped_triples([split]).iloc[::3].head(rows) for split, rows in sizes.items()}
    shorten = lambda column: column.map(lambda text: slice_words(text, 24))  # noqa: E731
    return {split: table[TEXTS].apply(shorten).join(table["rewrite_prompt"]) for split, table in tables.items()}


@pytest.fixture(scope="module")
def asked() -> Asked:
    settings = ChoosingSettings(original_words=12, rewritten_words=12, candidate_words=12, batch_size=4)
    return Asked(load_model(TINY_GEMMA, quantise=False), load_tokenizer(TINY_GEMMA), "gemma", settings)


def answered(triples: pd.DataFrame, **answers: list[str]) -> pd.DataFrame:
    return triples[TEXTS].assign(**{f"answer:{name}": given for name, given in answers.items()})


@pytest.fixture(scope="module")
def candidates(triples) -> np.ndarray:
    """The true prompt, a constant and another row's prompt, [5, 3]."""
    truth = triples["test"]["rewrite_prompt"].tolist()
    return np.array([truth, ["Make it rhyme."] * 5, truth[1:] + truth[:1]], dtype=object).T


# --- candidates


def test_candidates_are_the_answer_columns_in_their_order(triples):
    table = answered(triples["test"], b=list("vwxyz"), a=list("VWXYZ"))
    found = candidates_of(table.assign(id=range(5)))
    assert list(found) == ["b", "a"] and found.iloc[0].tolist() == ["v", "V"]


def test_a_table_without_answers_or_with_a_blank_one_is_refused(triples):
    test = triples["test"]
    with pytest.raises(InputError, match="no other method's answers"):
        candidates_of(test)
    with pytest.raises(InputError, match="row 2: answer:a is blank"):
        candidates_of(answered(test, a=["x", " ", "x", "x", "x"]))
    with pytest.raises(InputError, match="no rows"):
        candidates_of(answered(test, a=list("vwxyz")).head(0))


def test_the_chooser_answers_with_the_best_and_of_equals_with_the_first(triples):
    table = answered(triples["test"], a=list("vwxyz"), b=list("VWXYZ"))
    ratings = np.array([[0, 1], [1, 0], [2, 2], [-3, -2], [-2, -3]])
    assert Chooser("rated", lambda *_: ratings).recover(table) == ["V", "w", "x", "Y", "z"]


# --- agreement


def test_the_answer_most_like_the_others_wins(word_scorer):
    rows = np.array([["red", "red green", "green"], ["blue", "red", "red"]], dtype=object)
    ratings = agreement(rows, word_scorer)
    half = 0.5**1.5  # cos^3 of one word with two
    assert ratings == pytest.approx(np.array([[half / 2, half, half / 2], [0, 0.5, 0.5]]), abs=1e-6)
    assert agreement(rows[:, [2, 0, 1]], word_scorer) == pytest.approx(ratings[:, [2, 0, 1]])
    assert agreement(rows[:, :1], word_scorer) == pytest.approx(0)  # nobody to agree with


# --- a language model asked


def test_the_judge_does_not_care_where_a_candidate_stands(asked, triples, candidates):
    ratings = asked.judge(triples["test"], candidates)
    assert ratings.shape == (5, 3) and (ratings < 0).all()
    assert asked.judge(triples["test"], np.roll(candidates, 1, axis=1)) == pytest.approx(
        np.roll(ratings, 1, axis=1), abs=1e-4
    )
    alike = asked.judge(triples["test"], candidates[:, [1, 1, 1]])
    assert np.ptp(alike, axis=1) == pytest.approx(0, abs=1e-4)
    assert np.ptp(ratings, axis=1).min() > 1e-3  # and it does care what they say


def test_first_token_logs_are_the_model_s_own_whatever_the_batch(asked):
    requests = [judge_request("a cat", "a dog", ["Swap the pet", "Shout"]), judge_request("x " * 30, "y", ["A", "B"])]
    logs = first_token_logs(asked.model, asked.tokenizer, requests, ["1", "2"])
    for request, told in zip(requests, logs, strict=True):
        ids = asked.tokenizer(request, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat([torch.tensor([[asked.tokenizer.bos_token_id]]), ids], 1)
        with torch.inference_mode():
            own = asked.model(ids).logits[0, -1].log_softmax(-1)
        numbers = asked.tokenizer.convert_tokens_to_ids(["1", "2"])
        assert told == pytest.approx(own[numbers].numpy(), abs=1e-3)
    assert "1. Swap the pet\n2. Shout" in requests[0]


def test_likelihood_is_that_of_the_rewrite_under_each_candidate(asked):
    table = pd.DataFrame({"original_text": ["The cat sat."], "rewritten_text": ["THE CAT SAT."]})
    options = ["Shout it", "Be sad"]
    requests = [rewrite_request("The cat sat.", option) for option in options]
    expected = answer_log_likelihood(asked.model, asked.tokenizer, requests, ["THE CAT SAT."] * 2)
    assert asked.likelihood(table, np.array([options], dtype=object))[0] == pytest.approx(expected, abs=1e-5)


def test_likelihood_finds_the_prompt_of_rewrites_that_the_model_was_taught(asked):
    prompts = [
        "Rewrite this as a weather forecast.",
        "Make a list of the key points of this text.",
        "Rewrite this text in baby talk.",
    ]
    originals = shipped_triples(["test"])["original_text"].drop_duplicates().head(5).tolist()
    rows = [(original, prompt) for original in originals for prompt in prompts]
    table = pd.DataFrame(rows, columns=["original_text", "rewrite_prompt"])
    table["rewritten_text"] = RulesRewriter().rewrite(*(table[column].tolist() for column in table))
    found = asked.likelihood(table, np.tile(np.array(prompts, dtype=object), (len(table), 1))).argmax(1)
    right = (np.array(prompts)[found] == table["rewrite_prompt"]).mean()
    assert right > 0.6  # a third by chance


def test_the_contrast_takes_off_what_depends_on_the_candidate_alone(asked, triples, candidates):
    test, references = triples["test"], triples["train"].head(2)
    taken = asked.likelihood(test, candidates) - asked.contrast(test, candidates, references)
    assert np.ptp(taken[:, 1]) == pytest.approx(0, abs=1e-4)  # the constant, in every row
    assert taken[1:, 0] == pytest.approx(taken[:-1, 2], abs=1e-4)  # a prompt, in its own row and in the one before
    assert np.ptp(taken, axis=1).max() > 1e-3  # so that it can change a choice
    general = asked.likelihood(references, np.array([["Make it rhyme."]] * 2, dtype=object)).mean()
    assert taken[0, 1] == pytest.approx(general, abs=1e-4)


# --- Bayes risk


@pytest.fixture(scope="module")
def embedding(minilm, text_encoder, triples, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTREC_CACHE", str(tmp_path_factory.mktemp("choosing")))
        return EmbeddingRecoverer(minilm, settings=QUICK, encoder=text_encoder).fit(triples["train"])


def test_nothing_in_reach_is_expected_to_score_more_than_what_bayes_risk_answers(
    embedding, minilm, triples, candidates
):
    table = answered(triples["test"], true=candidates[:, 0], constant=candidates[:, 1])
    answers = BayesRisk(embedding).recover(table)
    posterior = embedding.posterior(triples["test"])
    for row, answer in enumerate(answers):
        reach = [*candidates[row, :2], *embedding.bank]
        assert answer in reach
        reached = posterior.value(row, minilm.encode([answer]))[0]
        assert reached == pytest.approx(posterior.value(row, minilm.encode(reach)).max(), abs=1e-6)


def test_a_row_s_answer_does_not_depend_on_the_other_rows(embedding, triples, candidates):
    table = answered(triples["test"], true=candidates[:, 0], constant=candidates[:, 1])
    every = BayesRisk(embedding).recover(table)
    assert BayesRisk(embedding).recover(table.iloc[[3, 1]]) == [every[3], every[1]]


# --- as methods


class SmallTask(Task):
    """A task whose bank is that of its training triples."""

    @property
    def bank(self) -> list[str]:
        return self.train["rewrite_prompt"].tolist()


def task(triples: dict[str, pd.DataFrame], seed: int = 0) -> Task:
    return SmallTask(get_profile("local"), triples["train"], triples["validation"], Path("none"), seed)


@pytest.mark.parametrize("builder", ["agreement", "judge", "likelihood", "likelihood-contrastive", "mbr"])
def test_every_chooser_works_as_a_method_on_others_answers(builder, triples, monkeypatch, tmp_path, minilm):
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path))
    monkeypatch.setenv(
        "PROMPTREC_SETTINGS", '{"original_words": 10, "rewritten_words": 10, "most_steps": 2, "folds": 2}'
    )
    name, _, contrastive = builder.partition("-")
    method = Method("joint", "nobody", f"choosing:build_{name}", {"contrastive": True} if contrastive else {}, ("a",))
    parts = {"one": Constant("Shout it."), "two": Constant("Make it sad."), "three": Constant("Make it sad, please.")}
    joint = Joint(parts, method, task(triples), "joint")
    answers = joint.recover(triples["test"])
    reach = {part.prompt for part in parts.values()} | (
        set(triples["train"]["rewrite_prompt"]) if name == "mbr" else set()
    )
    assert len(answers) == 5 and set(answers) <= reach
    assert answers == joint.recover(triples["test"])
    if name == "agreement":
        assert set(answers) <= {"Make it sad.", "Make it sad, please."}


def test_the_references_of_the_contrast_are_drawn_by_the_seed(triples, candidates):
    table = answered(triples["test"].head(2), one=candidates[:2, 0], two=candidates[:2, 1])
    rated = [build_likelihood(task(triples, seed), contrastive=True).rate(table, candidates[:2]) for seed in (0, 0, 1)]
    assert rated[0] == pytest.approx(rated[1], abs=1e-6)
    assert np.abs(rated[0] - rated[2]).max() > 1e-3


def test_choosers_are_named_as_they_are_called(triples):
    made = [build(task(triples)) for build in (build_agreement, build_judge, build_likelihood)]
    assert [one.name for one in made] == ["agreement", "judge", "forward-likelihood"]
