"""Draws the diagrams of the book as SVG: `python images/draw.py` rewrites every file beside this one.

One function a diagram; sizes and counts in them are computed here from Gemma-7b's shapes. Coordinates are
points (1/72 inch) from the top left corner. Text becomes outlines, so a diagram looks the same everywhere,
and two runs write the same bytes. Nothing is saved while two texts overlap or leave the canvas. `ALT` holds
the alt text of each diagram, for pages that show it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from matplotlib.text import Text

# Okabe and Ito's colours; the pale ones are tints of them.
BLUE, ORANGE, GREEN, VERMILLION, INK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#222222", "#6B6B6B"
PALE_BLUE, PALE_ORANGE, PALE_GREEN, PALE_GREY = "#DCEBF5", "#FCEFD2", "#D8F0E7", "#EFEFEF"
DARK_GREEN = "#00694C"
SPLITS = {"train": ("o", BLUE), "validation": ("s", ORANGE), "test": ("D", VERMILLION)}
WIDTH = 760
STYLE = {
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",
    "svg.hashsalt": "promptrec",
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
}

# Gemma-7b, from its published configuration.
HIDDEN, LAYERS, HEADS, HEAD_SIZE, MLP, VOCABULARY = 3072, 28, 16, 256, 24576, 256_000
ATTENTION = HEADS * HEAD_SIZE
LINEAR = {
    "query": (HIDDEN, ATTENTION),
    "key": (HIDDEN, ATTENTION),
    "value": (HIDDEN, ATTENTION),
    "output": (ATTENTION, HIDDEN),
    "gate": (HIDDEN, MLP),
    "up": (HIDDEN, MLP),
    "down": (MLP, HIDDEN),
}
RANK, ALPHA = 16, 32
EMBEDDING_COUNT = VOCABULARY * HIDDEN  # shared with the output layer
LINEAR_COUNT = LAYERS * sum(rows * columns for rows, columns in LINEAR.values())
NORM_COUNT = (2 * LAYERS + 1) * HIDDEN
PARAMETERS = EMBEDDING_COUNT + LINEAR_COUNT + NORM_COUNT
ADAPTER_COUNT = LAYERS * sum(RANK * (rows + columns) for rows, columns in LINEAR.values())
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # 4 bits; a byte of scale for 64, scaled again for 256 of them
GIB = 2**30

ALT = {
    "pipeline": """
        Flow chart in three columns, one a notebook. Notebook 1, generate data: originals and prompts go
        to the rewriter, Gemma-7b-it or offline a rules stand-in, then are cleaned, merged and split by
        whole prompt clusters into training_data.csv. Notebook 2, fine-tune: training data and frozen
        Gemma weights go to LoRA fine-tuning, validation picks the best step, the result is adapter/.
        Notebook 3, evaluate: the adapter and the test rows go to recovery, which writes
        predictions.csv; the scorer, sentence-t5 or offline MiniLM as a proxy, makes report.json of it.
        The best method's answers to test.csv pass a check and become submission.csv.
    """,
    "lora": """
        The update of LoRA as a picture of matrices: h = W x + alpha/r B A x. W, 4,096 by 3,072, is
        frozen in NF4. B, 4,096 by 16, and A, 16 by 3,072, are trained. For Gemma-7b's query projection,
        W has 12,582,912 weights and A and B together 114,688, 0.91 percent.
    """,
    "qlora-memory": """
        Stacked bars of GPU memory for fine-tuning Gemma-7b: full fp32 with Adam 127.2 GiB, full bf16
        with Adam 63.6 GiB, LoRA on an fp16 base 16.6 GiB, QLoRA on an NF4 base 5.9 GiB. Only QLoRA
        stays below the line at 15 GiB, what a T4 offers.
    """,
    "sharding": """
        One transformer block on eight TPU cores. The query, key, value, gate and up matrices are cut
        into eight groups of columns, the output and down matrices into eight groups of rows; core 0
        holds the first part of each. An all-reduce follows the output matrix and another the down
        matrix.
    """,
    "completion-mask": """
        Tokens of a chat turn with their labels. Every token of the user's turn and the opening of the
        model's turn has label -100, no loss. The seven tokens of the answer, including the closing
        end_of_turn, keep their own ids as labels and carry the loss. Padding has label -100.
    """,
    "cluster-split": """
        Two scatter plots of the same prompts, in nine clusters. Left, split by cluster: each cluster
        lies wholly in train, validation or test. Right, split by row: the splits mix within clusters,
        and lines join held-out prompts to train prompts of their own cluster, a leak.
    """,
    "cos3": """
        Curve of the score, the cube of the cosine. A vague constant answer at cosine 0.83 scores 0.58,
        a good answer at 0.89 scores 0.71, the exact prompt at 1 scores 1. The curve grows steeper to
        the right.
    """,
    "beam-search": """
        Three columns, each with what one step does to a short string. Greedy: every word of the
        vocabulary is tried at the end of "rewrite this", one string is kept. Beam: drawn words are
        appended to each of two strings, the best two of all are kept, whether they score higher or not.
        Gradient: one backward pass ranks the words for every place of "rewrite this tale", the best few
        strings are encoded exactly, and one is accepted only if the score rises.
    """,
    "recovery": """
        Flow chart of recovery without a language model. The original and the rewritten text become
        features; heads, which also see a bank of prompts, turn them into a posterior: a vector and
        weights over the bank. Bank prompts are joined so that the text lands near the vector, a search
        goes on word by word, and one string, the rewrite_prompt, comes out.
    """,
}
ALT = {name: " ".join(text.split()) for name, text in ALT.items()}


# ---- the diagrams


def pipeline() -> Figure:
    """From originals and prompts to report.json and submission.csv, one column a notebook."""
    figure, axes = _canvas(408)
    _band(axes, 8, 236, "1  Generate data", PALE_BLUE, BLUE)
    _band(axes, 274, 212, "2  Fine-tune", PALE_ORANGE, "#8A5A00")
    _band(axes, 516, 236, "3  Evaluate", PALE_GREEN, DARK_GREEN)
    _file(axes, 24, 52, 96, 38, "originals")
    _file(axes, 132, 52, 96, 38, "prompts")
    _step(axes, 24, 122, 204, 58, "rewriter", "Gemma-7b-it, or offline", "the rules stand-in", colour=BLUE)
    _step(axes, 24, 212, 204, 58, "clean, merge, split", "whole prompt clusters", "to one split", colour=BLUE)
    _file(axes, 24, 306, 204, 62, "training_data.csv", "train, validation, test")
    for x, top, bottom in ((72, 90, 122), (180, 90, 122), (126, 180, 212), (126, 270, 306)):
        _arrow(axes, (x, top), (x, bottom))
    _file(axes, 292, 52, 176, 38, "frozen Gemma")
    _step(axes, 292, 122, 176, 58, "LoRA fine-tuning", "loss on the answer only", colour=ORANGE)
    _step(axes, 292, 212, 176, 58, "validate", "held-out SCS", "picks the step", colour=ORANGE)
    _file(axes, 292, 306, 176, 62, "adapter/", "two thin matrices a layer")
    for top, bottom in ((90, 122), (180, 212), (270, 306)):
        _arrow(axes, (380, top), (380, bottom))
    _arrow(axes, (228, 337), (259, 337), (259, 151), (292, 151))
    _arrow(axes, (468, 337), (501, 337), (501, 151), (532, 151))
    _file(axes, 532, 52, 204, 38, "test rows", "held out, or Kaggle's test.csv")
    _step(axes, 532, 122, 204, 58, "recover", "one prompt a row", colour=GREEN)
    _file(axes, 526, 206, 108, 38, "predictions.csv")
    _file(axes, 642, 206, 106, 38, "best method", "on test.csv")
    _step(axes, 524, 270, 120, 58, "scorer", "sentence-t5, or", "MiniLM as proxy", colour=GREEN)
    _step(axes, 652, 270, 92, 58, "check", "no row blank", colour=GREEN)
    _file(axes, 526, 352, 102, 38, "report.json")
    _file(axes, 634, 352, 114, 38, "submission.csv")
    for x, top, bottom in (
        (634, 90, 122),
        (584, 180, 206),
        (698, 180, 206),
        (584, 244, 270),
        (698, 244, 270),
        (584, 328, 352),
    ):
        _arrow(axes, (x, top), (x, bottom))
    _arrow(axes, (698, 328), (698, 352))
    return figure


def lora() -> Figure:
    """W x + alpha/r B A x as matrices, with the counts of Gemma-7b's query projection."""
    figure, axes = _canvas(352)
    rows, columns = ATTENTION, HIDDEN
    _matrix(axes, 52, 80, 132, 176, PALE_GREY, GREY)
    _text(axes, 118, 168, "W", 24, weight="bold")
    _text(axes, 118, 52, "frozen, NF4", 12, weight="bold", color=GREY)
    _small(axes, 118, 69, f"{columns:,} columns")
    _small(axes, 38, 168, f"{rows:,} rows", rotation=90)
    _matrix(axes, 206, 102, 16, 132, "white", INK)
    _text(axes, 214, 168, "x", 14)
    _text(axes, 248, 168, "+", 22)
    _text(axes, 300, 155, "α", 18)
    axes.plot((286, 314), (168, 168), color=INK, linewidth=1.2)
    _text(axes, 300, 184, "r", 18)
    _small(axes, 300, 214, f"{ALPHA} / {RANK} = {ALPHA // RANK}")
    _matrix(axes, 372, 80, 26, 176, PALE_ORANGE, ORANGE)
    _text(axes, 385, 168, "B", 18, weight="bold")
    _small(axes, 385, 69, f"r = {RANK} columns")
    _small(axes, 358, 168, f"{rows:,} rows", rotation=90)
    _matrix(axes, 424, 155, 132, 26, PALE_BLUE, BLUE)
    _text(axes, 490, 168, "A", 18, weight="bold")
    _small(axes, 490, 144, f"{columns:,} columns")
    _small(axes, 490, 194, f"r = {RANK} rows, drawn thicker")
    _text(axes, 470, 52, "trained, in fp32", 12, weight="bold", color=VERMILLION)
    _small(axes, 490, 226, "A starts random, B at zero:")
    _small(axes, 490, 241, "step 0 is the base model")
    _matrix(axes, 578, 102, 16, 132, "white", INK)
    _text(axes, 586, 168, "x", 14)
    _text(axes, 626, 168, "=", 22)
    _matrix(axes, 660, 80, 16, 176, "white", INK)
    _text(axes, 668, 168, "h", 14)
    _small(axes, 668, 69, f"{rows:,}")
    _title(axes, "One adapted layer: the query projection of Gemma-7b")
    full, thin = rows * columns, RANK * (rows + columns)
    in_nf4, in_fp16 = full * NF4_BYTES / 2**20, full * 2 / 2**20
    _notes(
        axes,
        52,
        288,
        f"W: {full:,} weights, {in_nf4:.1f} MiB in NF4, {in_fp16:.0f} MiB in fp16.",
        f"A and B: {RANK * columns:,} + {RANK * rows:,} = {thin:,} weights, {thin / full:.2%} of W.",
        f"All {len(LINEAR)} linear maps of {LAYERS} blocks: {ADAPTER_COUNT / 1e6:.1f} million trained "
        f"weights beside {PARAMETERS / 1e9:.2f} billion, {ADAPTER_COUNT / PARAMETERS:.2%}.",
    )
    return figure


def memory_parts() -> dict[str, dict[str, float]]:
    """GiB of weights, gradients, Adam's two moments, and adapter for four ways to fine-tune Gemma-7b."""
    adapter = ADAPTER_COUNT * (4 + 4 + 8) / GIB  # fp32 weights, gradients, two moments
    unquantised = (EMBEDDING_COUNT + NORM_COUNT) * 2 / GIB
    parts = {
        "full, fp32": (PARAMETERS * 4 / GIB, PARAMETERS * 4 / GIB, PARAMETERS * 8 / GIB, 0),
        "full, bf16": (PARAMETERS * 2 / GIB, PARAMETERS * 2 / GIB, PARAMETERS * 4 / GIB, 0),
        "LoRA, fp16 base": (PARAMETERS * 2 / GIB, 0, 0, adapter),
        "QLoRA, NF4 base": (LINEAR_COUNT * NF4_BYTES / GIB + unquantised, 0, 0, adapter),
    }
    names = ("weights", "gradients", "Adam's moments", "adapter, with its gradients and moments")
    return {way: dict(zip(names, sizes, strict=True)) for way, sizes in parts.items()}


def qlora_memory() -> Figure:
    """Stacked bars, all four ways on the left, the two small ones enlarged on the right."""
    figure, under = _canvas(366)
    parts = memory_parts()
    wide = figure.add_axes((0.16, 0.33, 0.42, 0.46))
    near = figure.add_axes((0.65, 0.33, 0.33, 0.46))
    for axes, limit in ((wide, 150), (near, 21)):
        _stack(axes, list(parts.items()) if axes is wide else list(parts.items())[2:], limit)
    wide.set_yticks(range(4), parts, fontsize=10.5)
    near.set_yticks(range(2), ["LoRA", "QLoRA"], fontsize=10.5)
    wide.set_title("all four", fontsize=11, loc="left", color=GREY)
    near.set_title("the last two, enlarged", fontsize=11, loc="left", color=GREY)
    legend = {"loc": "upper center", "ncols": 4, "bbox_to_anchor": (0.5, 0.93), "columnspacing": 1.2}
    under.legend(*wide.get_legend_handles_labels(), fontsize=9.5, frameon=False, handlelength=1.4, **legend)
    near.text(15.3, 0.5, "one T4", fontsize=11, va="center")
    _title(under, f"Memory to fine-tune Gemma-7b ({PARAMETERS / 1e9:.2f} billion parameters)")
    _notes(
        under,
        30,
        304,
        "Dashed line: 15 GiB, what one 16 GB T4 leaves to a program. Activations come on top of every bar.",
        "Bytes a parameter: fp32 4 + 4 + 8, bf16 2 + 2 + 4 (weights, gradients, Adam's two moments).",
        f"Adapter in fp32, r = {RANK}, all linear maps. NF4: {8 * NF4_BYTES:.3f} bits a weight, scales "
        "included; embedding and norms 16 bit.",
    )
    return figure


def sharding() -> Figure:
    """The matrices of one block over a mesh (1, 8): columns, then rows, then a sum over cores."""
    figure, axes = _canvas(440)
    _title(axes, "One block of Gemma-7b on 8 TPU cores, mesh (batch 1, model 8)")
    _text(axes, 20, 48, "Attention", 12, weight="bold", ha="left", color=BLUE)
    for index, name in enumerate(("query", "key", "value")):
        _shards(axes, 70 + 122 * index, 84, 104, 78, name, "columns")
    _small(axes, 244, 178, f"{HEADS // 8} of {HEADS} heads a core, each {HEAD_SIZE} wide")
    _arrow(axes, (422, 123), (458, 123))
    _shards(axes, 462, 84, 104, 78, "output", "rows")
    _small(axes, 514, 178, f"{ATTENTION // 8} rows a core")
    _text(axes, 20, 212, "MLP", 12, weight="bold", ha="left", color=BLUE)
    for index, name in enumerate(("gate", "up")):
        _shards(axes, 70 + 174 * index, 248, 156, 78, name, "columns")
    _small(axes, 235, 342, f"{MLP // 8:,} columns a core")
    _arrow(axes, (404, 287), (458, 287))
    _shards(axes, 474, 240, 78, 96, "down", "rows")
    _small(axes, 514, 350, f"{MLP // 8:,} rows a core")
    for y in (123, 287):
        _arrow(axes, (22, y), (66, y))
        _text(axes, 42, y - 10, "x", 12)
        _arrow(axes, (570 if y == 123 else 556, y), (612, y))
        axes.add_patch(Circle((636, y), 24, facecolor=PALE_GREEN, edgecolor=GREEN, linewidth=1.6))
        _text(axes, 636, y, "Σ", 20)
        _text(axes, 636, y + 38, "all-reduce", 11, weight="bold")
        _small(axes, 636, y + 54, "sums 8 partial results")
        _arrow(axes, (660, y), (736, y))
        _small(axes, 698, y - 12, "+ residual")
    axes.add_patch(Rectangle((20, 372), 14, 14, facecolor=ORANGE, edgecolor=INK, linewidth=0.8))
    size = PARAMETERS * 2 / GIB
    _text(axes, 40, 379, "held by core 0; a number names the core of each part.", 10.5, ha="left")
    _notes(
        axes,
        20,
        402,
        "Matrices stand input by output, x @ W. Between a cut by columns and the cut by rows after it, "
        "no core needs another.",
        f"Embedding: {VOCABULARY // 8:,} of {VOCABULARY:,} rows a core. Norms: a copy on each. "
        f"Weights in bf16: {size:.1f} GiB in all, {size / 8:.1f} GiB a core.",
    )
    return figure


def completion_mask() -> Figure:
    """A chat turn token by token, with the labels the loss sees."""
    figure, axes = _canvas(322)
    _title(axes, "Completion-only loss: what is masked, what is learnt")
    user = ["<bos>", "<start_of_turn>", "user", "↵", "Original:", "…", "Rewritten:", "…", "What", "…"]
    user += ["<end_of_turn>", "↵"]
    opening = ["<start_of_turn>", "model", "↵"]
    answer = ["Rewrite", "this", "as", "a", "sea", "shanty", "<end_of_turn>"]
    for y in (72, 182):
        _text(axes, 54, y + 13, "token", 11, ha="right", color=GREY)
        _text(axes, 54, y + 41, "label", 11, ha="right", color=GREY)
    _text(axes, 64, 56, "the user's turn: both texts and the question", 11, ha="left", color=GREY)
    _tokens(axes, 64, 72, user, learnt=False)
    x = _tokens(axes, 64, 182, opening, learnt=False)
    start, x = x, _tokens(axes, x, 182, answer, learnt=True)
    _text(axes, 64, 166, "the model's turn opens", 11, ha="left", color=GREY)
    caption = f"the answer: {len(answer)} positions carry loss"
    _text(axes, (start + x) / 2, 154, caption, 11, weight="bold", color=DARK_GREEN)
    axes.plot((start, start, x - 5, x - 5), (174, 166, 166, 174), color=GREEN, linewidth=1.5)
    _tokens(axes, x, 182, ["<pad>"], learnt=False)
    _notes(
        axes,
        64,
        268,
        "The label −100 is left out of the loss. Every other token is predicted from those before it.",
        "The closing <end_of_turn> is learnt too: without it the model would never stop.",
    )
    return figure


def cluster_split() -> Figure:
    """The same prompts split by cluster (left) and by row (right), held-out ones joined to their twins."""
    random = np.random.default_rng(4)
    centres = np.array([(x, y) for y in (95, 190, 285) for x in (65, 175, 285)])
    centres = centres + random.uniform(-10, 10, (9, 2))
    cluster = np.repeat(np.arange(9), 8)
    prompts = centres[cluster] + np.clip(random.normal(0, 14, (72, 2)), -25, 25)
    by_cluster = np.array(["train", "test", *["train"] * 3, "validation", "test", "train", "train"])[cluster]
    by_row = random.permutation(by_cluster)
    figure, axes = _canvas(412)
    for shift, split, title in ((10, by_cluster, "Split by prompt cluster"), (400, by_row, "Split by row")):
        _text(axes, shift + 175, 22, title, 14, weight="bold")
        for x, y in centres:
            axes.add_patch(Circle((x + shift, y), 40, facecolor=PALE_GREY, edgecolor="#C8C8C8"))
        leaks = _twins(prompts, cluster, split)
        for pair in leaks:
            axes.plot(*(prompts[list(pair)] + (shift, 0)).T, color=INK, linewidth=1)
        for name, (marker, colour) in SPLITS.items():
            style = {"marker": marker, "color": colour, "label": name if shift == 10 else None}
            chosen = prompts[split == name] + (shift, 0)
            axes.scatter(*chosen.T, s=34, edgecolors="white", linewidths=0.6, zorder=3, **style)
        count = f"{len(leaks)} of {(split != 'train').sum()} held-out prompts have a twin in train"
        _text(axes, shift + 175, 358, count, 11.5, weight="bold", color=VERMILLION if leaks else DARK_GREEN)
    axes.plot((380, 380), (20, 366), color="#C8C8C8")
    axes.legend(loc="lower center", ncols=3, frameon=False, fontsize=11, bbox_to_anchor=(0.5, -0.005))
    return figure


def cos3() -> Figure:
    """cos**3 with three answers marked; the cosines are cube roots of reported mean scores."""
    figure, under = _canvas(380)
    axes = figure.add_axes((0.085, 0.2, 0.88, 0.68))
    x = np.linspace(0.4, 1, 200)
    axes.plot(x, x, linestyle=":", color=GREY, linewidth=1.6)
    axes.plot(x, x**3, color=BLUE, linewidth=2.4)
    axes.set(xlim=(0.4, 1.02), ylim=(0, 1.1))
    axes.grid(color="#E8E8E8")
    axes.set_axisbelow(True)
    axes.set_xlabel("cosine of the two prompts' embeddings", fontsize=11)
    axes.set_ylabel("score", fontsize=11)
    names = ("a vague constant answer", "a good answer", "the exact prompt")
    scores, colours = (0.58, 0.71, 1.0), (ORANGE, VERMILLION, GREEN)
    for name, score, marker, colour in zip(names, scores, "sDo", colours, strict=True):
        cosine = score ** (1 / 3)
        axes.plot((cosine, cosine, 0.4), (0, score, score), "--", linewidth=0.9, color=GREY, zorder=1)
        axes.plot(cosine, score, marker, color=colour, markersize=10, markeredgecolor=INK, zorder=3)
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        label = f"{name}: {cosine:.2f}³ = {score:.2f}"
        axes.text(0.41, score + 0.05, label, fontsize=11, va="center", bbox=clear)
    axes.text(0.47, 0.40, "cos", fontsize=12, color=GREY, ha="right")
    axes.text(0.62, 0.15, "cos³, the score", fontsize=12, color=BLUE, weight="bold", ha="left")
    _title(under, "The cube rewards the last step most")
    _notes(
        under,
        64,
        354,
        "One hundredth of cosine is worth 0.021 of score at the constant answer, 0.024 at the good one, "
        "0.030 at the exact one.",
    )
    return figure


def beam_search() -> Figure:
    """One step of greedy, beam and gradient search, one column each."""
    figure, axes = _canvas(408)
    ink = "#8A5A00"
    for x, title, fill, colour in (
        (8, "Greedy", PALE_ORANGE, ink),
        (262, "Beam", PALE_BLUE, BLUE),
        (516, "Gradient", PALE_GREEN, DARK_GREEN),
    ):
        _band(axes, x, 236, title, fill, colour)
    _chips(axes, 24, 50, ["rewrite", "this", "?"])
    _small(axes, 126, 98, "every word of the vocabulary at the end")
    for y, word in ((116, "zebra"), (150, "poem"), (184, "story"), (218, "the")):
        _chips(axes, 24, y, ["rewrite", "this", word], kept=word == "story")
    _small(axes, 126, 260, "… one string for each word, all encoded")
    _arrow(axes, (126, 274), (126, 300))
    _chips(axes, 24, 306, ["rewrite", "this", "story"], kept=True)
    _small(axes, 126, 358, "a word costs as many encodings")
    _small(axes, 126, 374, "as the vocabulary has words")

    for y, start, words, best in (
        (50, ["rewrite", "this"], ("poem", "song"), "poem"),
        (174, ["make", "it"], ("rhyme", "loud"), "rhyme"),
    ):
        _chips(axes, 278, y, start)
        for shift, word in ((38, words[0]), (72, words[1])):
            _chips(axes, 300, y + shift, [*start, word], kept=word == best)
            _arrow(axes, (286, y + 26), (286, y + shift + 13), (300, y + shift + 13))
    _small(axes, 380, 161, "drawn words after each string")
    _arrow(axes, (380, 278), (380, 300))
    _small(axes, 380, 314, "the best of a length go on,")
    _small(axes, 380, 330, "a rise or not")
    _small(axes, 380, 358, "a word costs (strings kept)")
    _small(axes, 380, 374, "× (words drawn) encodings")

    ends = _chips(axes, 532, 50, ["rewrite", "this", "tale"])
    _small(axes, 634, 92, "one backward pass ranks all words")
    for end, words in zip(
        ends, (("write", "turn", "reword"), ("it", "the", "text"), ("story", "poem", "prose")), strict=True
    ):
        for line, word in enumerate(words):
            _text(axes, end, 112 + 16 * line, word, 10, color=INK if line == 0 else GREY)
    _small(axes, 634, 168, "the best few, encoded exactly:")
    for y, words in (
        (182, ["write", "this", "tale"]),
        (214, ["rewrite", "it", "tale"]),
        (246, ["rewrite", "this", "story"]),
    ):
        _chips(axes, 532, y, words, kept=words[-1] == "story")
    _arrow(axes, (634, 278), (634, 300))
    _small(axes, 634, 314, "accepted only if the score rises;")
    _small(axes, 634, 330, "also insert, delete, swap")
    _small(axes, 634, 358, "a step costs a backward pass")
    _small(axes, 634, 374, "and a few encodings")
    return figure


def recovery() -> Figure:
    """From two texts to a string, without a language model."""
    figure, axes = _canvas(330)
    _title(axes, "Recovery without a language model: predict the embedding, then say it")
    _file(axes, 16, 52, 136, 38, "original_text")
    _file(axes, 16, 106, 136, 38, "rewritten_text")
    _step(
        axes, 192, 62, 150, 72, "features", "embeddings of both,", "what came and went,", "layout, style", colour=BLUE
    )
    _step(axes, 384, 62, 150, 72, "heads", "trained on cos³,", "one without each", "fold, one on all", colour=ORANGE)
    _file(axes, 576, 56, 168, 84, "posterior", "a vector, weights over", "the bank, and the SCS", "to be expected")
    _file(axes, 384, 166, 150, 40, "prompt bank", "with embeddings")
    _file(axes, 16, 246, 150, 56, "rewrite_prompt", "one string a row")
    _step(axes, 206, 238, 150, 72, "search", "word by word, by what", "tokens add up to", colour=GREEN)
    _step(axes, 396, 238, 150, 72, "join", "up to five prompts, if", "that comes nearer", colour=GREEN)
    _step(axes, 586, 238, 158, 72, "choose", "the bank's prompt", "nearest to the vector", colour=GREEN)
    _arrow(axes, (152, 71), (172, 71), (172, 90), (192, 90))
    _arrow(axes, (152, 125), (172, 125), (172, 106), (192, 106))
    for start, end in (((342, 98), (384, 98)), ((534, 98), (576, 98)), ((660, 140), (660, 238))):
        _arrow(axes, start, end)
    _arrow(axes, (459, 166), (459, 134))
    _arrow(axes, (534, 186), (622, 186), (622, 238))
    for start, end in ((586, 546), (396, 356), (206, 166)):
        _arrow(axes, (start, 274), (end, 274))
    return figure


DIAGRAMS = {
    "pipeline": pipeline,
    "lora": lora,
    "qlora-memory": qlora_memory,
    "sharding": sharding,
    "completion-mask": completion_mask,
    "cluster-split": cluster_split,
    "cos3": cos3,
    "beam-search": beam_search,
    "recovery": recovery,
}


# ---- the parts they are made of


def _canvas(height: float) -> tuple[Figure, Axes]:
    """A white sheet of WIDTH by `height` points; its axes count points from the top left corner."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _text(axes: Axes, x: float, y: float, text: str, size: float, **style) -> None:
    style = {"ha": "center", "va": "center", "color": INK} | style
    axes.text(x, y, text, fontsize=size, **style)


def _small(axes: Axes, x: float, y: float, text: str, **style) -> None:
    _text(axes, x, y, text, 10, color=GREY, **style)


def _title(axes: Axes, text: str) -> None:
    _text(axes, WIDTH / 2, 20, text, 14, weight="bold")


def _notes(axes: Axes, x: float, y: float, *lines: str) -> None:
    """Sentences under a diagram, one a line."""
    for index, line in enumerate(lines):
        _text(axes, x, y + 21 * index, line, 10.5, ha="left")


def _band(axes: Axes, x: float, width: float, title: str, fill: str, ink: str) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=10", "facecolor": fill, "edgecolor": "none"}
    axes.add_patch(FancyBboxPatch((x, 8), width, 392, **style))
    _text(axes, x + 16, 30, title, 13.5, weight="bold", ha="left", color=ink)


def _lines(axes: Axes, x: float, y: float, lines: Sequence[str], family: str) -> None:
    """A bold first line and smaller ones below it, centred on (x, y)."""
    top = y - 7.5 * (len(lines) - 1)
    _text(axes, x, top, lines[0], 11, weight="bold", family=family)
    for index, line in enumerate(lines[1:], start=1):
        _text(axes, x, top + 15 * index, line, 10)


def _step(axes: Axes, x: float, y: float, width: float, height: float, *lines: str, colour: str) -> None:
    """Something that is done: rounded, with a coloured edge."""
    style = {
        "boxstyle": "round,pad=0,rounding_size=8",
        "facecolor": "white",
        "edgecolor": colour,
        "linewidth": 1.8,
    }
    axes.add_patch(FancyBboxPatch((x, y), width, height, **style))
    _lines(axes, x + width / 2, y + height / 2, lines, "DejaVu Sans")


def _file(axes: Axes, x: float, y: float, width: float, height: float, *lines: str) -> None:
    """Something that is kept: a sheet with a folded corner."""
    fold = 9
    corners = [(x, y), (x + width - fold, y), (x + width, y + fold), (x + width, y + height), (x, y + height)]
    axes.fill(*zip(*corners, strict=True), facecolor="#FFFFFF", edgecolor=GREY, linewidth=1.2)
    inner = x + width - fold
    axes.plot((inner, inner, x + width), (y, y + fold, y + fold), color=GREY, linewidth=1.2)
    _lines(axes, x + width / 2, y + height / 2, lines, "DejaVu Sans Mono")


def _arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """A line through the points with a head at the last one."""
    axes.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.4, solid_joinstyle="round")
    head = {"arrowstyle": "-|>,head_width=0.3,head_length=0.55", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops={"color": INK, "linewidth": 1.4, **head})


def _matrix(axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=1.5))


def _stack(axes: Axes, parts: list[tuple[str, dict[str, float]]], limit: float) -> None:
    """Horizontal stacked bars, the first on top, each with its sum, and the line of a T4."""
    fills = ((BLUE, ""), ("#56B4E9", "///"), ("#F0E442", "\\\\\\"), (VERMILLION, ""))
    for place, (_, sizes) in enumerate(parts):
        left = 0.0
        for (name, size), (fill, hatch) in zip(sizes.items(), fills, strict=True):
            bar = {"facecolor": fill, "hatch": hatch, "edgecolor": INK, "linewidth": 0.7, "height": 0.58}
            axes.barh(place, size, left=left, label=name if place == 0 else None, **bar)
            left += size
        inside = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        right = 15 if limit > 50 and left < 15 else left  # in the wide panel, clear of the line
        style_of_sum = {"fontsize": 11, "weight": "bold", "bbox": inside, "zorder": 4}
        axes.text(right + limit * 0.02, place, f"{left:.1f}", va="center", **style_of_sum)
    axes.axvline(15, color=INK, linestyle="--", linewidth=1.4)
    axes.set(xlim=(0, limit), ylim=(len(parts) - 0.5, -0.5))
    axes.set_xlabel("GiB", fontsize=11)


def _shards(axes: Axes, x: float, y: float, width: float, height: float, name: str, cut: str) -> None:
    """A matrix in eight numbered parts, core 0 in orange, with its name and shape above it."""
    rows, columns = LINEAR[name]
    for core in range(8):
        if cut == "columns":
            left, top, wide, high = x + core * width / 8, y, width / 8, height
        else:
            left, top, wide, high = x, y + core * height / 8, width, height / 8
        fill = ORANGE if core == 0 else PALE_BLUE
        axes.add_patch(Rectangle((left, top), wide, high, facecolor=fill, edgecolor=INK, linewidth=0.7))
        _text(axes, left + wide / 2, top + high / 2, str(core), 8)
    _text(axes, x + width / 2, y - 22, name, 11, weight="bold")
    _text(axes, x + width / 2, y - 8, f"{rows:,} × {columns:,}", 9, color=GREY)


def _tokens(axes: Axes, x: float, y: float, tokens: Sequence[str], learnt: bool) -> float:
    """Token boxes over label boxes from x on; returns where the next one would start."""
    for token in tokens:
        width = max(33.0, 6.0 * len(token) + 10)
        fill, edge = (PALE_GREEN, GREEN) if learnt else (PALE_GREY, "#B0B0B0")
        for top in (y, y + 28):
            axes.add_patch(Rectangle((x, top), width, 26, facecolor=fill, edgecolor=edge, linewidth=1))
        _text(axes, x + width / 2, y + 13, token, 9.5, family="DejaVu Sans Mono")
        style = {"color": INK, "weight": "bold"} if learnt else {"color": GREY}
        label = token if learnt else "−100"
        _text(axes, x + width / 2, y + 41, label, 9.5, family="DejaVu Sans Mono", **style)
        x += width + 5
    return x


def _chips(axes: Axes, x: float, y: float, words: Sequence[str], kept: bool = False) -> list[float]:
    """A string as a row of word boxes, green if it is kept; returns where each word has its middle."""
    fill, edge = (PALE_GREEN, GREEN) if kept else ("white", "#B0B0B0")
    middles = []
    for word in words:
        width = 6.4 * len(word) + 18
        axes.add_patch(Rectangle((x, y), width, 26, facecolor=fill, edgecolor=edge, linewidth=1.8 if kept else 1))
        _text(axes, x + width / 2, y + 13, word, 10, weight="bold" if kept else "normal")
        middles.append(x + width / 2)
        x += width + 5
    return middles


def _twins(prompts: np.ndarray, cluster: np.ndarray, split: np.ndarray) -> list[tuple[int, int]]:
    """Held-out prompts that have train prompts in their own cluster, each with the nearest of them."""
    pairs = []
    for held_out in np.flatnonzero(split != "train"):
        twins = np.flatnonzero((split == "train") & (cluster == cluster[held_out]))
        if len(twins):
            distances = np.linalg.norm(prompts[twins] - prompts[held_out], axis=1)
            pairs.append((held_out, twins[distances.argmin()]))
    return pairs


def check_texts(figure: Figure) -> None:
    """Raise ValueError if two texts overlap or one leaves the sheet."""
    figure.draw_without_rendering()
    unseen = set().union(*(_unseen(axes, axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)))
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in unseen]
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in texts]
    for index, (name, box) in enumerate(boxes):
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1:
            raise ValueError(f"{name!r} leaves the sheet")
        for other, other_box in boxes[:index]:
            if box.overlaps(other_box):
                raise ValueError(f"{name!r} overlaps {other!r}")


def _unseen(axes: Axes, axis: Axis) -> set[Text]:
    """Texts of an axis that are not drawn: all of a hidden axis, tick labels beyond the limits."""
    low, high = sorted(axis.get_view_interval())
    seen = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return set(axis.findobj(Text)) - ({axis.label, *seen} if axes.axison else set())


def draw_all(folder: Path) -> list[Path]:
    """Write every diagram into `folder`; the same bytes each time."""
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in DIAGRAMS.items():
            figure = draw()
            check_texts(figure)
            path = folder / f"{name}.svg"
            about = {"Title": name, "Description": ALT[name], "Date": None, "Creator": None}
            figure.savefig(path, format="svg", metadata=about)
            written.append(path)
    return written


if __name__ == "__main__":
    for path in draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(path)
