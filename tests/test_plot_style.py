"""How figures look and speak: the style stays in the figure, the alt text goes wherever the figure goes."""

import base64

import matplotlib
import pytest

from promptrec import plot_style
from promptrec.plot_style import PALETTE, colour_of, dash_of


@plot_style.styled
def rising():
    figure, axes = plot_style.canvas()
    axes.plot([0, 1], [0, 1], color=colour_of(0), linestyle=dash_of(0))
    plot_style.label_axes(axes, "step", "score")
    return plot_style.alt_text(figure, "A line that rises.")


def test_a_figure_is_drawn_in_the_style_and_shown_as_a_png():
    figure = rising()
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "score")
    assert not axes.spines["top"].get_visible()
    data, metadata = figure._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"] == "A line that rises."


@pytest.mark.parametrize("index", range(9))
def test_neighbouring_lines_differ_in_colour_and_dash(index):
    assert colour_of(index) in PALETTE
    assert colour_of(index) != colour_of(index + 1)
    assert dash_of(index) != dash_of(index + 1)


def test_style_does_not_leak_into_the_notebook():
    before = dict(matplotlib.rcParams)
    rising()._repr_mimebundle_()
    assert dict(matplotlib.rcParams) == before


def test_alt_text_replaces_the_default_and_reaches_the_cell_metadata():
    figure = plot_style.alt_text(rising(), "A curve\n  that rises.")
    data, metadata = figure._repr_mimebundle_()
    cell = {"cell_type": "code", "metadata": {}, "outputs": [{"data": data, "metadata": metadata}]}
    own = {"metadata": {"mystnb": {"image": {"alt": "mine"}}}, "outputs": cell["outputs"]}
    notebook = {"cells": [{"cell_type": "markdown", "metadata": {}}, cell, own]}
    assert plot_style.alt_into_cells(notebook) == 1
    assert cell["metadata"] == {"mystnb": {"image": {"alt": "A curve that rises."}}}
    assert own["metadata"]["mystnb"]["image"]["alt"] == "mine"
    assert plot_style.alt_into_cells(notebook) == 0
