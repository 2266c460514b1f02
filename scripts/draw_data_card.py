"""Count and draw the shipped data for its card: `python scripts/draw_data_card.py`. Run it after refresh_assets.py.

Writes docs/data-card-numbers.md (docs/data-card.md includes it, part by part) and three figures in images/. Two runs on
the same data write the same bytes. `numbers` needs no model and no figure, so that a test can hold the file to the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from promptrec import plot_style, plots
from promptrec.cleaning import strip_lead_in
from promptrec.profiles import ASSETS
from promptrec.scoring import get_scorer
from promptrec.splits import SPLITS
from promptrec.tables import read_table

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "docs" / "data-card-numbers.md"
FILES = ("originals", "prompts", "triples")
EXAMPLES = ("Change the hero's profession", "Write it like Oscar Wilde.", "use no sentence longer than seven words")
EXAMPLE_WORDS = 36  # an example is cut after so many
LONG_PROMPT = 20  # words from which a prompt counts as long, competition style
THIN_KIND = 12  # a kind of text with fewer triples is called thin
SVG = {"svg.fonttype": "path", "svg.hashsalt": "promptrec"}


def load() -> dict[str, pd.DataFrame]:
    """The three CSVs, by name."""
    return {name: read_table(ASSETS / f"{name}.csv") for name in FILES}


def words(texts: pd.Series) -> pd.Series:
    """Length of each text in words, split at white space."""
    return texts.str.split().str.len()


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; numbers get thousands separators."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"

    header = list(header)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(line(cells) for cells in [header, rule, *rows])


def part(name: str, text: str) -> str:
    """A part of the file that the card can include by its two comments."""
    return f"<!-- {name} -->\n\n{text}\n\n<!-- end {name} -->\n"


def file_counts(data: dict[str, pd.DataFrame]) -> str:
    rows = []
    for name in FILES:
        table = data[name]
        sides = [int((table["split"] == side).sum()) if "split" in table else "" for side in SPLITS]
        rows.append([f"`{name}.csv`", len(table), *sides])
    return markdown(["File", "Rows", *SPLITS], rows)


def facts(data: dict[str, pd.DataFrame]) -> str:
    """The other figures in one list."""
    triples, prompts = data["triples"], data["prompts"]
    sizes = triples["prompt_cluster"].value_counts()
    per_original = triples.groupby("original_text").size()
    long = [int((words(table["rewrite_prompt"]) >= LONG_PROMPT).sum()) for table in (triples, prompts)]
    return "\n".join(
        f"* {fact}"
        for fact in (
            f"{triples['rewrite_prompt'].nunique():,} distinct prompts in the triples, in {len(sizes):,} clusters; "
            f"{int((sizes > 1).sum())} clusters hold more than one prompt, the largest holds {sizes.max()}.",
            f"{len(per_original):,} originals carry triples, {per_original.mean():.1f} each on average.",
            f"{int(triples['lead_in'].sum())} rewrites ({triples['lead_in'].mean():.0%}) open with a chat model's lead-in.",
            f"{long[0]} prompts of the triples and {long[1]} of `prompts.csv` have {LONG_PROMPT} words or more.",
        )
    )


def length_counts(data: dict[str, pd.DataFrame]) -> str:
    texts = {
        "original": data["originals"]["text"],
        "prompt, triples": data["triples"]["rewrite_prompt"],
        "prompt, `prompts.csv`": data["prompts"]["rewrite_prompt"],
        "rewrite": data["triples"]["rewritten_text"],
    }
    spread = {name: words(column).quantile([0, 0.1, 0.5, 0.9, 1]).round().astype(int) for name, column in texts.items()}
    header = ["Words", "shortest", "10 %", "median", "90 %", "longest"]
    return markdown(header, [[name, *(int(value) for value in values)] for name, values in spread.items()])


def taxonomy_counts(data: dict[str, pd.DataFrame]) -> str:
    triples, prompts = data["triples"], data["prompts"]
    sides = pd.crosstab(triples["taxonomy"], triples["split"])[list(SPLITS)]
    listed = prompts["taxonomy"].value_counts()
    order = sides.sum(axis=1).sort_values(ascending=False, kind="stable").index
    rows = [[name, int(sides.loc[name].sum()), *map(int, sides.loc[name]), int(listed[name])] for name in order]
    return markdown(["Taxonomy", "triples", *SPLITS, "`prompts.csv`"], rows)


def kind_counts(data: dict[str, pd.DataFrame]) -> str:
    originals, triples = data["originals"], data["triples"]
    table = pd.DataFrame({"originals": originals["kind"].value_counts(), "triples": triples["kind"].value_counts()})
    table = table.fillna(0).astype(int).sort_index().sort_values("triples", ascending=False, kind="stable")
    table = table[table["triples"] >= THIN_KIND]
    return markdown(
        ["Kind of text", "originals", "triples"], [[kind, *map(int, row)] for kind, row in table.iterrows()]
    )


def thin_kinds(data: dict[str, pd.DataFrame]) -> str:
    counts = data["triples"]["kind"].value_counts()
    thin = counts[counts < THIN_KIND]
    return (
        f"The table names kinds of text with at least {THIN_KIND} triples; {len(thin):,} other kinds, some of them only"
        f" other names for these, hold {thin.sum():,} triples."
    )


def shortened(text: str) -> str:
    cut = " ".join(text.split()[:EXAMPLE_WORDS])
    return cut if len(text.split()) <= EXAMPLE_WORDS else f"{cut} …"


def examples(data: dict[str, pd.DataFrame]) -> str:
    """Three triples cut short, as definition lists."""
    triples = data["triples"].set_index("rewrite_prompt")
    blocks = []
    for prompt in EXAMPLES:
        row = triples.loc[prompt]
        head = f"**{row['kind'].capitalize()}, {row['taxonomy']}** (`{row['id']}`, {row['split']})"
        texts = ("original_text", shortened(row["original_text"])), ("rewrite_prompt", prompt)
        texts = *texts, ("rewritten_text", shortened(strip_lead_in(row["rewritten_text"])))
        blocks.append("\n".join([head, "", *(f"* *{name}:* {text}" for name, text in texts)]))
    return "\n\n".join(blocks)


def figure_block(name: str, figure: Figure, caption: str) -> str:
    return f"```{{figure}} ../images/data-{name}.svg\n:alt: {figure._alt}\n:width: 100%\n\n{caption}\n```"


def numbers(data: dict[str, pd.DataFrame]) -> str:
    """Everything the card counts, without the figures: the same for the same data."""
    parts = {
        "files": file_counts,
        "facts": facts,
        "lengths": length_counts,
        "taxonomy": taxonomy_counts,
        "kinds": kind_counts,
        "thin": thin_kinds,
        "examples": examples,
    }
    warning = "<!-- Written by scripts/draw_data_card.py: do not edit. -->\n"
    return "\n".join([warning, *(part(name, count(data)) for name, count in parts.items())])


def draw_taxonomy(triples: pd.DataFrame) -> Figure:
    """Triples by taxonomy and split: stacked bars, the most frequent on top."""
    counts = pd.crosstab(triples["taxonomy"], triples["split"])[list(SPLITS)]
    counts = counts.loc[counts.sum(axis=1).sort_values(kind="stable").index]
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes, left = figure.subplots(), np.zeros(len(counts))
        for side, colour, hatch in zip(SPLITS, plot_style.PALETTE, ("", "//", ".."), strict=False):
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": f"{side} ({counts[side].sum()})"}
            axes.barh(counts.index, counts[side], left=left, height=0.75, **style)
            left = left + counts[side].to_numpy()
        axes.set(xlabel="triples", ylabel="taxonomy")
        axes.legend(loc="lower right")
    spoken = ", ".join(f"{name} {int(total)}" for name, total in counts.sum(axis=1).iloc[::-1].items())
    return plot_style.alt_text(
        figure, f"Stacked bars of triples by taxonomy, split into train, validation and test: {spoken}."
    )


def draw(data: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    triples = data["triples"]
    vectors = get_scorer("minilm").encode(triples["rewrite_prompt"].tolist())
    return {
        "lengths": plots.length_histogram(triples, ["original_text", "rewrite_prompt", "rewritten_text"]),
        "taxonomy": draw_taxonomy(triples),
        "clusters": plots.prompts_in_space(vectors, triples["split"].tolist()),
    }


CAPTIONS = {
    "lengths": "Lengths of the triples' three texts.",
    "taxonomy": "What the prompts of the triples ask for.",
    "clusters": (
        "The prompts of the triples by MiniLM (proxy). Near-copies never part, so no prompt of one side has a twin on "
        "another; the sides still cover the same ground."
    ),
}


def main() -> None:
    data = load()
    figures = draw(data)
    with matplotlib.rc_context(plot_style.STYLE | SVG):
        for name, figure in figures.items():
            figure.savefig(ROOT / "images" / f"data-{name}.svg", metadata={"Date": None}, dpi=120)
    text = numbers(data)
    blocks = [part(f"figure {name}", figure_block(name, figure, CAPTIONS[name])) for name, figure in figures.items()]
    NUMBERS.write_text("\n".join([text, *blocks]), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
