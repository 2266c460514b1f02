"""Features of pairs: embeddings are kept and right, words that came are found, and a fit comes back as it was saved."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from promptrec.cache import cache_folder, digest, read_arrays, save_arrays
from promptrec.data import shipped_triples
from promptrec.scoring import unit
from promptrec.text_features import (
    LAST,
    MARKS,
    POOLS,
    SHOWN_WORDS,
    WIDTH,
    PairFeatures,
    TextEncoder,
    came_words,
    frequent_words,
    style_counts,
    words,
)

TEXTS = [
    "The ferry leaves at six.",
    "Bread, a letter and a garden.",
    "O winter! Thou comest " + "again and again " * 20,
    "Line one\nLine two\n- a point\n- another",
    "x",
]


@pytest.fixture
def new_encoder(text_encoder, monkeypatch, tmp_path):
    """function() -> an encoder that knows nothing but what is on disk; the weights are shared."""
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "cache"))
    text_encoder._loaded()

    def make(model: bool = True) -> TextEncoder:
        encoder = TextEncoder()
        if model:
            encoder._model, encoder._tokenizer = text_encoder._model, text_encoder._tokenizer
        else:
            monkeypatch.setattr(encoder, "_encode", lambda *_: pytest.fail("embedded again"))
        return encoder

    return make


@pytest.fixture(scope="module")
def triples() -> pd.DataFrame:
    return shipped_triples(["train"]).iloc[::60].head(16).reset_index(drop=True)


# --- the encoder


def test_a_text_has_one_vector_however_often_it_is_asked_for(new_encoder):
    encoder = new_encoder()
    vectors = encoder.encode([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert vectors.shape == (3, len(POOLS), WIDTH) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert np.array_equal(vectors[0], vectors[2]) and not np.allclose(vectors[0], vectors[1], atol=0.01)
    assert np.array_equal(encoder.encode([TEXTS[1]])[0], vectors[1])


def test_vectors_are_read_from_disk_by_content(new_encoder):
    first = new_encoder()
    vectors = np.concatenate([first.encode(TEXTS[:2]), first.encode(TEXTS[1:])])  # two shards
    shards = sorted(first.cache.glob("*"))
    assert first.cache.is_relative_to(cache_folder()) and len(shards) == 2
    again = new_encoder(model=False).encode([*TEXTS[:2], *TEXTS[1:]])
    assert np.array_equal(again, vectors)
    assert sorted(first.cache.glob("*")) == shards  # nothing written, no half file left


def test_the_cache_holds_plain_arrays_and_no_text(new_encoder):
    encoder = new_encoder()
    encoder.encode(TEXTS)
    (shard,) = encoder.cache.glob("*.npz")
    with np.load(shard, allow_pickle=False) as saved:
        kinds = {name: saved[name].dtype.kind for name in saved}
        assert saved["keys"].tolist() == [digest(text) for text in TEXTS]
    assert kinds == {"keys": "U", "vectors": "f"}
    assert b"ferry" not in shard.read_bytes()


def test_a_cache_that_cannot_be_written_is_done_without(new_encoder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PROMPTREC_CACHE", str(tmp_path / "file"))
    assert np.isfinite(new_encoder().encode(TEXTS[:1])).all()

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    monkeypatch.setattr("pathlib.Path.unlink", refuse)  # a read-only disk refuses to delete what is not there, too
    save_arrays(tmp_path / "other" / "a.npz", a=np.ones(1))
    assert not (tmp_path / "other").exists()


def test_a_damaged_shard_is_embedded_anew_and_mended(new_encoder):
    encoder = new_encoder()
    vectors = encoder.encode(TEXTS)
    (shard,) = encoder.cache.glob("*.npz")
    shard.write_bytes(shard.read_bytes()[:500])
    assert read_arrays(shard) == {} == read_arrays(shard.with_name("none.npz"))
    assert np.array_equal(new_encoder().encode(TEXTS), vectors)
    assert np.array_equal(new_encoder(model=False).encode(TEXTS), vectors)


def test_the_last_pool_is_minilm_own_embedding(text_encoder, minilm):
    texts = [*TEXTS, "word " * 400]  # cut where the scorer cuts
    cosines = (unit(text_encoder.encode(texts)[:, LAST]) * minilm.encode(texts)).sum(1)
    assert cosines == pytest.approx(np.ones(len(texts)), abs=1e-3)


def test_a_vector_hardly_depends_on_what_it_is_batched_with(text_encoder):
    together = text_encoder._encode(TEXTS, "").astype(np.float32)
    turned = text_encoder._encode([*TEXTS[::-1], "far longer " * 200], "").astype(np.float32)[: len(TEXTS)][::-1]
    apart = np.linalg.norm(together - turned, axis=-1) / np.linalg.norm(together, axis=-1)
    assert apart.max() < 2e-2


# --- words and style


def test_words_that_came_are_new_long_enough_and_in_their_order():
    (came,) = came_words(["The old ferry"], ["Ahoy, the FERRY of ye matey, ahoy!"], Counter(), 10)
    assert words("Don't, STOP 42") == ["don't", "stop"] and came == "ahoy matey"
    assert came_words(["Same words", ""], ["words same", "of"], Counter(), 10) == ["nothing", "nothing"]


def test_of_many_words_that_came_the_rarest_are_kept():
    new = [f"{first}{second}word" for first in "abcdefgh" for second in "abcdefgh"]
    common = new[::2]
    (came,) = came_words([""], [" ".join(new)], Counter(dict.fromkeys(common, 90)), 100)
    kept = came.split()
    assert len(kept) == SHOWN_WORDS and set(kept) >= set(new[1::2])
    assert kept == sorted(kept, key=new.index)


def test_style_counts_are_finite_rates_of_one_length():
    empty, plain, shown = map(style_counts, ("", "a plain line", "Title:\n- one!\n- **two**!\n3. three?"))
    assert len(empty) == len(plain) == len(shown) and np.isfinite([empty, plain, shown]).all()
    marks = dict(zip(MARKS, shown[10 : 10 + len(MARKS)], strict=True))  # they follow ten numbers on the layout
    assert marks["!"] == 2 * marks["?"] > 0 == marks["$"]
    assert shown[6:10] == [0.5, 0.25, 0.25, 1] and plain[6:10] == [0, 0, 0, 0]
    assert style_counts("and so on. " * 50)[-1] == pytest.approx(style_counts("and so on. " * 5)[-1])  # "and", a rate


# --- the features of a pair


def test_a_lead_in_changes_no_feature(text_encoder, triples):
    features = PairFeatures(text_encoder).fit(triples)
    leading = triples.assign(rewritten_text="Sure, here is the text you asked for:\n\n" + triples["rewritten_text"])
    for plain, led in zip(features(triples), features(leading), strict=True):
        assert np.array_equal(plain, led)
    state = PairFeatures(text_encoder).fit(leading).state
    assert all(np.array_equal(state[name], features.state[name]) for name in state)


def test_features_are_float32_tables_with_a_row_for_each_pair(text_encoder, triples):
    flat, directions = PairFeatures(text_encoder).fit(triples)(triples.head(5))
    assert flat.shape[0] == 5 and directions.shape == (5, 15, WIDTH)
    assert flat.dtype == directions.dtype == np.float32
    assert np.linalg.norm(directions, axis=-1) == pytest.approx(np.ones((5, 15)), abs=1e-4)


def test_a_fit_comes_back_exactly_from_what_was_saved(text_encoder, triples, tmp_path):
    fitted = PairFeatures(text_encoder).fit(triples.head(12))
    save_arrays(tmp_path / "state.npz", **fitted.state)
    loaded = PairFeatures(text_encoder, read_arrays(tmp_path / "state.npz"))
    for before, after in zip(fitted(triples), loaded(triples), strict=True):
        assert np.array_equal(before, after)


def test_fitting_gives_the_features_that_are_asked_for_later(text_encoder, triples):
    features = PairFeatures(text_encoder)
    fitted = features.fit_transform(triples)
    for at_once, later in zip(fitted, features(triples), strict=True):
        assert np.array_equal(at_once, later)


def test_fitting_again_forgets_the_first_fit(text_encoder, triples):
    twice = PairFeatures(text_encoder).fit(triples.head(4)).fit(triples.tail(6))
    once = PairFeatures(text_encoder).fit(triples.tail(6))
    assert twice.rarity == once.rarity
    assert np.array_equal(twice(triples)[0], once(triples)[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the variance of a single row
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tiny_training_sets_give_features_of_ordinary_size(text_encoder, triples, rows):
    flat, directions = PairFeatures(text_encoder).fit(triples.head(rows))(triples)
    assert np.isfinite(flat).all() and np.isfinite(directions).all()
    assert np.abs(flat).max() < 20  # nothing is blown up along directions that the few rows do not have


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pairs_that_say_the_same_are_no_trouble(text_encoder, triples):
    same = triples.head(4).assign(rewritten_text=triples["original_text"].head(4))
    flat, directions = PairFeatures(text_encoder).fit(same)(same)
    assert np.isfinite(flat).all() and (directions[:, 2] == 0).all()


def test_frequent_words_come_first_and_letters_do_not_count():
    assert frequent_words(["Make a poem", "make a song", "Make it rhyme a b"], 2) == ("make", "poem")
