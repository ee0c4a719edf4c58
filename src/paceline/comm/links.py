"""What pipeline stages send each other, within a worker and between workers."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch

from paceline.comm.group import Group, Pending

_KINDS = ("F", "B", "tied", "done")
_ROUNDS_AHEAD = 2
"""Micro-batches whose values and gradients are awaited ahead: of three that are under way one is computed."""


class StageLinks:
    """The links of one worker's stages: `kind` is `F` for values, `B` for gradients, `tied` for those of tied weights,
    `done` for a word that a micro-batch has come to the last stage.

    What one stage sends another of one kind arrives in the order in which it was sent. Sending does not wait.
    """

    def __init__(self, group: Group, worker_of: Callable[[int], int], num_stages: int) -> None:
        """
        Args:
            group: the workers of the pipeline.
            worker_of: the rank in `group` that has a stage.
        """
        self._group, self._worker_of, self._num_stages = group, worker_of, num_stages
        self._own: dict[tuple[str, int, int], collections.deque[torch.Tensor]] = collections.defaultdict(
            collections.deque
        )
        self._pending: list[Pending] = []
        self._earlier: collections.deque[list[Pending]] = collections.deque()

    def send(self, tensor: torch.Tensor, source: int, target: int, kind: str) -> None:
        """Begin to send the contiguous `tensor` from stage `source`, which is here, to stage `target`."""
        to = self._worker_of(target)
        if to == self._group.rank:
            self._own[kind, source, target].append(tensor)
            return
        what = _describe(kind, source, target)
        self._pending.append(self._group.start_send(tensor, to, what, self._channel(kind, source, target)))

    def receive(self, tensor: torch.Tensor, source: int, target: int, kind: str) -> torch.Tensor:
        """What comes next of this kind from stage `source` to stage `target`, which is here; it fills `tensor`."""
        where = self._worker_of(source)
        if where == self._group.rank:
            # The sender goes on with its own: in-place changes must not be seen there.
            return tensor.copy_(self._own[kind, source, target].popleft())
        what = _describe(kind, source, target)
        rounds = _ROUNDS_AHEAD if kind in ("F", "B") else 0
        self._group.receive_(tensor, where, what, self._channel(kind, source, target), rounds)
        return tensor

    def settle(self, keep: int) -> None:
        """Return when everything has left that was sent before the last `keep` calls: its memory can be used again."""
        self._earlier.append(self._pending)
        self._pending = []
        while len(self._earlier) > keep:
            _wait_for(self._earlier.popleft())

    def flush(self) -> None:
        """Return when everything sent has left."""
        while self._earlier:
            _wait_for(self._earlier.popleft())
        _wait_for(self._pending)
        self._pending.clear()

    def _channel(self, kind: str, source: int, target: int) -> int:
        return (_KINDS.index(kind) * self._num_stages + source) * self._num_stages + target


def _wait_for(sent: list[Pending]) -> None:
    for pending in sent:
        pending.wait()


def _describe(kind: str, source: int, target: int) -> str:
    noun = {
        "F": "activations",
        "B": "gradients",
        "tied": "gradients of tied weights",
        "done": "word of a micro-batch",
    }[kind]
    return f"{noun} from stage {source} to stage {target}"
