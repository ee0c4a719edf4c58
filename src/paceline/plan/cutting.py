"""Where a layout's pipeline is cut into stages: where its step is fastest, of what fits.

How long layouts took that were tried has no part in it. A layout is cut to be tried before anything is known of that,
and is to be cut so afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paceline.plan.cuts import partitions, uneven
from paceline.plan.room import room_bytes
from paceline.plan.schedules import SCHEDULES
from paceline.records import RECOMPUTE, Layout

if TYPE_CHECKING:
    from paceline.plan.forecast import Forecaster

REVISION = 2
"""Of how pipelines are cut: what was tried while a job was measured was cut so."""
Cuts = tuple[int, ...]
"""Of each stage its first piece, and their number. What follows the last piece, as the loss, is none of its own."""


class Cutting:
    """The cuts of one forecaster's layouts. What several have in common is found once."""

    def __init__(self, forecaster: Forecaster, memory_bytes: int | None) -> None:
        """
        Args:
            memory_bytes: what a worker has; None: its share of its host's memory.
        """
        self._forecaster, self._memory_bytes = forecaster, memory_bytes
        self._ways: dict[Any, list[Cuts]] = {}
        self._free: dict[Layout, Cuts] = {}
        self._found: dict[Layout, Cuts] = {}

    def of(self, layout: Layout) -> Cuts:
        """The quickest that fits; of none that does, the one that lacks least."""
        if layout not in self._found:
            self._found[layout] = self.freely(layout) if layout.pp == 1 else self._with_room(layout)
        return self._found[layout]

    def freely(self, layout: Layout) -> Cuts:
        """The quickest, as if memory had no end."""
        if layout not in self._free:
            self._free[layout] = self._quickest(layout, self._ways_of(layout))
        return self._free[layout]

    def all_of(self, layout: Layout) -> set[Cuts]:
        """All that may be taken, whatever memory there is and whatever of its activations is computed again."""
        again = RECOMPUTE[: 1 if SCHEDULES[layout.schedule].in_parts or layout.pp == 1 else None]
        some = (layout.model_copy(update={"recompute": one}) for one in again)
        return {cuts for one in some for cuts in self._ways_of(one)}

    def _with_room(self, layout: Layout) -> Cuts:
        ways = self._ways_of(layout)
        lacking = {cuts: self._lacking_bytes(layout, cuts) for cuts in ways}
        fit = [cuts for cuts in ways if lacking[cuts] <= 0]
        if fit:
            return self.freely(layout) if len(fit) == len(ways) else self._quickest(layout, fit)
        return min(ways, key=lambda cuts: lacking[cuts])

    def _ways_of(self, layout: Layout) -> list[Cuts]:
        """Whatever the links: the least of some sums, of which none grows with a faster link, does not either."""
        forecaster = self._forecaster
        speeds = forecaster.speeds_of_stages(layout)
        key = forecaster.kind_of_row(layout), speeds
        if key not in self._ways:
            busy_s = self._of_pieces(layout, [p.busy_s - p.tensor_s for p in forecaster.row(layout)])
            samples, sends = forecaster.micro_samples(layout), forecaster.costs_of(layout).sends_bytes
            sent = [num_bytes * samples for num_bytes in sends[: len(busy_s)]]
            ways = partitions(busy_s, len(speeds), sends=sent, speeds=uneven(speeds))
            self._ways[key] = [tuple(cuts) for cuts in ways]
        return self._ways[key]

    def _quickest(self, layout: Layout, ways: Sequence[Cuts]) -> Cuts:
        if len(ways) == 1:
            return ways[0]
        return min(ways, key=lambda cuts: self._forecaster.bare_s(layout, cuts))

    def _of_pieces(self, layout: Layout, of_blocks: Sequence[float]) -> list[float]:
        """With what follows the last piece as a part of that."""
        last = self._forecaster.costs_of(layout).most_stages - 1
        return [*of_blocks[:last], sum(of_blocks[last:])]

    def _lacking_bytes(self, layout: Layout, cuts: Cuts) -> int:
        """How much less memory a worker has than it needs where the model is cut so."""
        room = room_bytes(self._forecaster.linked, layout, self._memory_bytes)
        if self._memory_bytes is None:
            return self._forecaster.needed_bytes(layout, cuts) - room
        return max(memory.own for memory in self._forecaster.memories(layout, cuts)) - room
