"""Interleaved 1F1B."""

from __future__ import annotations

from typing import ClassVar

from paceline.plan.schedules.base import Action, Schedule


class Interleaved(Schedule):
    """1F1B over several stages a worker, p micro-batches at a time (Narayanan et al. 2021).

    With v stages a worker and m a multiple of p, the idle share of the ideal time is (p − 1) / (v · m), and worker r
    stores at most 2 (p − r − 1) + (v − 1) p + 1 micro-batches of one stage each, of v · m.

    The published order asks for a multiple of p. Any other m takes the order of the next multiple without the
    micro-batches that are not there: nobody waits longer or stores more than with them. A round that is not full idles,
    so a multiple of p uses the workers best.
    """

    name: ClassVar[str] = "interleaved"
    default_stages: ClassVar[int] = 2
    most_stages: ClassVar[int | None] = None

    def actions(self, worker: int) -> list[Action]:
        stages = self.stages_of(worker)
        forwards, backwards = self._rounds("F", stages), self._rounds("B", stages[::-1])
        warm_up = 2 * (self.pp - worker - 1) + (self.stages_per_worker - 1) * self.pp
        warm_up = min(warm_up, len(forwards))
        order = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            order += [forward, backward]
        order += backwards[len(forwards) - warm_up :]
        return [action for action in order if action.micro < self.num_micro]

    def _rounds(self, kind: str, stages: list[int]) -> list[Action]:
        """Passes through `stages`, p micro-batches at a time; the last round as if it were full."""
        return [
            Action(kind, stage, micro)
            for begin in range(0, self.num_micro, self.pp)
            for stage in stages
            for micro in range(begin, begin + self.pp)
        ]
