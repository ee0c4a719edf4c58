"""How workers that have nothing to do wait for rank 0: as long as it lives, however long that is."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

from paceline.comm.world import World
from paceline.errors import CollectiveError

_BEATS_IN_TIMEOUT = 10
_LONGEST_BEAT_S = 5.0
_POLL_S = 0.1
_PREFIX = "paceline/beacon"


class Beacon:
    """Rank 0 calls, others wait to be called; both through the launch's store, so that nobody who trains is held up.

    A thread of rank 0 writes a number every few seconds. Who waits gives up when it has stood still for the time-out of
    all waits, or when the store is gone. A wait asks the store ten times a second.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._num_calls = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        if world.size == 1:
            return
        # A connection of its own: a wait in another one would hold this one up.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        if world.rank == 0:
            self._thread = threading.Thread(target=self._beat, name="paceline-beacon", daemon=True)
            self._thread.start()

    def call(self, what: str) -> None:
        """On rank 0: end the wait of all others, and tell them what for."""
        self._num_calls += 1
        if self._store is not None:
            self._store.set(f"{_PREFIX}/call{self._num_calls}", what)

    def skip(self) -> None:
        """On others that did not wait, when rank 0 calls."""
        self._num_calls += 1

    def wait(self) -> str:
        """On others: what rank 0's next call says.

        Raises:
            CollectiveError: rank 0 is gone, or has been silent for longer than the time-out.
        """
        self._num_calls += 1
        key = f"{_PREFIX}/call{self._num_calls}"
        beat, since_s = b"", time.monotonic()
        try:
            while not self._store.check([key]):
                time.sleep(_POLL_S)
                now = self._store.get(f"{_PREFIX}/beat") if self._store.check([f"{_PREFIX}/beat"]) else b""
                if now != beat:
                    beat, since_s = now, time.monotonic()
                if time.monotonic() - since_s > self._world.timeout_s:
                    raise self._lost(f"rank 0 was silent for {self._world.timeout_s:.0f} s", timed_out=True)
            told: bytes = self._store.get(key)
        except RuntimeError as error:
            raise self._lost("rank 0, or the store of the run, is gone", timed_out=False) from error
        return told.decode()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        number = 0
        while True:
            number += 1
            try:
                self._store.set(f"{_PREFIX}/beat", str(number))
            except RuntimeError:
                return  # the store is gone: those who wait find that out
            if self._ended.wait(min(_LONGEST_BEAT_S, self._world.timeout_s / _BEATS_IN_TIMEOUT)):
                return

    def _lost(self, cause: str, *, timed_out: bool) -> CollectiveError:
        what = "waiting to be called to train"
        return CollectiveError(self._world.rank, what, timed_out=timed_out, cause=cause)
