"""How every figure looks and speaks: one palette, one style, and an alt text that travels with it.

Figures are made without pyplot, so nothing is shown twice, nothing has to be closed and no backend is chosen: end a
cell with the figure and Jupyter displays it. Colours are Okabe and Ito's, and marker or line style repeats what colour
says.

Alt text: `alt_text(figure, "...")` keeps it with the figure. It reaches the notebook as output metadata (`image/png` ->
`alt`), which nbconvert turns into the image's alt attribute. MyST-NB reads cell metadata instead (`mystnb` -> `image` ->
`alt`): `alt_into_cells` copies it there after execution, before the book is built. By hand, in a percent source, the
same is `# %% mystnb={"image": {"alt": "..."}}`.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito (2008), ordered for contrast on white; yellow is left out, it is too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#222222")
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK = PALETTE
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


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
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
        if any(texts):
            image = cell["metadata"].setdefault("mystnb", {}).setdefault("image", {})
            filled += "alt" not in image
            image.setdefault("alt", " ".join(filter(None, texts)))
    return filled


def canvas(rows: int = 1, height: float = 3.4) -> tuple[Figure, Any]:
    """An empty figure 7.2 inches wide with `rows` panels above one another, sharing their x axis."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots(rows, sharex=True)


def label_axes(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)


def colour_of(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def dash_of(index: int) -> str:
    return ("-", "--", "-.", ":")[index % 4]


def _mimebundle(figure: Figure, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
    """What Jupyter asks a figure for: a PNG of 256 colours (a third of the bytes), and its alt text."""
    full, small = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(full, format="png", dpi=STYLE["figure.dpi"])
    Image.open(full).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    png = base64.b64encode(small.getvalue()).decode("ascii")
    return {"image/png": png, "text/plain": f"<Figure: {figure._alt}>"}, {"image/png": {"alt": figure._alt}}
