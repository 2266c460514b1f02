"""Figures: labelled axes, the data really in them, a plain refusal of tables that lack a column."""

import base64
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from promptrec import plots

METHODS = ["constant", "zero-shot", "fine-tuned"]
TABLE = pd.DataFrame({"original_text": ["a b c", "a b", "a"], "rewritten_text": ["x y", "x", None]})
INTERVALS = pd.DataFrame({"method": METHODS, "mean": [0.0, -0.1, 0.2], "low": [-0.1, -0.2, 0.1]})
INTERVALS["high"] = [0.1, -0.05, 0.3]
HISTORY = pd.DataFrame({"step": [0, 10, 20], "loss": [3.0, np.nan, 1.0], "eval_loss": [np.nan, 2.0, 1.5]})
HISTORY = HISTORY.assign(scs=[0.5, 0.62, 0.6], learning_rate=[2e-4, 1e-4, 0.0])
SCORES = pd.DataFrame({"prompt_cluster": [7, 7, 7, 3, 3, 3], "method": METHODS * 2})
SCORES["scs"] = [0.5, 0.6, 0.7, 0.1, 0.2, 0.3]
EMBEDDINGS = np.random.default_rng(0).normal(size=(12, 5))
SPLITS = ["train", "validation", "test"] * 4
COSINES = {"constant": 0.84, "mean prompt": 0.85, "exact": 1.0}
CALLS = {
    "length_histogram": (TABLE, ["original_text", "rewritten_text"]),
    "prompts_in_space": (EMBEDDINGS, SPLITS, [f"prompt {i}" for i in range(12)]),
    "cluster_sizes": ([1, 1, 1, 2, 2, 3],),
    "training_curves": (HISTORY,),
    "score_distributions": (SCORES,),
    "method_intervals": (INTERVALS,),
    "paired_differences": (INTERVALS,),
    "scores_by_cluster": (SCORES,),
    "cos_cubed": (COSINES,),
}
TABLES = [name for name, arguments in CALLS.items() if isinstance(arguments[0], pd.DataFrame)]


def draw(name):
    return getattr(plots, name)(*CALLS[name])


def line(axes, label):
    return next(found for found in axes.lines if found.get_label() == label)


@pytest.mark.parametrize("name", CALLS)
def test_axes_are_labelled_and_the_figure_renders_with_its_alt_text(name):
    figure = draw(name)
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[-1].get_xlabel()
    data, metadata = figure._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"] == figure._alt
    assert len(figure._alt.split()) > 5


@pytest.mark.parametrize("name", CALLS)
def test_no_two_texts_overlap(name):
    figure = draw(name)
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)]
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        texts += [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert not any(a.padded(-1).overlaps(b.padded(-1)) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_is_named(name):
    table, *rest = CALLS[name]
    column = rest[0][0] if rest else list(table)[-1] if name != "training_curves" else "loss"
    with pytest.raises(ValueError, match=f"{name}.*{column}"):
        getattr(plots, name)(table.drop(columns=column), *rest)
    with pytest.raises(ValueError, match="no rows"):
        getattr(plots, name)(table.iloc[:0], *rest)


def test_the_given_table_is_left_as_it_was():
    before = INTERVALS.copy()
    plots.method_intervals(INTERVALS)
    pd.testing.assert_frame_equal(INTERVALS, before)


def test_length_histogram_counts_every_row():
    axes = draw("length_histogram").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "original_text (median 2)",
        "rewritten_text (median 1)",
    ]


def test_prompts_in_space_draws_each_point_once_and_merges_rare_labels():
    axes = plots.prompts_in_space(EMBEDDINGS, SPLITS).axes[0]
    assert sum(len(group.get_offsets()) for group in axes.collections) == 12
    axes = plots.prompts_in_space(EMBEDDINGS, list("aabbccddefgh")).axes[0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(names) == 7
    assert "other (2)" in names


def test_prompts_in_space_shows_the_direction_of_greatest_variance():
    stretched = np.zeros((4, 3))
    stretched[:, 1] = [0, 10, 20, 30]
    axes = plots.prompts_in_space(stretched, ["train"] * 4).axes[0]
    assert axes.get_xlabel() == "component 1 (100% of variance)"
    assert np.ptp(axes.collections[0].get_offsets()[:, 0]) == pytest.approx(30)


def test_prompts_in_space_refuses_unequal_lengths_and_flat_input():
    with pytest.raises(ValueError, match="12 embeddings"):
        plots.prompts_in_space(EMBEDDINGS, SPLITS[:-1])
    with pytest.raises(ValueError, match="shape"):
        plots.prompts_in_space(EMBEDDINGS[:, :1], SPLITS)


def test_cluster_sizes_are_sorted():
    axes = draw("cluster_sizes").axes[0]
    assert [bar.get_height() for bar in axes.patches] == [3, 2, 1]
    with pytest.raises(ValueError, match="no clusters"):
        plots.cluster_sizes([])


def test_training_curves_skip_gaps_and_ring_the_best_step():
    loss, scs, rate = draw("training_curves").axes
    assert list(line(loss, "training").get_xdata()) == [0, 20]
    assert list(line(loss, "held out").get_ydata()) == [2.0, 1.5]
    assert list(line(scs, "best: 0.620 at step 10").get_xdata()) == [10]
    assert list(rate.lines[0].get_ydata()) == [2e-4, 1e-4, 0.0]
    assert len(plots.training_curves(HISTORY[["step", "loss"]]).axes) == 1


def test_distributions_and_intervals_put_the_best_on_top():
    for name, best in (("score_distributions", "fine-tuned"), ("method_intervals", "fine-tuned")):
        assert draw(name).axes[0].get_yticklabels()[-1].get_text() == best
    points = draw("score_distributions").axes[0].collections
    assert sorted(x for group in points for x in group.get_offsets()[:, 0]) == sorted(SCORES["scs"])


def test_paired_differences_hollow_what_crosses_zero():
    axes = draw("paired_differences").axes[0]
    dots = axes.collections[-1]
    assert list(dots.get_offsets()[:, 0]) == [-0.1, 0.0, 0.2]
    assert [tuple(colour) == (1, 1, 1, 1) for colour in dots.get_facecolors()] == [False, True, False]


def test_scores_by_cluster_starts_with_the_hardest():
    axes = draw("scores_by_cluster").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "7"]
    assert line(axes, "fine-tuned").get_ydata() == pytest.approx([0.3, 0.7])


def test_cos_cubed_marks_the_cube_and_refuses_what_is_no_cosine():
    axes = draw("cos_cubed").axes[0]
    marked = [found.get_xydata().tolist() for found in axes.lines if len(found.get_xdata()) == 1]
    assert marked == [[[cosine, cosine**3]] for cosine in COSINES.values()]
    with pytest.raises(ValueError, match="too much"):
        plots.cos_cubed({"too much": 1.2})


def test_the_diagrams_are_what_their_script_draws(tmp_path):
    images = Path(__file__).parents[1] / "images"
    spec = importlib.util.spec_from_file_location("draw", images / "draw.py")
    draw_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_module)
    drawn = draw_module.draw_all(tmp_path)
    assert {path.stem for path in drawn} == set(draw_module.ALT)
    # matplotlib releases differ in digits; the committed files come from the pinned environment
    assert [path.name for path in drawn if not (images / path.name).is_file()] == []
    again = tmp_path / "again"
    again.mkdir()
    redrawn = draw_module.draw_all(again)
    assert [path.read_bytes() for path in redrawn] == [path.read_bytes() for path in drawn]
    low = draw_module.memory_parts()["QLoRA, NF4 base"]
    assert sum(low.values()) < 15 < sum(draw_module.memory_parts()["LoRA, fp16 base"].values())


def test_a_text_with_itself_may_be_rounded_above_one():
    figure = plots.cos_cubed({"itself": 1.0000001192092896, "opposite": -1.0000001})
    assert "itself: cosine 1.00 gives 1.00" in figure._alt
    with pytest.raises(ValueError, match="not a cosine"):
        plots.cos_cubed({"too far": 1.001})
