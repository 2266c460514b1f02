"""Every figure of the notebooks: data in, a labelled matplotlib Figure out.

The figures are made without pyplot, so nothing is shown twice, nothing has to be closed and no backend
is chosen: end a cell with the call and Jupyter displays the result. Colours are Okabe and Ito's, and
marker or line style repeats what colour says. What is drawn where is decided here; what is computed
(scores, intervals, clusters) is not.

Alt text: each figure carries one, made from its data; `alt_text(figure, "...")` replaces it. It reaches
the notebook as output metadata (`image/png` -> `alt`), which nbconvert turns into the image's alt
attribute. MyST-NB reads cell metadata instead (`mystnb` -> `image` -> `alt`): `alt_into_cells` copies it
there after execution, before the book is built. By hand, in a percent source, the same is
`# %% mystnb={"image": {"alt": "..."}}`.
"""

from __future__ import annotations

import base64
import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from promptrec.errors import InputError

# Okabe and Ito (2008), ordered for contrast on white; yellow is left out, it is too pale for lines.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK = PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#222222",
)
GREY = "#767676"  # 4.5:1 on white
MARKERS = "osD^vP*"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.dpi": 110,
}
SCS_LABEL = "SCS = cos³ (0 to 1, higher is better)"


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a drawing function under STYLE, whatever style the notebook has set."""

    @functools.wraps(draw)
    def under_style(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return under_style


def alt_text(figure: Figure, text: str) -> Figure:
    """Give the figure an alt text, kept in `figure._alt` and sent along wherever Jupyter shows the figure."""
    figure._alt = " ".join(text.split())
    figure._repr_mimebundle_ = functools.partial(_mimebundle, figure)
    return figure


def alt_into_cells(notebook: Any) -> int:
    """Copy alt texts from outputs into the cell metadata MyST-NB reads; return how many cells got one.

    `notebook` is an executed nbformat notebook (or the same as plain dicts), changed in place. A cell that
    has an alt text of its own keeps it; one with several images gets their texts joined, because MyST-NB
    knows one alt text a cell.
    """
    filled = 0
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", [])
        texts = [out.get("metadata", {}).get("image/png", {}).get("alt") for out in outputs]
        image = cell["metadata"].get("mystnb", {}).get("image", {})
        if any(texts) and "alt" not in image:
            cell["metadata"].setdefault("mystnb", {}).setdefault("image", {})["alt"] = " ".join(filter(None, texts))
            filled += 1
    return filled


@_styled
def length_histogram(table: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """Words per text, one outline for each of the text `columns`, on shared bins."""
    _need(table, columns, "length_histogram")
    words = {column: table[column].fillna("").astype(str).str.split().str.len() for column in columns}
    figure, axes = _canvas()
    bins = np.histogram_bin_edges(np.concatenate([counts.to_numpy() for counts in words.values()]), bins=30)
    for index, (column, counts) in enumerate(words.items()):
        label = f"{column} (median {counts.median():.0f})"
        axes.hist(counts, bins, histtype="stepfilled", alpha=0.15, color=_colour(index))
        axes.hist(
            counts,
            bins,
            histtype="step",
            linewidth=1.8,
            linestyle=_dash(index),
            color=_colour(index),
            label=label,
        )
    _label(axes, "length (words)", "texts")
    axes.legend()
    medians = ", ".join(f"{column} {counts.median():.0f}" for column, counts in words.items())
    return alt_text(figure, f"Histogram of text lengths, {len(table)} rows. Median words: {medians}.")


@_styled
def prompts_in_space(embeddings: np.ndarray, labels: Sequence, texts: Sequence[str] | None = None) -> Figure:
    """Embeddings [n, d] on their first two principal components, coloured by label (a split, a taxonomy).

    Labels beyond the six most frequent are drawn as "other". With `texts`, the prompt nearest to the
    centre of each label is written beside its point.
    """
    points, shares = _principal_plane(np.asarray(embeddings, dtype=float))
    if len(labels) != len(points) or (texts is not None and len(texts) != len(points)):
        raise InputError(f"prompts_in_space: {len(points)} embeddings need as many labels and texts")
    groups, names = _most_frequent(labels, keep=6)
    figure, axes = _canvas(height=4.6)
    for index, name in enumerate(names):
        chosen = points[groups == name]
        axes.scatter(
            *chosen.T,
            s=22,
            marker=MARKERS[index],
            color=_colour(index),
            alpha=0.75,
            linewidths=0,
            label=f"{name} ({len(chosen)})",
        )
        if texts is not None:
            _write_central(axes, points, np.flatnonzero(groups == name), texts, _colour(index))
    _label(axes, *(f"principal component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares)))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return alt_text(
        figure,
        f"Scatter plot of {len(points)} prompt embeddings in two principal components, "
        f"coloured by {len(names)} labels: {', '.join(map(str, names))}.",
    )


@_styled
def cluster_sizes(clusters: Sequence) -> Figure:
    """Prompts per cluster, largest cluster first, with the mean size (a usual cap) as a line."""
    sizes = pd.Series(list(clusters)).value_counts().to_numpy()
    if not len(sizes):
        raise InputError("cluster_sizes: no clusters given")
    figure, axes = _canvas()
    axes.bar(np.arange(1, len(sizes) + 1), sizes, width=0.9 if len(sizes) < 80 else 1.0, color=BLUE)
    axes.axhline(sizes.mean(), color=VERMILLION, linestyle="--", label=f"mean size {sizes.mean():.1f}")
    _label(axes, "cluster, by size (rank)", "prompts")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return alt_text(
        figure,
        f"Bar chart of {len(sizes)} prompt clusters, largest {sizes[0]}, smallest {sizes[-1]}, "
        f"mean {sizes.mean():.1f} prompts.",
    )


@_styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Loss above, held-out SCS below, over optimiser steps.

    Columns: step, loss; optional eval_loss, scs, learning_rate (each with gaps, as a trainer logs them).
    The best held-out SCS is ringed. A learning rate, where logged, gets a panel of its own.
    """
    _need(history, ["step", "loss"], "training_curves")
    panels = ["loss"] + [column for column in ("scs", "learning_rate") if _logged(history, column)]
    figure, axes = _canvas(len(panels), height=1.2 + 1.8 * len(panels), ratios=[3, 3, 1.5][: len(panels)])
    _draw_loss(axes[0], history)
    for panel, column in zip(axes[1:], panels[1:], strict=True):
        _draw_scs(panel, history) if column == "scs" else _draw_rate(panel, history)
    axes[-1].set_xlabel("optimiser step")
    first, last = history["loss"].dropna().iloc[[0, -1]]
    return alt_text(
        figure,
        f"Training curves over {history['step'].max()} steps; training loss goes from {first:.2f} to {last:.2f}.",
    )


@_styled
def score_distributions(scores: pd.DataFrame) -> Figure:
    """SCS of every row, a box and the rows themselves for each method, best mean on top. Columns: method, scs."""
    _need(scores, ["method", "scs"], "score_distributions")
    groups = {name: group["scs"].to_numpy() for name, group in scores.groupby("method")}
    order = sorted(groups, key=lambda name: groups[name].mean())
    figure, axes = _canvas(height=1.3 + 0.55 * len(order))
    axes.boxplot(
        [groups[name] for name in order],
        orientation="horizontal",
        widths=0.5,
        showfliers=False,
        medianprops={"color": BLACK, "linewidth": 1.6},
        boxprops={"color": GREY},
    )
    jitter = np.random.default_rng(0)
    for place, name in enumerate(order, start=1):
        values = groups[name]
        axes.scatter(values, place + jitter.uniform(-0.18, 0.18, len(values)), s=9, color=BLUE, alpha=0.4, linewidths=0)
        axes.plot(values.mean(), place, "D", color=VERMILLION, label="mean" if place == 1 else None)
    axes.set_yticks(range(1, len(order) + 1), order)
    _label(axes, SCS_LABEL, "method")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
    means = ", ".join(f"{name} {groups[name].mean():.3f}" for name in reversed(order))
    return alt_text(figure, f"Box plots of SCS by row for {len(order)} methods. Means: {means}.")


@_styled
def method_intervals(table: pd.DataFrame) -> Figure:
    """Mean SCS with its interval for each method, best on top. Columns: method, mean, low, high."""
    _need(table, ["method", "mean", "low", "high"], "method_intervals")
    table = table.sort_values("mean")
    figure, axes = _canvas(height=1.1 + 0.38 * len(table))
    _draw_intervals(axes, table, [BLUE] * len(table), [BLUE] * len(table))
    _label(axes, "mean SCS (interval)", "method")
    return alt_text(figure, f"Mean SCS with intervals, best first: {_spoken(table)}.")


@_styled
def paired_differences(table: pd.DataFrame) -> Figure:
    """Mean row-by-row difference in SCS to a baseline, with intervals. Columns: method, mean, low, high.

    Filled dots: the interval lies on one side of zero. Hollow grey dots: it does not.
    """
    _need(table, ["method", "mean", "low", "high"], "paired_differences")
    table = table.sort_values("mean")
    colours = np.select([table["low"] > 0, table["high"] < 0], [BLUE, VERMILLION], default=GREY)
    fills = np.where(colours == GREY, "white", colours)
    figure, axes = _canvas(height=1.1 + 0.38 * len(table))
    axes.axvline(0, color=BLACK, linewidth=1)
    _draw_intervals(axes, table, colours, fills)
    _label(axes, "difference in SCS to the baseline, same rows (interval)", "method")
    return alt_text(figure, f"Paired differences in SCS to the baseline, best first: {_spoken(table, '+.3f')}.")


@_styled
def scores_by_cluster(frame: pd.DataFrame) -> Figure:
    """Mean SCS in each prompt cluster, a marker for each method, hardest cluster left.

    Columns: prompt_cluster, method, scs. Up to 30 clusters are named on the axis, more are ranked.
    """
    _need(frame, ["prompt_cluster", "method", "scs"], "scores_by_cluster")
    means = frame.pivot_table(index="prompt_cluster", columns="method", values="scs", aggfunc="mean")
    means = means.loc[means.mean(axis=1).sort_values(kind="stable").index]
    figure, axes = _canvas(height=3.8)
    rank = np.arange(1, len(means) + 1)
    for index, method in enumerate(means.columns):
        axes.plot(
            rank,
            means[method],
            MARKERS[index % len(MARKERS)],
            color=_colour(index),
            markersize=5,
            alpha=0.85,
            label=method,
        )
    if len(means) <= 30:
        names = [textwrap.shorten(str(name), 22, placeholder="…") for name in means.index]
        axes.set_xticks(rank, names, rotation=90 if max(map(len, names)) > 3 else 0)
    _label(axes, "prompt cluster, by mean SCS (hardest first)", "mean SCS (0 to 1)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="method")
    return alt_text(
        figure,
        f"Mean SCS of {means.shape[1]} methods in {len(means)} prompt clusters; the hardest cluster "
        f"averages {means.iloc[0].mean():.2f}, the easiest {means.iloc[-1].mean():.2f}.",
    )


@_styled
def cos_cubed(points: dict[str, float]) -> Figure:
    """The score as a function of the cosine, with named cosines marked on it, {name: cosine in [-1, 1]}."""
    wrong = [name for name, cosine in points.items() if not -1 <= cosine <= 1]
    if wrong:
        raise InputError(f"cos_cubed: not a cosine between -1 and 1: {', '.join(wrong)}")
    figure, axes = _canvas(height=4)
    start = min([0.0, *points.values()])
    x = np.linspace(start, 1, 200)
    axes.plot(x, x, color=GREY, linestyle=":", label="cos")
    axes.plot(x, x**3, color=BLUE, label="cos³ = SCS")
    heights = _spread([cosine**3 for cosine in sorted(points.values())], gap=0.075)
    for index, (name, cosine) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        axes.plot(cosine, cosine**3, MARKERS[index % len(MARKERS)], color=VERMILLION, markersize=7, zorder=3)
        axes.annotate(
            f"{name}: {cosine:.2f} → {cosine**3:.2f}",
            (cosine, cosine**3),
            (1.05, heights[index]),
            textcoords=("axes fraction", "data"),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8},
        )
    _label(axes, "cosine of the two embeddings", "score")
    axes.legend(loc="upper left")
    spoken = "; ".join(f"{name}: cosine {cosine:.2f} gives {cosine**3:.2f}" for name, cosine in points.items())
    return alt_text(figure, f"Curve of the score, the cube of the cosine. {spoken}.")


# ---- plumbing: no figure below


def _draw_loss(axes: Axes, history: pd.DataFrame) -> None:
    for index, (column, label) in enumerate({"loss": "training", "eval_loss": "held out"}.items()):
        if _logged(history, column):
            rows = history.dropna(subset=[column])
            mark = "o" if column == "eval_loss" else None
            axes.plot(rows["step"], rows[column], _dash(index), marker=mark, color=_colour(index), label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.legend()


def _draw_scs(axes: Axes, history: pd.DataFrame) -> None:
    rows = history.dropna(subset=["scs"])
    best = rows.loc[rows["scs"].idxmax()]
    axes.plot(rows["step"], rows["scs"], "-o", color=GREEN, label="held-out rows")
    axes.plot(
        best["step"],
        best["scs"],
        "o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor=BLACK,
        linestyle="none",
        label=f"best: {best['scs']:.3f} at step {best['step']:.0f}",
    )
    axes.set_ylabel("mean SCS (0 to 1)")
    axes.legend()


def _draw_rate(axes: Axes, history: pd.DataFrame) -> None:
    rows = history.dropna(subset=["learning_rate"])
    axes.plot(rows["step"], rows["learning_rate"], color=GREY)
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_intervals(axes: Axes, table: pd.DataFrame, colours: Iterable[str], fills: Iterable[str]) -> None:
    """One dot and interval a row, upwards; the value is written above its dot."""
    places = np.arange(len(table))
    axes.hlines(places, table["low"], table["high"], colors=colours, linewidth=2.2)
    axes.scatter(table["mean"], places, s=42, color=fills, edgecolors=colours, linewidths=1.8, zorder=3)
    signed = "+.3f" if (table["low"] < 0).any() else ".3f"
    for place, mean in zip(places, table["mean"], strict=True):
        axes.annotate(format(mean, signed), (mean, place), (0, 5), textcoords="offset points", ha="center", size=8)
    axes.set_yticks(places, table["method"])
    axes.set_ylim(-0.6, len(table) - 0.3)


def _write_central(axes: Axes, points: np.ndarray, rows: np.ndarray, texts: Sequence[str], colour: str) -> None:
    """Write the text of the point nearest to the centre of `rows`."""
    row = rows[np.linalg.norm(points[rows] - points[rows].mean(axis=0), axis=1).argmin()]
    axes.annotate(
        textwrap.shorten(str(texts[row]), 38, placeholder="…"),
        points[row],
        (4, 4),
        size=8,
        color=colour,
        textcoords="offset points",
        zorder=4,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
    )


def _principal_plane(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project [n, d] on two principal components: [n, 2] and the share of variance of each."""
    if embeddings.ndim != 2 or min(embeddings.shape) < 2:
        raise InputError(f"prompts_in_space: embeddings of shape {embeddings.shape}; needs [n >= 2, d >= 2]")
    centred = embeddings - embeddings.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * singular[:2], singular[:2] ** 2 / max((singular**2).sum(), 1e-12)


def _most_frequent(labels: Sequence, keep: int) -> tuple[np.ndarray, list[str]]:
    """Labels as strings with the rare ones merged into "other", and the names in the order of frequency."""
    names = pd.Series([str(label) for label in labels])
    counts = names.value_counts()
    if len(counts) > keep + 1:
        names = names.where(names.isin(counts.index[:keep]), "other")
    return names.to_numpy(), list(names.value_counts().index)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move ascending label heights apart to at least `gap`, upwards, then down again below 1."""
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    overshoot = max(0.0, heights[-1] - 1) if heights else 0.0
    for index in range(len(heights) - 1, -1, -1):
        above = heights[index + 1] - gap if index + 1 < len(heights) else heights[index] - overshoot
        heights[index] = min(heights[index], above)
    return heights


def _canvas(rows: int = 1, height: float = 3.4, ratios: Sequence[float] | None = None) -> tuple[Figure, Any]:
    """An empty figure 7.2 inches wide with `rows` panels above one another, sharing their x axis."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots(rows, sharex=True, height_ratios=ratios)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _dash(index: int) -> str:
    return ("-", "--", "-.", ":")[index % 4]


def _logged(history: pd.DataFrame, column: str) -> bool:
    return column in history and history[column].notna().any()


def _spoken(table: pd.DataFrame, pattern: str = ".3f") -> str:
    """Rows of method, mean, low, high (ascending) as text, best first."""
    rows = table[["method", "mean", "low", "high"]].iloc[::-1].itertuples(index=False)
    return "; ".join(f"{row[0]} {row[1]:{pattern}} ({row[2]:{pattern}} to {row[3]:{pattern}})" for row in rows)


def _need(table: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Refuse a table without these columns, or without rows, in words that say what to do."""
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{where}: no column {', '.join(missing)}; the table has {', '.join(map(str, table))}")
    if not len(table):
        raise InputError(f"{where}: the table has no rows")


def _mimebundle(figure: Figure, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
    """What Jupyter asks a figure for: the PNG, and the alt text as its metadata."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=STYLE["figure.dpi"])
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"image/png": png, "text/plain": f"<Figure: {figure._alt}>"}, {"image/png": {"alt": figure._alt}}
