"""Joining other methods' answers: sentences once, orders and trusts that the validation rows ask for, faults named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from easy_triples import STYLES, easy

from promptrec.embedding import EmbeddingRecoverer
from promptrec.errors import InputError
from promptrec.inference import Constant
from promptrec.joining import (
    Blend,
    Concatenation,
    GateTagsClusters,
    JoiningSettings,
    best_order,
    join_answers,
)
from promptrec.methods import Joint, Method, Task
from promptrec.predictor import PredictorSettings
from promptrec.profiles import get_profile
from promptrec.scoring import scs
from promptrec.submission import FALLBACK
from promptrec.text_features import PairFeatures

QUICK = PredictorSettings(folds=2, epochs=4, batch_size=16, hidden=32)


def answered(table: pd.DataFrame, **answers) -> pd.DataFrame:
    return table.assign(**{f"answer:{name}": given for name, given in answers.items()})


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "cache"))


# --- sentences


@pytest.mark.parametrize(
    ("answers", "joined"),
    [
        (["Shout it.", "Make it sad"], "Shout it. Make it sad."),
        (["Shout it..", "SHOUT, it!", "Shout it"], "Shout it."),
        (["Shout it. Make it sad.", "Make it sad. Or not?"], "Shout it. Make it sad. Or not?"),
        (["", "Shout it,", "  "], "Shout it."),
        (["Shout it...", "..."], "Shout it."),
        (["", " "], FALLBACK),
    ],
)
def test_every_sentence_is_said_once_with_one_stop(answers, joined):
    assert join_answers(answers) == joined
    assert join_answers([joined, joined]) == joined


# --- order


def test_what_helps_is_joined_and_what_does_not_is_left_out(word_scorer):
    truth = ["alpha beta", "gamma delta", "alpha delta"]
    pieces = pd.DataFrame(
        {"noise": ["omega"] * 3, "second": ["beta", "delta", "delta"], "first": ["alpha", "gamma", "alpha"]}
    )
    assert set(best_order(pieces, truth, word_scorer)) == {"first", "second"}
    assert best_order(pieces.assign(whole=truth), truth, word_scorer) == ("whole",)


@pytest.mark.parametrize("seed", range(3))
def test_no_single_column_is_better_than_the_joined_ones_on_the_rows_they_were_chosen_by(word_scorer, seed):
    rng = np.random.default_rng(seed)
    vocabulary = np.array(["one", "two", "three", "four", "five", "six"])
    draw = lambda: [" ".join(rng.choice(vocabulary, 2)) for _ in range(12)]  # noqa: E731
    truth, table = draw(), answered(easy(12, seed), a=draw(), b=draw(), c=draw())
    joined = Concatenation(word_scorer).fit(table.assign(rewrite_prompt=truth)).recover(table)
    alone = [word_scorer.scs([f"{text}." for text in table[f"answer:{name}"]], truth).mean() for name in "abc"]
    assert word_scorer.scs(joined, truth).mean() >= max(alone) - 1e-6


def test_the_concatenation_says_when_it_cannot_be_fitted_or_asked(word_scorer):
    table = answered(easy(3, 0), a="Shout it.")
    with pytest.raises(InputError, match="no order yet"):
        Concatenation(word_scorer).recover(table)
    for missing in (table.head(0), table.drop(columns="rewrite_prompt")):
        with pytest.raises(InputError, match="no validation triples"):
            Concatenation(word_scorer).fit(missing)
    with pytest.raises(InputError, match="no other method's answers"):
        Concatenation(word_scorer).fit(easy(3, 0))


# --- gate, tags, clusters

SMALL = JoiningSettings(trusted="model", clusters=4, tags=12, decay=0.1, epochs=200)


@pytest.fixture(scope="module")
def features(text_encoder) -> PairFeatures:
    return PairFeatures(text_encoder).fit(easy(60, 0))


@pytest.fixture(scope="module")
def half_right() -> pd.DataFrame:
    """Rows whose model answers are right, and short, or wrong, and long."""
    table = easy(40, 1)
    right = np.arange(40) % 2 == 0
    return answered(table, model=np.where(right, table["rewrite_prompt"], "potato zebra " * 3))


@pytest.fixture
def fitted(word_scorer, features, half_right) -> GateTagsClusters:
    return GateTagsClusters(word_scorer, features, SMALL).fit(easy(60, 0), half_right)


def test_the_gate_lets_through_what_was_right_and_closes_on_the_rest(fitted, half_right):
    gated = fitted.pieces(half_right)["gated answer"]
    right = half_right["answer:model"] == half_right["rewrite_prompt"]
    assert (gated[right] == half_right["rewrite_prompt"][right]).mean() > 0.9
    assert (gated[~right] == "").mean() > 0.9


def test_clusters_and_tags_say_what_unseen_rows_were_asked(fitted):
    unseen = answered(easy(20, 2), model="Bake a cake")
    pieces = fitted.pieces(unseen)
    assert (pieces["cluster prompt"] == unseen["rewrite_prompt"]).mean() > 0.9
    said = [
        set(tags.split()) <= set(prompt.lower().split())
        for tags, prompt in pieces[["tags"]].join(unseen["rewrite_prompt"]).to_numpy()
    ]
    assert np.mean(said) > 0.8 and (pieces["tags"] != "").mean() > 0.8
    assert pieces["mean prompt"].nunique() == 1 and set(pieces["mean prompt"]) <= set(STYLES)


def test_the_answer_is_the_pieces_in_the_chosen_order_and_the_same_by_seed(fitted, word_scorer, features, half_right):
    unseen = answered(easy(8, 2), model="Bake a cake")
    pieces = fitted.pieces(unseen)[list(fitted.order)]
    answers = fitted.recover(unseen)
    assert answers == [join_answers(row) for row in pieces.to_numpy()]
    again = GateTagsClusters(word_scorer, features, SMALL).fit(easy(60, 0), half_right)
    assert again.order == fitted.order and again.recover(unseen) == answers


def test_answers_that_are_never_right_close_the_gate_for_good(word_scorer, features, half_right):
    wrong = half_right.assign(**{"answer:model": "potato zebra"})
    assert set(
        GateTagsClusters(word_scorer, features, SMALL).fit(easy(60, 0), wrong).pieces(wrong)["gated answer"]
    ) == {""}


def test_gate_tags_and_clusters_say_what_is_missing(word_scorer, features, half_right):
    new = GateTagsClusters(word_scorer, features, SMALL)
    with pytest.raises(InputError, match="not fitted"):
        new.recover(half_right)
    with pytest.raises(InputError, match="the gate needs the column answer:model"):
        new.fit(easy(60, 0), half_right.rename(columns={"answer:model": "answer:other"}))
    with pytest.raises(InputError, match="too few content words"):
        new.fit(easy(8, 0).assign(rewrite_prompt="Do it"), half_right)


# --- blend


@pytest.fixture(scope="module")
def embedding(minilm, text_encoder, tmp_path_factory) -> EmbeddingRecoverer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTREC_CACHE", str(tmp_path_factory.mktemp("joining")))
        return EmbeddingRecoverer(minilm, settings=QUICK, encoder=text_encoder).fit(easy(60, 0))


def test_the_blend_trusts_who_was_right_and_scores_no_less_on_the_rows_it_chose_by(embedding, minilm):
    table = easy(24, 1)
    table = answered(
        table, junk=table["rewrite_prompt"].sample(frac=1, random_state=0).to_numpy(), right=table["rewrite_prompt"]
    )
    settings = JoiningSettings(most_trust=8.0, evaluations=60)
    blend = Blend(embedding, settings).fit(table)
    assert blend.trust["right"] > blend.trust["junk"] and all(0 <= trust <= 8 for trust in blend.trust.values())
    truth = minilm.encode(table["rewrite_prompt"].tolist())
    before, after = (scs(one.posterior(table).vectors, truth).mean() for one in (embedding, blend))
    assert after >= before
    assert Blend(embedding, settings).fit(table).trust == blend.trust


def test_the_blend_answers_every_row_from_bank_and_answers(embedding):
    embedding.decoding = replace(embedding.decoding, joined=2)
    table = answered(easy(6, 1), other="Bake a cake")
    answers = Blend(embedding, JoiningSettings(evaluations=10)).fit(table).recover(table.drop(columns="rewrite_prompt"))
    said = {word for prompt in [*STYLES, "Bake a cake"] for word in prompt.split()}
    assert len(answers) == 6 and all({*answer.split()} <= said for answer in answers)


def test_the_blend_says_when_it_cannot_be_fitted_or_asked(embedding):
    table = answered(easy(3, 0), a="Shout it.")
    with pytest.raises(InputError, match="no trusts yet"):
        Blend(embedding).recover(table)
    with pytest.raises(InputError, match="no validation triples"):
        Blend(embedding).fit(table.head(0))


# --- as methods


class SmallTask(Task):
    """A task whose bank is that of its training triples."""

    @property
    def bank(self) -> list[str]:
        return self.train["rewrite_prompt"].tolist()


@pytest.mark.parametrize("builder", ["concatenation", "gate_tags_clusters", "blend"])
def test_every_way_of_joining_works_as_a_method_on_others_answers(cache, builder, monkeypatch):
    monkeypatch.setenv(
        "PROMPTREC_SETTINGS", '{"most_steps": 2, "folds": 2, "JoiningSettings.epochs": 2, "evaluations": 10}'
    )
    task = SmallTask(get_profile("local"), easy(24, 0), easy(8, 1), Path("none"))
    parts = {"best-constant": Constant("Make it sad."), "fine-tuned": Constant("Rewrite it as a pirate would.")}
    joint = Joint(parts, Method("joint", "nobody", f"joining:build_{builder}", needs=tuple(parts)), task, "joint")
    test = easy(5, 2).drop(columns="rewrite_prompt")
    answers = joint.recover(test)
    assert len(answers) == 5 and all(answer.strip() for answer in answers)
    assert answers == joint.recover(test) and joint.method.name == builder.replace("_", "-")
