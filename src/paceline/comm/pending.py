"""Operations under way, and how their failures are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from paceline.errors import CollectiveError


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None: ...


class Done:
    """Nothing is left to wait for."""

    def wait(self) -> None:
        return


class Patience:
    """Who waits, how long at most, and how long altogether."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        """
        Args:
            rank: in the world, for messages.
        """
        self.rank, self.timeout_s = rank, timeout_s
        self.waited_s = 0.0
        self._num_operations = 0

    def name(self, operation: str, tensor: torch.Tensor) -> str:
        """What an operation is called in errors; each has a number."""
        self._num_operations += 1
        return f"{operation} ({_size(tensor)}, operation {self._num_operations})"

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add what is done within to `waited_s`."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - begin_s

    @contextmanager
    def translated(self, name: str, other: str = "another worker") -> Iterator[None]:
        """Turn torch.distributed's errors into one that names the rank and the operation; counted."""
        with self.counted():
            try:
                yield
            except CollectiveError:
                raise
            except RuntimeError as error:
                words = str(error).strip().splitlines()
                first = words[0] if words else type(error).__name__
                timed_out = "timed out" in first.lower() or "timeout" in first.lower()
                cause = (
                    f"{other} did not answer within {self.timeout_s:.0f} s"
                    if timed_out
                    else f"{other} is gone or its connection broke ({first[:200]})"
                )
                raise CollectiveError(self.rank, name, timed_out=timed_out, cause=cause) from error


class Work:
    """Works of torch.distributed, and what is to be done when they are."""

    def __init__(
        self,
        patience: Patience,
        name: str,
        works: Sequence[Any],
        finish: Callable[[], object] | None = None,
        other: str = "another worker",
    ) -> None:
        self._patience, self._name, self._works, self._other = patience, name, works, other
        self._finish = finish

    def wait(self) -> None:
        with self._patience.translated(self._name, self._other):
            for work in self._works:
                work.wait()
            if self._finish is not None:
                self._finish()


def _size(tensor: torch.Tensor) -> str:
    num_bytes = float(tensor.numel() * tensor.element_size())
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
