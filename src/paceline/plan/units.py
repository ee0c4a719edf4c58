"""Quantities with their units, as people write them: `24 GiB`, `100 Gbit/s`, `1.5 us`, `312 TFLOP/s`."""

from __future__ import annotations

import re

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_BYTES = {f"{prefix}B": factor for prefix, factor in {**_DECIMAL, **_BINARY}.items()}

UNITS: dict[str, dict[str, float]] = {
    "bytes": _BYTES,
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9},
    "bytes per second": {
        **{f"{unit}/s": factor for unit, factor in _BYTES.items()},
        **{f"{prefix}bit/s": factor / 8 for prefix, factor in _DECIMAL.items()},
    },
    "operations per second": {f"{prefix}FLOP/s": factor for prefix, factor in _DECIMAL.items()},
}
"""What can be read, and for each the factor of each unit."""
EXAMPLES = {
    "bytes": "24 GiB",
    "seconds": "5 us",
    "bytes per second": "100 Gbit/s or 12.5 GB/s",
    "operations per second": "312 TFLOP/s",
}
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(\S+)\s*")


def read_quantity(text: object, what: str) -> float:
    """The value of a text such as `24 GiB` in bytes, seconds, bytes or floating-point operations per second.

    Args:
        what: a key of `UNITS`.

    Raises:
        ValueError: no text, no number, or a unit that is not one of these; the words say which.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no text with a unit")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no number with a unit")
    number, unit = match.groups()
    if unit not in UNITS[what]:
        raise ValueError(f"{text!r} has the unit {unit!r}, which is none of {what}")
    return float(number.replace("_", "")) * UNITS[what][unit]
