"""Colours and type of the figures, and how a figure becomes a PNG file or SVG text for the page."""

from __future__ import annotations

import dataclasses
import enum
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LIGHT = {
    "ink": "#1b1f24",
    "muted": "#59626d",
    "grid": "#e1e5ea",
    "paper": "#ffffff",
    "label": "#fefefe",  # text on a coloured bar
    "computation": "#0072b2",
    "communication": "#c44e00",
    "data": "#007f5f",
    "optimizer": "#a8558a",
    "other": "#6e7279",
    "rest": "#9db0c1",  # bars beside the one that matters
    # Of timelines: computing is blue to violet, exchanging red to brown, waiting grey.
    "backward": "#3d3a94",
    "weights": "#7b5cc4",
    "recompute": "#22808a",
    "tensor": "#bf3a5c",
    "message": "#b98500",
    "gather": "#7d3c10",
    "idle": "#d3dae2",
    "overhead": "#485563",
    "unexplained": "#c48f9f",
}
"""Token -> colour. Figures are drawn in these; no two are alike, so that SVG can name them again.

After Okabe and Ito's palette, which people with any common colour blindness can tell apart, darkened
until white text on each has a contrast of at least 4.5."""

DARK = {
    "ink": "#e8eaed",
    "muted": "#a3abb5",
    "grid": "#30363d",
    "paper": "#14171b",
    "label": "#101317",
    "computation": "#5ab4ec",
    "communication": "#f39a54",
    "data": "#3fc59b",
    "optimizer": "#e096c3",
    "other": "#a0a6ae",
    "rest": "#52616f",
    "backward": "#7f78f2",
    "weights": "#d9c6ff",
    "recompute": "#63c7d1",
    "tensor": "#ff8fa3",
    "message": "#d9b84a",
    "gather": "#c98f5e",
    "idle": "#333b44",
    "overhead": "#8793a1",
    "unexplained": "#8f5f6f",
}

_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "axes.edgecolor": LIGHT["grid"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["grid"],
    "ytick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": LIGHT["ink"],
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
}


class Size(enum.Enum):
    """Where a figure goes, by its width in inches: the page, half of it, or a phone.

    Shown at the width that it is made for, text has the same size in all."""

    WIDE = 7.2
    HALF = 5.2
    NARROW = 3.6


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn at any size; the caption says what to see."""

    name: str
    title: str
    caption: str
    draw: Callable[[Size], Figure]

    def figure(self, size: Size) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return self.draw(size)


def save_png(drawings: Iterable[Drawing], directory: Path) -> list[Path]:
    """Write `<name>.png` for each: light background, title above, 200 dots per inch."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings:
        path = directory / f"{drawing.name}.png"
        figure = drawing.figure(Size.WIDE)
        with matplotlib.rc_context(_STYLE):
            figure.suptitle(drawing.title, x=0.012, ha="left", size=11, weight="bold")
            figure.savefig(path, dpi=200, facecolor=LIGHT["paper"], metadata={"Software": None})
        paths.append(path)
    return paths


def to_svg(drawing: Drawing, size: Size) -> str:
    """The figure as an `<svg>` element to stand in the page.

    Colours are the page's CSS variables, text is text, ids are unique to drawing and size, and nothing
    outside is referred to.
    """
    prefix = f"{drawing.name}-{size.name.lower()}"
    buffer = io.StringIO()
    figure = drawing.figure(size)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": prefix}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\b(?:xlink:)?href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'font-family:[^;"]*', "font-family: var(--sans)", svg)
    for token, colour in LIGHT.items():
        svg = svg.replace(f": {colour}", f": var(--{token})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 stroke-linejoin="round"', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.strip()
