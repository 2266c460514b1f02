"""Every figure of the notebooks: data in, a labelled matplotlib Figure out, with an alt text made from its data.

What is drawn where is decided here; how it looks and speaks is plot_style.py's, what is computed (scores, intervals,
clusters) the caller's.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from promptrec.errors import InputError
from promptrec.plot_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    VERMILLION,
    alt_text,
    canvas,
    colour_of,
    dash_of,
    label_axes,
    styled,
)
from promptrec.tables import require_columns

SCS_LABEL = "SCS = cos³ (0 to 1, higher is better)"


@styled
def length_histogram(table: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """Words per text, one outline for each of the text `columns`, on shared bins."""
    _need(table, columns, "length_histogram")
    words = {column: table[column].fillna("").astype(str).str.split().str.len() for column in columns}
    figure, axes = canvas()
    bins = np.histogram_bin_edges(np.concatenate(list(words.values())), bins=30)
    for index, (column, counts) in enumerate(words.items()):
        outline = {"color": colour_of(index), "linestyle": dash_of(index), "linewidth": 1.8}
        axes.hist(counts, bins, histtype="stepfilled", alpha=0.15, color=colour_of(index))
        axes.hist(counts, bins, histtype="step", label=f"{column} (median {counts.median():.0f})", **outline)
    label_axes(axes, "length (words)", "texts")
    axes.legend()
    medians = ", ".join(f"{column} {counts.median():.0f}" for column, counts in words.items())
    return alt_text(figure, f"Histogram of text lengths, {len(table)} rows. Median words: {medians}.")


@styled
def prompts_in_space(embeddings: np.ndarray, labels: Sequence, texts: Sequence[str] | None = None) -> Figure:
    """Embeddings [n, d] on their first two principal components, coloured by label (a split, a taxonomy).

    Labels beyond the six most frequent are drawn as "other". With `texts`, the prompt nearest to the
    centre of each label is ringed and quoted in the legend.
    """
    points, shares = _principal_plane(np.asarray(embeddings, dtype=float))
    if len(labels) != len(points) or (texts is not None and len(texts) != len(points)):
        raise InputError(f"prompts_in_space: {len(points)} embeddings need as many labels and texts")
    groups, names = _most_frequent(labels, keep=6)
    figure, axes = canvas(height=4.4)
    for index, name in enumerate(names):
        rows = np.flatnonzero(groups == name)
        label = f"{name} ({len(rows)})"
        if texts is not None:
            central = _most_central(points, rows)
            label += "\n" + textwrap.shorten(str(list(texts)[central]), 34, placeholder="…")
            axes.scatter(*points[central], s=80, facecolors="none", edgecolors=BLACK, zorder=3)
        style = {"marker": MARKERS[index], "color": colour_of(index), "label": label}
        axes.scatter(*points[rows].T, s=22, alpha=0.75, rasterized=len(points) > 2000, **style)  # or the SVG grows huge
    label_axes(axes, *(f"component {i} ({share:.0%} of variance)" for i, share in enumerate(shares, 1)))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    text = f"Scatter plot of {len(points)} prompt embeddings on two principal components, coloured by label:"
    return alt_text(figure, f"{text} {', '.join(names)}.")


@styled
def cluster_sizes(clusters: Sequence) -> Figure:
    """Prompts per cluster, largest cluster first, with the mean size (a usual cap) as a line."""
    sizes = pd.Series(list(clusters)).value_counts().to_numpy()
    if not len(sizes):
        raise InputError("cluster_sizes: no clusters given")
    figure, axes = canvas()
    axes.bar(np.arange(1, len(sizes) + 1), sizes, width=0.9 if len(sizes) < 80 else 1.0, color=BLUE)
    axes.axhline(sizes.mean(), color=VERMILLION, linestyle="--", label=f"mean size {sizes.mean():.1f}")
    label_axes(axes, "cluster, by size (rank)", "prompts")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    text = f"largest {sizes[0]}, smallest {sizes[-1]}, mean {sizes.mean():.1f} prompts"
    return alt_text(figure, f"Bar chart of the sizes of {len(sizes)} prompt clusters: {text}.")


@styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Loss above, held-out SCS below, over optimiser steps; panels for what was logged.

    Columns: step, loss; optional eval_loss, scs, learning_rate (each with gaps, as a trainer logs them).
    The best held-out SCS is ringed.
    """
    _need(history, ["step", "loss"], "training_curves")
    drawers = {"loss": _draw_loss, "scs": _draw_scs, "learning_rate": _draw_rate}
    panels = [column for column in drawers if _logged(history, column)]
    figure, axes = canvas(len(panels), height=1.2 + 1.8 * len(panels))
    for panel, column in zip(np.atleast_1d(axes), panels, strict=True):
        drawers[column](panel, history)
    np.atleast_1d(axes)[-1].set_xlabel("optimiser step")
    ends = " to ".join(f"{loss:.2f}" for loss in history["loss"].dropna().iloc[[0, -1]])
    best = f"; best held-out SCS {history['scs'].max():.3f}" if "scs" in panels else ""
    return alt_text(figure, f"Training curves over {history['step'].max()} steps: loss from {ends}{best}.")


@styled
def score_distributions(scores: pd.DataFrame) -> Figure:
    """SCS of every row: a box and the rows themselves for each method, best mean on top.

    Columns: method, scs.
    """
    _need(scores, ["method", "scs"], "score_distributions")
    groups = {name: group["scs"].to_numpy() for name, group in scores.groupby("method")}
    groups = dict(sorted(groups.items(), key=lambda item: item[1].mean()))
    figure, axes = canvas(height=1.3 + 0.55 * len(groups))
    box = {"medianprops": {"color": BLACK, "linewidth": 1.6}, "boxprops": {"color": GREY}}
    axes.boxplot(list(groups.values()), orientation="horizontal", widths=0.5, showfliers=False, **box)
    jitter = np.random.default_rng(0)
    for place, values in enumerate(groups.values(), start=1):
        heights = place + jitter.uniform(-0.18, 0.18, len(values))
        axes.scatter(values, heights, s=9, color=BLUE, alpha=0.35, linewidths=0)
        axes.plot(values.mean(), place, "D", color=VERMILLION, label="mean" if place == 1 else None)
    axes.set_yticks(range(1, len(groups) + 1), groups)
    label_axes(axes, SCS_LABEL, "method")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
    means = ", ".join(f"{name} {values.mean():.3f}" for name, values in reversed(groups.items()))
    return alt_text(figure, f"Box plots of SCS by row for {len(groups)} methods. Means: {means}.")


@styled
def method_intervals(table: pd.DataFrame) -> Figure:
    """Mean SCS with its interval for each method, best on top. Columns: method, mean, low, high."""
    _need(table, ["method", "mean", "low", "high"], "method_intervals")
    table = table.sort_values("mean")
    figure, axes = canvas(height=1.1 + 0.38 * len(table))
    _draw_intervals(axes, table, [BLUE] * len(table), [BLUE] * len(table))
    label_axes(axes, "mean SCS, with interval (0 to 1)", "method")
    return alt_text(figure, f"Mean SCS with intervals, best first: {_spoken(table)}.")


@styled
def paired_differences(table: pd.DataFrame) -> Figure:
    """Mean row-by-row difference in SCS to a baseline, with intervals. Columns: method, mean, low, high.

    Filled dots: the interval lies on one side of zero. Hollow grey dots: it does not.
    """
    _need(table, ["method", "mean", "low", "high"], "paired_differences")
    table = table.sort_values("mean")
    colours = np.select([table["low"] > 0, table["high"] < 0], [BLUE, VERMILLION], default=GREY)
    fills = np.where(colours == GREY, "white", colours)
    figure, axes = canvas(height=1.1 + 0.38 * len(table))
    axes.axvline(0, color=BLACK, linewidth=1)
    _draw_intervals(axes, table, colours, fills, pattern="+.3f")
    label_axes(axes, "difference in SCS to the baseline on the same rows, with interval", "method")
    return alt_text(figure, f"SCS minus the baseline's, best first: {_spoken(table, '+.3f')}.")


@styled
def scores_by_cluster(frame: pd.DataFrame) -> Figure:
    """Mean SCS in each prompt cluster, a marker for each method, hardest cluster left.

    Columns: prompt_cluster, method, scs. Up to 30 clusters are named on the axis, more are ranked.
    """
    _need(frame, ["prompt_cluster", "method", "scs"], "scores_by_cluster")
    means = frame.pivot_table(index="prompt_cluster", columns="method", values="scs", aggfunc="mean")
    means = means.loc[means.mean(axis=1).sort_values(kind="stable").index]
    figure, axes = canvas(height=3.8)
    rank = np.arange(1, len(means) + 1)
    for index, method in enumerate(means.columns):
        style = {"marker": MARKERS[index % len(MARKERS)], "color": colour_of(index), "label": method}
        axes.plot(rank, means[method], linestyle="none", markersize=5, alpha=0.85, **style)
    if len(means) <= 30:
        names = [textwrap.shorten(str(name), 22, placeholder="…") for name in means.index]
        axes.set_xticks(rank, names, rotation=90 if max(map(len, names)) > 3 else 0)
    label_axes(axes, "prompt cluster, by mean SCS (hardest first)", "mean SCS (0 to 1)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="method")
    ends = f"{means.iloc[0].mean():.2f} in the hardest to {means.iloc[-1].mean():.2f} in the easiest"
    return alt_text(figure, f"Mean SCS of {means.shape[1]} methods in {len(means)} prompt clusters: {ends}.")


@styled
def cos_cubed(points: dict[str, float]) -> Figure:
    """The score as a function of the cosine, with named cosines marked on it, {name: cosine in [-1, 1]}."""
    wrong = [name for name, cosine in points.items() if not abs(cosine) <= 1 + 1e-5]  # fp32: a text with itself
    if wrong:
        raise InputError(f"cos_cubed: not a cosine between -1 and 1: {', '.join(wrong)}")
    points = {name: min(1.0, max(-1.0, cosine)) for name, cosine in points.items()}
    figure, axes = canvas(height=4)
    x = np.linspace(min([0.0, *points.values()]), 1, 200)
    axes.plot(x, x, color=GREY, linestyle=":", label="cos")
    axes.plot(x, x**3, color=BLUE, label="cos³ = SCS")
    points = dict(sorted(points.items(), key=lambda item: item[1]))
    heights = _spread([cosine**3 for cosine in points.values()], gap=0.075)
    for (name, cosine), height in zip(points.items(), heights, strict=True):
        axes.plot(cosine, cosine**3, "o", color=VERMILLION, markersize=7, zorder=3)
        _point_at(axes, f"{name}: {cosine:.2f} → {cosine**3:.2f}", (cosine, cosine**3), height)
    label_axes(axes, "cosine of the two embeddings", "score")
    axes.legend(loc="upper left")
    spoken = "; ".join(f"{name}: cosine {cos:.2f} gives {cos**3:.2f}" for name, cos in points.items())
    return alt_text(figure, f"Curve of the score, the cube of the cosine. {spoken}.")


# ---- plumbing: no figure below


def _draw_loss(axes: Axes, history: pd.DataFrame) -> None:
    lines = {"loss": ("-", BLUE, "training"), "eval_loss": ("--o", VERMILLION, "held out")}
    for column, (line, colour, label) in lines.items():
        if _logged(history, column):
            rows = history.dropna(subset=[column])
            axes.plot(rows["step"], rows[column], line, color=colour, label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.legend()


def _draw_scs(axes: Axes, history: pd.DataFrame) -> None:
    rows = history.dropna(subset=["scs"])
    best = rows.loc[rows["scs"].idxmax()]
    label = f"best: {best['scs']:.3f} at step {best['step']:.0f}"
    axes.plot(rows["step"], rows["scs"], "-o", color=GREEN, label="held-out rows")
    axes.plot([best["step"]], [best["scs"]], "o", color=BLACK, markersize=12, fillstyle="none", label=label)
    axes.set_ylabel("mean SCS (0 to 1)")
    axes.legend()


def _draw_rate(axes: Axes, history: pd.DataFrame) -> None:
    rows = history.dropna(subset=["learning_rate"])
    axes.plot(rows["step"], rows["learning_rate"], color=GREY)
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_intervals(axes: Axes, table: pd.DataFrame, colours: Any, fills: Any, pattern: str = ".3f") -> None:
    """One dot and interval a row, upwards; the value is written above its dot."""
    places = np.arange(len(table))
    axes.hlines(places, table["low"], table["high"], colors=colours, linewidth=2.2)
    axes.scatter(table["mean"], places, s=42, color=fills, edgecolors=colours, linewidths=1.8, zorder=3)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "size": 8, "bbox": box}
    for place, mean in zip(places, table["mean"], strict=True):
        axes.annotate(format(mean, pattern), (mean, place), **above)
    axes.set_yticks(places, table["method"])
    axes.set_ylim(-0.6, len(table) - 0.3)


def _point_at(axes: Axes, text: str, point: tuple[float, float], height: float) -> None:
    """Write the text right of the axes, at this height, with a thin line to the point."""
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8}
    place = {"xytext": (1.03, height), "textcoords": ("axes fraction", "data"), "annotation_clip": False}
    axes.annotate(text, point, va="center", size=9, arrowprops=line, **place)


def _most_central(points: np.ndarray, rows: np.ndarray) -> int:
    """Which of these rows lies nearest to their common centre."""
    return rows[np.linalg.norm(points[rows] - points[rows].mean(axis=0), axis=1).argmin()]


def _principal_plane(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project [n, d] on two principal components: [n, 2] and the share of variance of each."""
    if embeddings.ndim != 2 or min(embeddings.shape) < 2:
        raise InputError(f"prompts_in_space: embeddings of shape {embeddings.shape}; needs [n >= 2, d >= 2]")
    centred = embeddings - embeddings.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * singular[:2], singular[:2] ** 2 / max((singular**2).sum(), 1e-12)


def _most_frequent(labels: Sequence, keep: int) -> tuple[np.ndarray, list[str]]:
    """Labels as strings with the rare ones merged into "other", and the names, most frequent first."""
    names = pd.Series([str(label) for label in labels])
    counts = names.value_counts()
    if len(counts) > keep:
        names = names.where(names.isin(counts.index[:keep]), "other")
    return names.to_numpy(), list(names.value_counts().index)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending label heights, moved apart to at least `gap` and kept below 1."""
    spread = []
    for height in reversed(heights):
        spread.append(min(height, spread[-1] - gap if spread else 1.0))
    return spread[::-1]


def _logged(history: pd.DataFrame, column: str) -> bool:
    return column in history and history[column].notna().any()


def _spoken(table: pd.DataFrame, pattern: str = ".3f") -> str:
    """Rows of method, mean, low, high (ascending) as text, best first."""
    rows = table[["method", "mean", "low", "high"]].iloc[::-1].itertuples(index=False)
    numbers = f"{{:{pattern}}} ({{:{pattern}}} to {{:{pattern}}})"
    return "; ".join(f"{name} {numbers.format(*values)}" for name, *values in rows)


def _need(table: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Refuse a table without these columns, or without rows."""
    require_columns(table, columns, where)
    if table.empty:
        raise InputError(f"{where}: the table has no rows")
