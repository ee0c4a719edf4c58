"""Numbers in words: the same way in the terminal, in the figures and on the page."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Four significant digits; thousands are grouped: `0.6124`, `12,345`."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 and not float(value).is_integer():
        return f"{value:.3e}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}"


def count(value: int) -> str:
    return f"{value:,}"


def seconds(value: float) -> str:
    """A duration in the unit that fits: `240 ms`, `3.42 s`, `3 min 12 s`, `2 h 5 min`."""
    if not math.isfinite(value):
        return number(value)
    if value <= 0:
        return "0 s"
    if value < 0.9995e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms"
    if value < 59.95:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def percent(share: float) -> str:
    """A share of one as `9 %`; below one percent with one decimal."""
    if not math.isfinite(share):
        return number(share)
    if 0 < abs(share) < 0.0095:
        return f"{share * 100:.1f} %"
    return f"{share * 100:.0f} %"


def signed_percent(share: float) -> str:
    sign = "+" if share > 0 else "−" if share < 0 else "±"
    return sign + percent(abs(share))


def times(factor: float) -> str:
    """A speed-up: `1.71×`."""
    return f"{factor:.2f}×"


def column(values: list[float]) -> list[str]:
    """Numbers for one column of a table: the same decimals in all, four significant digits in the largest."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if not 1e-3 <= largest < 1e7:
        return [number(value) for value in values]
    decimals = max(0, 3 - math.floor(math.log10(largest)))
    return [f"{value:,.{decimals}f}" if math.isfinite(value) else number(value) for value in values]


def size(num_bytes: float) -> str:
    """`812 MiB`, `3.4 GiB`: powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:,.0f} {unit}" if num_bytes >= 100 or unit == "bytes" else f"{num_bytes:.3g} {unit}"


def plural(amount: int, noun: str) -> str:
    """`1 step`, `12 steps`."""
    return f"{count(amount)} {noun}{'' if amount == 1 else 's'}"


def join(words: list[str]) -> str:
    """`a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def metrics(values: dict[str, float]) -> str:
    """`loss 1.23, accuracy 0.61`."""
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())


def shorten(text: str, most: int) -> str:
    """At most `most` characters, the last an ellipsis where some are left out."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
