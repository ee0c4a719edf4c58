"""A table of a TOML file that a user wrote, read key by key: whatever is wrong with it is said with its place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from paceline.errors import ClusterError
from paceline.plan.units import EXAMPLES, read_quantity


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three names that a wrong one may have meant: those that begin like it, then those spelled like it."""
    known = list(names)
    begin = [n for n in known if name and n.startswith(name.lower())]
    begin += [n for n in known if n and name.lower().startswith(n)]
    close = difflib.get_close_matches(name.lower(), known, n=3)
    return list(dict.fromkeys(begin + close))[:3]


class Table:
    """One table; its keys are checked when it is made."""

    def __init__(self, values: object, file: Path, place: str, keys: Iterable[str]) -> None:
        """
        Args:
            place: what to call the table in an error, such as `hosts[0]`; empty for the whole file.
            keys: those that it may have.

        Raises:
            ClusterError: it is no table, or has another key.
        """
        self.file, self.place = file, place
        if not isinstance(values, dict):
            self.fail(f"{place} is {values!r}", "no table", f"write it as {{ {next(iter(keys))} = … }}")
        self._values: dict[str, Any] = values
        known = list(keys)
        for key in values:
            if key not in known:
                near = nearest(key, known)
                self.fail(
                    f"{self._name(key)} is no key",
                    f"perhaps {near[0]!r} was meant" if near else "",
                    f"keys here are {', '.join(known)}",
                )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """A text that is not empty."""
        value = self._value(key, default, 'a text, as in name = "node"')
        if not isinstance(value, str) or not value.strip():
            self.fail(f"{self._name(key)} is {value!r}", "no text", f'write {key} = "…"')
        return str(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._value(key, default, f"a whole number, as in {key} = 8")
        if type(value) is not int or value < 1:
            self.fail(
                f"{self._name(key)} is {value!r}", "", f"give a whole number of at least 1, as in {key} = 8"
            )
        return int(value)

    def factor(self, key: str, default: float | None = None, *, most: float | None = None) -> float:
        """A number above 0, and up to `most`."""
        value = self._value(key, default, f"a number above 0, as in {key} = 0.7")
        ok = type(value) in (int, float) and 0 < value < float("inf") and (most is None or value <= most)
        if not ok:
            bounds = "above 0" if most is None else f"above 0, and at most {most:g}"
            self.fail(f"{self._name(key)} is {value!r}", "", f"give a number {bounds}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            self.fail(f"{self._name(key)} is {value!r}", "", f"write {key} = true, or leave it out")
        return bool(value)

    def quantity(self, key: str, what: str, *, least: float | None = None) -> float:
        """A number with a unit, above 0, or at least `least`. `what` is a key of `units.UNITS`."""
        example = f'{key} = "{EXAMPLES[what].split(" or ")[0]}"'
        value = self._value(key, None, f"a number with a unit of {what}: {example}")
        try:
            found = read_quantity(value, what)
        except ValueError as error:
            self.fail(f"{self._name(key)}: {error}", "", f"give {what}, such as {EXAMPLES[what]}")
        if found < (least or 0) or (least is None and found == 0):
            self.fail(f"{self._name(key)} is {value!r}", "", f"give more than nothing, as in {example}")
        return found

    def raw(self, key: str) -> Any:
        return self._values.get(key)

    def fail(self, what: str, cause: str, next_step: str) -> NoReturn:
        """
        Raises:
            ClusterError: always.
        """
        raise ClusterError(f"{self.file}: {what}", cause=cause, next_step=next_step)

    def _value(self, key: str, default: object, wanted: str) -> Any:
        if key in self._values:
            return self._values[key]
        if default is None:
            self.fail(f"{self._name(key)} is missing", "", f"give {wanted}")
        return default

    def _name(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key
