"""Token search: exact values, budgets and bans that hold, one string a seed, rows that do not see each other."""

import dataclasses

import numpy as np
import pytest

from promptrec.errors import InputError
from promptrec.prompt_bank import shipped_prompts
from promptrec.token_search import (
    METHODS,
    MiniLMEncoder,
    Objective,
    SearchSettings,
    T5Encoder,
    search,
    search_many,
)

WORDS = ("rewrite", "poem", "letter", "formal", "pirate", "story", "child", "tone", "summary", "humorous", "dialogue",
         "style", "garden", "engine", "bread", "sister", "market", "translate", "legal", "the", "a", "of", "into")  # fmt: skip
QUICK = SearchSettings(evaluations=60, candidates=8, places=4, vocabulary=WORDS)


@pytest.fixture(scope="module")
def encoder():
    return MiniLMEncoder()


@pytest.fixture(scope="module")
def fast_encoder():
    return MiniLMEncoder(dtype="bfloat16")


@pytest.fixture(scope="module")
def prompts():
    return shipped_prompts()["rewrite_prompt"].tolist()[::60]


@pytest.fixture(scope="module")
def objective(encoder, prompts):
    return Objective.mean(encoder.encode(prompts))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A tiny encoder in the format of sentence-transformers/sentence-t5-base, with random weights."""
    import sentencepiece
    import torch
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(shipped_prompts()["rewrite_prompt"].tolist()),
        model_prefix=str(folder / "spiece"), vocab_size=400, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = T5Config(vocab_size=416, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="relu")
    model = T5EncoderModel(config).eval()
    with torch.no_grad():  # fresh weights are so small that every text would look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.randn(24, 32)}, folder / "2_Dense/model.safetensors")
    return folder


def with_(settings, **changes) -> SearchSettings:
    return dataclasses.replace(settings, **changes)


# --- encoders


def test_the_encoder_agrees_with_the_scorer(encoder, minilm, prompts):
    assert encoder.encode(prompts) == pytest.approx(minilm.encode(prompts), abs=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_a_vector_does_not_depend_on_the_batch_it_came_in(fast_encoder, prompts, exact):
    together = fast_encoder.encode(prompts, exact)
    assert (together[:8] == np.concatenate([fast_encoder.encode([prompt], exact) for prompt in prompts[:8]])).all()


def test_each_distinct_string_is_encoded_and_counted_once(encoder):
    before = encoder.evaluations
    rows = encoder.encode(["a poem", "a song", "a poem"])
    assert encoder.evaluations - before == 2 and (rows[0] == rows[2]).all()


def test_the_t5_encoder_agrees_with_its_scorer_and_cuts_where_it_cuts(t5):
    from promptrec.scoring import HuggingFaceT5Scorer

    texts = ["Rewrite this as a sea shanty.", "x", "</s> the <pad>", "Make it formal. " * 40]
    encoder = T5Encoder(t5)
    assert encoder.encode(texts) == pytest.approx(HuggingFaceT5Scorer(t5).encode(texts), abs=1e-5)
    assert encoder.count_tokens("") == 1 and encoder.count_tokens(texts[-1]) > 128


def test_pieces_join_to_the_text_they_came_from(encoder, t5):
    text = "rewrite the shakespearean paragraph humorously"
    for each in (encoder, T5Encoder(t5)):
        assert each.join(each.tokens(text)) == text and len(each.tokens(text)) > 5


def test_the_gradient_is_that_of_the_objective(encoder, objective, monkeypatch):
    import torch

    ids = list(encoder.token_ids("turn the text to a poem"))
    (vector,), (gradient,) = encoder.gradient([ids], [objective])
    assert gradient.shape == (6, 384) and objective.value(vector[None]) > 0
    step = torch.from_numpy(gradient[3] / np.linalg.norm(gradient[3]) * 1e-2)  # where it matters most
    original, values = encoder._table, []
    for sign in (1, -1):
        table = original.clone()
        table[ids[3]] += sign * step
        monkeypatch.setattr(encoder, "_table", table)
        values.append(float(objective.value(encoder.gradient([ids], [objective])[0])[0]))
    assert (values[0] - values[1]) / 2 == pytest.approx(float(gradient[3] @ step.numpy()), rel=0.05, abs=1e-7)


def test_the_estimate_tells_good_insertions_from_bad_ones(encoder, objective):
    """So that gradient search cannot be good by luck: estimated and true gains of all whole words go together."""
    from scipy.stats import spearmanr

    from promptrec.search_encoders import PLACEHOLDER

    words = encoder.whole_words()[::100]
    first = list(encoder.token_ids("rewrite the text"))
    _, (gradient,) = encoder.gradient([[*first, PLACEHOLDER]], [objective])
    tokens = np.stack([encoder.embedding_matrix[list(encoder.token_ids(word))].mean(0) for word in words])
    true = objective.value(encoder.encode([f"rewrite the text {word}" for word in words]))
    assert spearmanr(tokens @ gradient[-1], true).statistic > 0.2


def test_gradients_of_several_rows_are_those_of_each_alone(encoder, objective, prompts):
    other = Objective(objective.targets[:2], np.ones(2))
    rows = [encoder.token_ids(text) for text in ("a poem", "a song", "write a formal letter")]
    vectors, gradients = encoder.gradient(rows, [objective, other, other])
    for row, each, vector, gradient in zip(rows, [objective, other, other], vectors, gradients, strict=True):
        (alone,), (slope,) = encoder.gradient([row], [each])
        assert (vector == alone).all() and (gradient == slope).all()


# --- the search


@pytest.mark.parametrize("level", ["word", "token"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_rises_exactly_within_its_budget(encoder, objective, method, level):
    settings = with_(QUICK, method=method, level=level, max_tokens=12, banned=("poem",))
    if level == "token":
        settings = with_(settings, vocabulary=())
    steps = []
    found = search(encoder, objective, "rewrite the text", settings, steps.append)
    assert found == dataclasses.replace(search(encoder, objective, "rewrite the text", settings), seconds=found.seconds,
                                        history=found.history)  # fmt: skip
    assert steps == found.history and steps[-1].text == found.text and steps[-1].value == found.value
    values = [step.value for step in steps]
    assert values == sorted(values) and len(set(values)) == len(values)
    assert values == pytest.approx(objective.value(encoder.encode([step.text for step in steps])).tolist(), abs=1e-6)
    assert [step.evaluations for step in steps] == sorted(step.evaluations for step in steps)
    assert steps[-1].evaluations <= found.evaluations <= settings.evaluations
    for step in steps:
        assert encoder.count_tokens(step.text) <= 12 and "poem" not in step.text.lower()


def test_the_budget_counts_what_the_encoder_encodes(encoder, objective):
    settings = with_(QUICK)
    before, passes = encoder.evaluations, encoder.gradients
    found = search(encoder, objective, "", settings)
    assert encoder.evaluations - before == found.evaluations == settings.evaluations
    assert encoder.gradients - passes == found.gradients > 0


def test_gradient_search_beats_random_edits_at_the_same_budget(encoder, objective):
    budget = SearchSettings(evaluations=250, candidates=16, places=4)
    better = [
        search(encoder, objective, "", with_(budget, seed=seed)).value
        - search(encoder, objective, "", with_(budget, seed=seed, method="random")).value
        for seed in range(2)
    ]
    assert min(better) > 0


def test_another_seed_gives_another_string(encoder, objective):
    assert len({search(encoder, objective, "", with_(QUICK, seed=seed, method="random")).text for seed in range(3)}) > 1


def test_a_single_target_is_found_again(encoder):
    target = Objective(encoder.encode(["pirate story"]), np.ones(1))
    found = search(encoder, target, "", with_(QUICK, evaluations=150))
    assert found.value > 0.95


def test_a_search_that_ranks_in_bfloat16_reports_exact_values(fast_encoder, objective):
    found = search(fast_encoder, objective, "rewrite the text", QUICK)
    exact = objective.value(fast_encoder.encode([step.text for step in found.history]))
    assert [step.value for step in found.history] == pytest.approx(exact.tolist(), abs=1e-6)
    assert found.evaluations <= QUICK.evaluations and (np.diff(exact) > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_do_not_see_each_other(encoder, fast_encoder, prompts, dtype):
    encoder = encoder if dtype == "float32" else fast_encoder
    settings = with_(QUICK, evaluations=30, places=3)
    vectors = encoder.encode(prompts)
    objectives = [Objective(vectors[at : at + 5], np.arange(5, 0, -1)) for at in range(4)]
    starts = ["", "rewrite the text", "a poem for a child", "translate it"]
    together = search_many(encoder, objectives, starts, settings)
    alone = [search(encoder, *each, settings) for each in zip(objectives[:2], starts[:2], strict=True)]
    backwards = search_many(encoder, objectives[::-1], starts[::-1], settings)[::-1]
    assert [(found.text, found.value) for found in together[:2]] == [(found.text, found.value) for found in alone]
    assert [(found.text, found.value) for found in together] == [(found.text, found.value) for found in backwards]


def test_rows_share_their_encodings(encoder, objective):
    settings = with_(QUICK)
    before = encoder.evaluations
    found = search_many(encoder, [objective] * 3, ["a poem"] * 3, settings)
    assert encoder.evaluations - before == found[0].evaluations and len({each.text for each in found}) == 1


def test_no_rows_give_no_results(encoder):
    assert search_many(encoder, [], [], QUICK) == []


@pytest.mark.parametrize("level", ["word", "token"])
@pytest.mark.parametrize("ban", ["Pirate", "a pirate", "##ate"])
def test_a_ban_holds_even_for_the_word_that_would_win(encoder, level, ban):
    target = Objective(encoder.encode(["a pirate story"]), np.ones(1))
    settings = with_(QUICK, level=level, vocabulary=("a", "pirate", "PIRATE", "pirate.", "story", "##ate", "corp"))
    assert "pirate" in search(encoder, target, "", settings).text.lower()
    found = search(encoder, target, "", with_(settings, banned=(ban,)))
    held = [piece.lower() for piece in encoder.tokens(found.text)]
    assert ban.lower() not in " ".join(held) and ban.lower() not in found.text.lower()


def test_words_keep_their_case_and_punctuation(encoder, objective):
    found = search(encoder, objective, "Rewrite THIS, please!", with_(QUICK, evaluations=1))
    assert found.text == "Rewrite THIS, please!" and len(found.history) == 1


def test_search_works_for_sentence_t5(t5):
    encoder = T5Encoder(t5)
    objective = Objective.mean(encoder.encode(["Rewrite it as a poem.", "Make the text formal."]))
    for level in ("word", "token"):
        found = search(encoder, objective, "Rewrite it.", SearchSettings(level=level, evaluations=200, max_tokens=20))
        assert found.value > found.history[0].value and encoder.count_tokens(found.text) <= 20
        assert found.value == pytest.approx(float(objective.value(encoder.encode([found.text]))[0]), abs=1e-6)


# --- bad input, in one line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method 'magic' is unknown; choose one of gradient, surrogate, greedy"),
        ({"level": "letter"}, "level 'letter' is unknown"),
        ({"max_tokens": 129}, "max_tokens must be 3 to 128"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"seconds": -1}, "seconds must be 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        SearchSettings(**changes)


@pytest.mark.parametrize(
    ("start", "changes", "message"),
    [
        ("story " * 10, {"max_tokens": 8}, "the start has 12 tokens, over max_tokens 8"),
        ("a Poem", {"banned": ("poem",)}, "the start holds something banned"),
        ("", {"vocabulary": ("poem", "Poem"), "banned": ("poem",)}, "no word of the vocabulary is left"),
        ("", {"vocabulary": ("humorously-unhyphenated-vocabularies",), "max_tokens": 5}, "no string could be tried"),
    ],
)
def test_a_search_that_cannot_start_says_why(encoder, objective, start, changes, message):
    with pytest.raises(InputError, match=message):
        search(encoder, objective, start, with_(QUICK, **changes))


def test_a_time_limit_ends_a_search_with_what_it_has(encoder, objective):
    found = search(encoder, objective, "rewrite the text", with_(QUICK, evaluations=10**6, seconds=1e-3))
    assert found.text == "rewrite the text" and found.evaluations == 1


def test_rows_and_starts_must_match(encoder, objective):
    with pytest.raises(InputError, match="1 objectives for 2 starts"):
        search_many(encoder, [objective], ["a", "b"], QUICK)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="dtype 'int8' is unknown"):
        MiniLMEncoder(dtype="int8")
