"""What several figures have in common."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paceline.report.theme import LIGHT

_SPACING = {"borderpad": 0.2, "handlelength": 1.1, "handletextpad": 0.5, "columnspacing": 1.2}


def legend(axes: Axes, columns: int = 2) -> None:
    """Of one axes, above them."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, **_SPACING)


def legend_below(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """Of a whole figure, below it."""
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, borderaxespad=0.4, **_SPACING)


def error_bars(axes: Axes, x: Sequence[float], y: Sequence[float], errors: Sequence[float]) -> None:
    """Of points that are drawn already; none where there is no error. They end above 0, as axes may be logarithmic."""
    there = [at for at, error in enumerate(errors) if error > 0]
    if not there:
        return
    places = [x[at] for at in there]
    low, high = [max(y[at] - errors[at], 0.05 * y[at]) for at in there], [y[at] + errors[at] for at in there]
    axes.vlines(places, low, high, color=LIGHT["muted"], linewidth=1.0, zorder=1.9)
    axes.plot(
        [*places, *places], [*low, *high], color=LIGHT["muted"], linestyle="none", marker="_", markersize=6,
        markerfacecolor=LIGHT["muted"], markeredgecolor=LIGHT["muted"], zorder=1.9,
    )  # fmt: skip


def time_unit(longest_s: float) -> tuple[float, str]:
    """The unit to draw times up to `longest_s` in: seconds per unit, and its name."""
    for scale, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if longest_s >= 3 * scale:
            return scale, unit
    return (1.0, "s") if longest_s >= 0.9995 else (1e-3, "ms") if longest_s >= 0.9995e-3 else (1e-6, "µs")
