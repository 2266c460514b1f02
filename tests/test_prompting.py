"""Ways of asking: shots chosen three ways, openings forced token by token, several answers and the choice among them."""

import numpy as np
import pandas as pd
import pytest
import torch

from promptrec.data import shipped_triples
from promptrec.errors import InputError
from promptrec.inference import LanguageModelRecoverer
from promptrec.language_model import (
    TINY_GEMMA,
    GenerationSettings,
    answer_log_likelihood,
    generate,
    load_model,
    load_tokenizer,
    token_ids,
)
from promptrec.methods import Task
from promptrec.profiles import get_profile
from promptrec.prompting import (
    SeveralAnswers,
    Way,
    answer_in_ways,
    build_opened,
    build_opening_verbs,
    build_prompted,
    build_sampled,
    least_risk,
    most_likely,
    settings_for,
)
from promptrec.submission import FALLBACK
from promptrec.tables import read_jsonl
from promptrec.templates import recovery_request

STOP = "<end_of_turn>"
REQUESTS = [recovery_request("The ferry leaves. " * n, "Ahoy! The ferry leaves. " * n) for n in (1, 6, 3)]
SMALL = '{"PromptingSettings.new_tokens": 5, "PromptingSettings.pool": 30, "PromptingSettings.text_words": 12}'
BUILDERS = {
    "zero-shot": build_prompted,
    "few-shot": lambda task: build_prompted(task, "random"),
    "few-shot-similar": lambda task: build_prompted(task, "similar"),
    "few-shot-diverse": lambda task: build_prompted(task, "diverse"),
    "prefix-improve": lambda task: build_opened(task, "Improve this text by"),
    "prefix-modify": lambda task: build_opened(task, "Modify this text by"),
    "opening-verbs": build_opening_verbs,
    "sampled": build_sampled,
}


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_GEMMA, quantise=False), load_tokenizer(TINY_GEMMA)


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    return shipped_triples(["train"]).head(60)


@pytest.fixture(scope="module")
def adapter(random_adapter):
    """An adapter that was never trained, but says something else than the base."""
    return random_adapter(alpha=64, std=0.1)


@pytest.fixture
def task(monkeypatch, tmp_path, train, adapter):
    """function(**changes) -> a small task whose settings are shrunk and whose embeddings are kept apart."""
    monkeypatch.setenv("PROMPTREC_SETTINGS", SMALL)
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path))
    return lambda **changes: Task(**{
        "profile": get_profile("local"), "train": train, "validation": train.head(0), "adapter": adapter, **changes
    })  # fmt: skip


@pytest.fixture(scope="module")
def asked() -> pd.DataFrame:
    return shipped_triples(["validation"]).head(3)[["original_text", "rewritten_text"]]


# --- how likely an answer is


def by_hand(model, tokenizer, request: str, answer: str) -> float:
    """Mean log-probability of the answer's tokens from one unpadded forward pass."""
    begun, ended = token_ids(tokenizer, request), token_ids(tokenizer, answer, begin=False)
    with torch.inference_mode():
        nats = model(torch.tensor([begun + ended])).logits[0].log_softmax(-1)
    return float(np.mean([nats[len(begun) - 1 + place, token] for place, token in enumerate(ended)]))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_likelihood_of_an_answer_is_that_of_its_tokens_whatever_the_batch(tiny, batch_size):
    answers = ["Make it rhyme.<end_of_turn>", "Shout", "Rewrite this text as a long and formal letter to the mayor."]
    found = answer_log_likelihood(*tiny, REQUESTS, answers, batch_size)
    assert found == pytest.approx([by_hand(*tiny, *pair) for pair in zip(REQUESTS, answers, strict=True)], abs=1e-4)


def test_a_model_in_four_bits_says_how_likely_an_answer_is(tiny):
    four_bits = load_model(TINY_GEMMA), tiny[1]
    answers = ["Make it rhyme.", "Shout", "Turn it into a letter."]
    found = [answer_log_likelihood(*model, REQUESTS, answers) for model in (tiny, four_bits)]
    assert found[0] == pytest.approx(found[1], abs=0.7)
    assert list(found[0]) != list(found[1])


def test_an_answer_without_tokens_is_refused(tiny):
    with pytest.raises(InputError, match="answer 2 has no tokens"):
        answer_log_likelihood(*tiny, REQUESTS, ["Shout", "", "Shout"])


# --- several answers to a request


def test_the_likeliest_tokens_are_those_of_plain_generation(tiny):
    answers, likelihood = answer_in_ways(*tiny, REQUESTS, [Way(), Way()], STOP, 8)
    plain = generate(*tiny, REQUESTS, GenerationSettings(8), stop=STOP)
    assert answers == [[text, text] for text in plain]
    assert likelihood.shape == (3, 2) and np.allclose(likelihood[:, 0], likelihood[:, 1], atol=1e-4)


def test_forced_openings_stand_first_and_are_gone_on_from(tiny):
    openings = ["Improve this text by", "Turn", ""]
    answers, _ = answer_in_ways(*tiny, REQUESTS, [Way(opening) for opening in openings], STOP, 6)
    for number, opening in enumerate(openings[:2]):
        assert all(row[number].startswith(opening) and len(row[number]) > len(opening) for row in answers)
        ids = [token_ids(tiny[1], request) + token_ids(tiny[1], opening, begin=False) for request in REQUESTS]
        for row, begun in zip(answers, ids, strict=True):  # without a cache, without padding
            with torch.inference_mode():
                following = tiny[1].decode([int(tiny[0](torch.tensor([begun])).logits[0, -1].argmax())])
            assert row[number].startswith((opening + following).strip())


def test_the_likelihood_told_is_the_models_own_at_any_temperature(tiny):
    ways = [Way(), Way("Modify this text by"), Way(temperature=1e-4)]
    answers, told = answer_in_ways(*tiny, REQUESTS, ways, "", 12)
    for number in range(2):
        texts = [row[number] for row in answers]
        assert told[:, number] == pytest.approx(answer_log_likelihood(*tiny, REQUESTS, texts), abs=1e-3)
    assert told[:, 2] == pytest.approx(told[:, 0], abs=1e-4)


def test_samples_follow_the_seed_and_grow_greedy_as_it_cools(tiny):
    def sample(seed: int, temperature: float) -> list[list[str]]:
        torch.manual_seed(seed)
        return answer_in_ways(*tiny, REQUESTS, [Way(temperature=temperature)] * 2, STOP, 8)[0]

    assert sample(0, 1.0) == sample(0, 1.0) != sample(1, 1.0)
    assert any(first != second for first, second in sample(0, 1.0))
    assert sample(0, 1e-4) == answer_in_ways(*tiny, REQUESTS, [Way()] * 2, STOP, 8)[0]


def test_an_answer_does_not_depend_on_the_rows_beside_it(tiny):
    ways = [Way(), Way("Make")]
    together, likelihood = answer_in_ways(*tiny, REQUESTS, ways, STOP, 6)
    for row, request in enumerate(REQUESTS):
        alone, one = answer_in_ways(*tiny, [request], ways, STOP, 6)
        assert alone[0] == together[row] and one[0] == pytest.approx(likelihood[row], abs=1e-3)


# --- the choice


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_of_least_risk_is_that_of_brute_force_in_any_order(word_scorer, seed):
    rng = np.random.default_rng(seed)
    words = ["make", "it", "rhyme", "shout", "letter", "formal", "pirate"]
    answers = [" ".join(rng.choice(words, size=4)) for _ in range(6)]
    means = {one: np.mean([word_scorer.scs([one], [other])[0] for other in answers]) for one in answers}
    chosen = least_risk(word_scorer)(answers, np.zeros(6))
    assert means[chosen] == pytest.approx(max(means.values()), abs=1e-6)
    again = least_risk(word_scorer)(list(rng.permutation(answers)), np.zeros(6))
    assert means[again] == pytest.approx(means[chosen], abs=1e-6)


def test_what_most_samples_say_is_chosen(word_scorer):
    assert least_risk(word_scorer)(["shout it", "make a rhyme", "shout it"], np.zeros(3)) == "shout it"
    assert most_likely(["a", "b", "c"], np.array([-3.0, -0.5, -2.0])) == "b"


def test_each_row_gets_its_own_choice_and_the_log_keeps_it(tiny, asked, tmp_path):
    seen = []

    def last(answers, likelihood):
        seen.append((len(answers), likelihood.shape))
        return answers[-1]

    recoverer = SeveralAnswers(
        *tiny, "several", settings=GenerationSettings(5, batch_size=4), ways=[Way("Rewrite"), Way("Turn")], choose=last,
        longest_text=12, log=tmp_path / "log.jsonl",
    )  # fmt: skip
    answers = recoverer.recover(asked)
    assert all(answer.startswith("Turn") for answer in answers) and seen == [(2, (2,))] * 3
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 3
    assert recoverer.recover(asked) == answers and len(seen) == 3  # found in the log, not asked again


def test_blank_answers_are_not_chosen_from(tiny, asked, monkeypatch):
    said = [["", "Make it rhyme", "  "], ["", "", ""], ["Turn it", "**", "Use verse"]]
    batch = lambda *_: (said, np.array([[-0.1, -9.0, -0.1]] * 3))  # noqa: E731
    monkeypatch.setattr("promptrec.prompting.answer_in_ways", batch)
    recoverer = SeveralAnswers(*tiny, "several", ways=[Way()] * 3, choose=most_likely)
    assert sorted(recoverer.recover(asked)) == sorted(["Make it rhyme", FALLBACK, "Turn it"])


def test_a_time_limit_leaves_the_fallback(tiny, asked):
    limited = SeveralAnswers(*tiny, "late", settings=GenerationSettings(2), stop_after=-1.0)
    assert limited.recover(asked) == [FALLBACK] * 3


# --- shots


def test_each_row_is_asked_with_its_own_shots(tiny, asked):
    own = lambda table: [[("o", "r", f"shot of {row}")] for row in range(len(table))]  # noqa: E731
    requests = LanguageModelRecoverer(*tiny, "few-shot", shots=own)._requests(asked)
    assert [f"shot of {row}" in request for row, request in enumerate(requests)] == [True] * 3
    assert "shot of 0" not in requests[1]


def test_unfit_shots_are_refused_in_one_line(task, train):
    with pytest.raises(InputError, match="shots 'best': choose random, similar or diverse"):
        build_prompted(task(), "best")
    with pytest.raises(InputError, match="1 distinct training prompts for 2 shots"):
        build_prompted(task(train=train.head(1)), "diverse")


# --- as methods


@pytest.mark.parametrize("name", BUILDERS)
def test_every_way_of_asking_answers_every_row_and_repeats_itself(task, asked, name):
    recoverer = BUILDERS[name](task())
    answers = recoverer.recover(asked)
    assert recoverer.name == name and len(answers) == 3 and all(answer.strip() for answer in answers)
    assert BUILDERS[name](task()).recover(asked) == answers
    with pytest.raises(InputError, match="rewritten_text is blank"):
        recoverer.recover(asked.assign(rewritten_text=" "))


@pytest.mark.parametrize("name", ["sampled", "few-shot"])
def test_another_seed_samples_and_draws_otherwise(task, asked, name):
    answers = [BUILDERS[name](task(seed=seed)).recover(asked) for seed in (0, 1, 2)]
    assert answers[0] != answers[1] or answers[0] != answers[2]


def test_prefixes_and_verbs_open_the_answers(task, asked):
    for name, openings in {
        "prefix-modify": ("Modify this text by",),
        "opening-verbs": ("Rewrite", "Turn", "Make"),
    }.items():
        assert all(answer.startswith(openings) for answer in BUILDERS[name](task()).recover(asked))


@pytest.mark.parametrize("build", [build_prompted, build_opening_verbs, build_sampled])
def test_a_fine_tuned_model_is_asked_in_the_same_ways(task, asked, build):
    adapted, plain = build(task(), adapted=True), build(task())
    assert adapted.name == ("fine-tuned" if build is build_prompted else f"fine-tuned-{plain.name}")
    assert adapted.recover(asked) != plain.recover(asked)
    adapted.adapter = None  # with the adapter off, it is the base
    assert adapted.recover(asked) == plain.recover(asked)


def test_without_an_adapter_the_fine_tuned_ways_say_so(task, tmp_path):
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        build_opened(task(adapter=tmp_path / "none"), "Improve this text by", adapted=True)


def test_large_profiles_read_more_and_all_settings_can_be_changed(monkeypatch):
    local, large = settings_for(get_profile("local")), settings_for(get_profile("gpu"))
    assert large.text_words > local.text_words and large.samples > local.samples
    monkeypatch.setenv("PROMPTREC_SETTINGS", '{"PromptingSettings.shots": 5}')
    assert settings_for(get_profile("local"), seed=4).shots == 5
