"""What several figures have in common."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SPACING = {"borderpad": 0.2, "handlelength": 1.1, "handletextpad": 0.5, "columnspacing": 1.2}


def legend(axes: Axes, columns: int = 2) -> None:
    """Of one axes, above them."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, **_SPACING)


def legend_below(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """Of a whole figure, below it."""
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, borderaxespad=0.4, **_SPACING)


def time_unit(longest_s: float) -> tuple[float, str]:
    """The unit to draw times up to `longest_s` in: seconds per unit, and its name."""
    for scale, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if longest_s >= 3 * scale:
            return scale, unit
    return (1.0, "s") if longest_s >= 0.9995 else (1e-3, "ms") if longest_s >= 0.9995e-3 else (1e-6, "µs")
