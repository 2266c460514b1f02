"""Put a comparison into the book: `python scripts/draw_comparison.py runs/compare/results.json`.

Copies the results to benchmarks/compare.json and writes docs/comparison-tables.md, which docs/comparison.md includes,
and a figure for each source of test rows. Without an argument it redraws from benchmarks/compare.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import pandas as pd

from promptrec import plots
from promptrec.tables import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "compare.json"
TABLES = ROOT / "docs" / "comparison-tables.md"
SVG = {"svg.fonttype": "path", "svg.hashsalt": "promptrec"}
HEADER = ("method", "mean SCS", "difference", "dealt", "distinct, words", "seeds (spread)", "CPU s, GiB")


def figure_name(source: str) -> str:
    """File name of a source's figure."""
    return "comparison-" + "".join(letter if letter.isalnum() else "-" for letter in source).strip("-") + ".svg"


def grid(header: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `align` has l or r for each column."""
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    ruler = "|" + "".join({"l": "---|", "r": "---:|"}[side] for side in align)
    return "\n".join([line(header), ruler, *map(line, rows)])


def figure(value: float, sign: str = "") -> str:
    """Three digits without the zero before the point: the table has to fit the page."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def spoken(mean: float, low: float, high: float, sign: str = "") -> str:
    """A figure with its interval, which no line break divides."""
    return f"{figure(mean, sign)} [{figure(low, sign)},\N{NO-BREAK SPACE}{figure(high, sign)}]"


def markdown(table: pd.DataFrame) -> str:
    """One source's rows as a Markdown table, best first."""
    rows = [
        (
            row.method,
            spoken(row.mean, row.low, row.high),
            spoken(row.difference, row.difference_low, row.difference_high, "+"),
            figure(row.dealt),
            f"{row.distinct:.0%}, {row.words:.0f}",
            f"{row.seeds} ({figure(row.spread)})" if row.seeds > 1 else f"{row.seeds}",
            f"{row.fit_cpu_seconds + row.answer_cpu_seconds:.0f}, {row.memory_mib / 1024:.1f}",
        )
        for row in table.itertuples(index=False)
    ]
    return grid(HEADER, "lrrrrrr", rows)


def claims(results: dict) -> str:
    """What was reported elsewhere, with the paired difference found here."""
    rows = [
        (
            one["text"],
            one["source_of_claim"],
            one["source"],
            f"{figure(one['better_mean'])}, {figure(one['worse_mean'])}",
            spoken(one["difference"], one["low"], one["high"], "+"),
            one["verdict"],
        )
        for one in results["claims"]
    ]
    return grid(("claim", "who", "rows", "mean SCS of the two", "difference", "verdict"), "lllrrl", rows)


def headroom(results: dict) -> str:
    """What an ensemble could reach at most, by an oracle."""
    rows = [
        (
            one["source"],
            one["ensemble"],
            ", ".join(one["parts"]),
            f"{one['best_part']} {figure(one['best_part_mean'])}",
            figure(one["ensemble_mean"]),
            spoken(one["oracle"], one["low"], one["high"]),
        )
        for one in results["headroom"]
    ]
    header = ("rows", "ensemble", "its parts", "best part", "the ensemble", "the best part of each row, by an oracle")
    return grid(header, "lllrrr", rows)


def tables(results: dict) -> str:
    """What the page includes: a heading, a figure and a table for each source, then the claims."""
    parts = []
    for source, table in pd.DataFrame(results["rows"]).groupby("source"):
        told = f"n = {table['n'].iloc[0]} rows of {table['clusters'].iloc[0]} prompt clusters; {results['scorer']}"
        alt = f"Mean SCS with intervals on {source} rows; the table below has the numbers."
        image = f"```{{image}} ../images/{figure_name(source)}\n:alt: {alt}\n:width: 100%\n```"
        parts.append(f"## On {source} rows\n\n{told}\n\n{image}\n\n{markdown(table)}\n")
    parts.append(f"## Claims, put to the test\n\n{claims(results)}\n")
    parts.append(f"## What choosing could reach\n\n{headroom(results)}\n")
    missing = pd.Series(results["missing"], dtype=str).str.split(", seed ").str[0].value_counts(sort=False)
    told = ", ".join(f"{method} ({count})" for method, count in missing.items()) or "none"
    parts.append(f"Trials without a result: {told}. All others took {results['cpu_seconds']:,} processor seconds.\n")
    return "\n".join(parts)


def draw(results: dict) -> None:
    """The figures."""
    for source, table in pd.DataFrame(results["rows"]).groupby("source"):
        with matplotlib.rc_context(SVG):
            plots.method_intervals(table).savefig(ROOT / "images" / figure_name(source), metadata={"Date": None})


def main() -> None:
    """Copy, write, draw."""
    results = read_json(sys.argv[1] if len(sys.argv) > 1 else KEPT)
    write_json(results, KEPT)
    write_text(tables(results), TABLES)
    draw(results)


if __name__ == "__main__":
    main()
