"""What steps take beyond the sum of their terms, as layouts that were timed have shown (`corrections.py`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from paceline.plan.cutting import Cuts
from paceline.plan.places import Places
from paceline.plan.profile import GATHERED, PIPELINE, TENSOR, Correction, LinkedCluster, Profile
from paceline.plan.schedules import SCHEDULES
from paceline.plan.terms import Terms
from paceline.plan.ways import corrections_of, size_of, ways_of
from paceline.records import RECOMPUTE, Layout

_MOST_TAKEN_OFF = 0.5
"""Share of a forecast that what is unexplained may take off it, where the layout itself was not tried."""
_MOST_COMPUTATION_TAKEN_OFF = 0.1
"""The same of all in it but exchanges."""


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Of a pipeline: the same with fewer and with more micro-batches, which were both timed."""

    few: Layout
    many: Layout
    share: float
    """Of the way from few to many."""

    def chord_s(self, step_s: Callable[[Layout], float]) -> float:
        """What a step takes at most: less waiting is saved by each further micro-batch than by the one before it, and
        each takes as much as the others."""
        return (1 - self.share) * step_s(self.few) + self.share * step_s(self.many)


class Unexplained:
    """What is added to the forecasts of one job on one cluster."""

    def __init__(
        self, profile: Profile, linked: LinkedCluster, places: Places, cuts_of: Callable[[Layout], Cuts]
    ) -> None:
        """
        Args:
            cuts_of: where a pipeline is cut.
        """
        self._profile, self._linked, self._places, self._cuts_of = profile, linked, places, cuts_of
        self._tried_s = {one.layout: one.step_s for one in profile.tried}
        self._rest_s = {one.layout: one.rest_s for one in profile.tried}
        self._micro: dict[Any, list[int]] = {}
        """Micro-batches of layouts that were tried, by their workers, ways and stages of each worker."""
        for layout in self._tried_s:
            place = layout.workers, ways_of(layout), _stages_of_each(layout)
            self._micro.setdefault(place, []).append(layout.micro)
        self._pipelines: dict[Layout, list[Layout]] = {}
        """Those that were tried, by what they are with one micro-batch."""
        for layout in self._tried_s:
            if layout.pp > 1:
                self._pipelines.setdefault(layout.model_copy(update={"micro": 1}), []).append(layout)

    def was_tried(self, layout: Layout) -> bool:
        return layout in self._tried_s

    def step_s(self, layout: Layout, terms: Terms) -> float:
        """Seconds of a step with these terms and what is unexplained."""
        step_s = self.corrected_s(layout, terms.step_s)
        return step_s if self._is_like_what_was_tried(layout) else max(step_s, _kept_s(terms))

    def corrected_s(self, layout: Layout, step_s: float, *, is_bound: bool = False) -> float:
        """A step with what its ways of splitting took beyond the sum of the terms, when they were tried.

        Args:
            is_bound: the least that this is, however the layout is cut.
        """
        if not self._profile.corrections and not self._profile.tried:
            return step_s
        more_s = self.more_s(layout) + self._left_s(layout, is_bound=is_bound)
        # What was tried is believed; on other hosts and links, too, nothing takes no time.
        return max(step_s + more_s, min(step_s * (1 - _MOST_TAKEN_OFF), self._tried_s.get(layout, math.inf)))

    def more_s(self, layout: Layout) -> float:
        """What its ways of splitting add to its step, or take off it, by the lines through what was tried."""
        more_s = 0.0
        ways = ways_of(layout)
        for some in dict.fromkeys([*((way,) for way in ways), *([ways] if ways else [])]):
            for one, weight in self._corrections(layout, some):
                each_step_s = _step_of(one, layout)
                micro = layout.micro if one.micro_s > 0 else min(layout.micro, one.micro)
                if layout.pp > 1 and len(some) == 1 and some not in ((GATHERED,), (TENSOR,)):
                    # What micro-batches take in a pipeline its actions tell.
                    micro = 1
                found_s = each_step_s + (micro - 1) * one.micro_s
                if SCHEDULES[layout.schedule].in_parts:
                    more_micro = layout.micro if one.split_micro_s > 0 else min(layout.micro, one.micro)
                    found_s += more_micro * one.split_micro_s
                if found_s < 0 and one.workers and (weight > 1 or size_of(layout, some) < layout.workers):
                    # What few did not wait for passed while they computed; each of more computes as much less.
                    weight = min(weight, 1.0, one.workers / layout.workers)
                more_s += found_s * weight
        return more_s / self._linked.slowest(layout.workers)

    def _left_s(self, layout: Layout, *, is_bound: bool) -> float:
        """What corrections leave of this layout, if it was tried; between two that were, on a straight line, or as of
        the one of them that is cut as it is; of a pipeline of fewer micro-batches, or more, as of the next that was.
        With something computed again, as without."""
        like = layout.model_copy(update={"recompute": RECOMPUTE[0]})
        between = self.between(like)
        if between is None:
            there = self._pipelines.get(like.model_copy(update={"micro": 1}), [like])
            return self._rest_s.get(min(there, key=lambda one: abs(one.micro - like.micro)), 0.0)
        few_s, many_s = self._rest_s[between.few], self._rest_s[between.many]
        if is_bound:
            return min(few_s, many_s)
        is_few, is_many = (self._cuts_of(x) == self._cuts_of(layout) for x in (between.few, between.many))
        if is_few != is_many:
            return few_s if is_few else many_s
        return few_s + (many_s - few_s) * between.share

    def least_s(self, layout: Layout) -> float:
        """What a layout without a pipeline takes at least that was not tried: as long as in fewer micro-batches, which
        were, with nothing computed again. What small batches seem to take less by themselves is noise, or what blocks
        leave in caches."""
        if layout.pp > 1 or layout in self._tried_s:
            return 0.0
        like = layout.model_copy(update={"recompute": RECOMPUTE[0]})
        fewer = (like.model_copy(update={"micro": micro}) for micro in range(1, layout.micro))
        return min((self._tried_s[one] for one in fewer if one in self._tried_s), default=0.0)

    def actions_s(self, layout: Layout) -> tuple[float, float]:
        """What actions of a pipeline take beside their blocks, on the device that was measured: forward and backward
        passes, and gradients of weights where these are actions of their own."""
        action_s = weight_s = 0.0
        for one, weight in self._corrections(layout, (PIPELINE,)):
            each_s = one.few_action_s if _is_of_few(one, layout) else one.action_s
            action_s += (each_s or 0.0) * weight
            weight_s += _weight_action_s(one, each_s or 0.0) * weight
        return action_s, weight_s * SCHEDULES[layout.schedule].in_parts

    def neighbours(self, layout: Layout) -> Neighbours | None:
        """None where it was timed itself, or not both fewer and more micro-batches were, or not all are cut alike."""
        between = self.between(layout)
        if between is None or len({self._cuts_of(x) for x in (layout, between.few, between.many)}) > 1:
            return None
        return between

    def between(self, layout: Layout) -> Neighbours | None:
        """The same, however they are cut."""
        if layout.pp == 1 or not self._pipelines or layout in self._tried_s:
            return None
        there = self._pipelines.get(layout.model_copy(update={"micro": 1}), ())
        few = max((x for x in there if x.micro < layout.micro), key=_micro, default=None)
        many = min((x for x in there if x.micro > layout.micro), key=_micro, default=None)
        if few is None or many is None:
            return None
        return Neighbours(few, many, (layout.micro - few.micro) / (many.micro - few.micro))

    def _is_like_what_was_tried(self, layout: Layout) -> bool:
        """Whether it was, or others that split in the same one way over as many workers, each of as many stages, in as
        many micro-batches, or some in fewer and some in more."""
        ways = ways_of(layout)
        tried = self._micro.get((layout.workers, ways, _stages_of_each(layout))) if len(ways) == 1 else None
        return layout in self._tried_s or (tried is not None and min(tried) <= layout.micro <= max(tried))

    def _corrections(self, layout: Layout, ways: tuple[str, ...]) -> list[tuple[Correction, float]]:
        return corrections_of(self._profile.corrections, layout, ways, self._places)


def _kept_s(terms: Terms) -> float:
    """What a step takes at least, whatever layouts that were tried took less than their terms.

    Nearly all of that was waiting: exchanges measured by themselves meet in other ways within a step. This layout
    may have less of it.
    """
    exchanging_s = terms.gather_s + terms.gradients_s + terms.messages_s + terms.tensor_s
    return (1 - _MOST_COMPUTATION_TAKEN_OFF) * (terms.step_s - exchanging_s)


def _step_of(one: Correction, layout: Layout) -> float:
    """What a correction adds to a step of one micro-batch; of a pipeline to one of any number."""
    in_parts = SCHEDULES[layout.schedule].in_parts and one.split_step_s is not None
    if one.few_action_s is None:
        return (one.split_step_s or 0.0) if in_parts else one.step_s
    # Where actions cost more from some number on, a step is that much shorter, so that both lines meet there. With
    # a third action for two it is so by as much more.
    meets_s = 0.0 if _is_of_few(one, layout) else one.step_s
    if not in_parts:
        return meets_s
    if one.weight_action_s is None and one.action_s:
        meets_s *= (2 + _weight_action_s(one, one.action_s) / one.action_s) / 2
    return (one.split_step_s or 0.0) + meets_s


def _weight_action_s(one: Correction, action_s: float) -> float:
    """What an action of gradients of weights takes beside its blocks, where others take `action_s`.

    Over a network that is what sending takes, and these send nothing.
    """
    if one.weight_action_s is not None:
        return one.weight_action_s
    return 0.0 if one.over_network else action_s


def _is_of_few(one: Correction, layout: Layout) -> bool:
    """Whether a pipeline has so few micro-batches that its actions take what they took in the one that had fewest."""
    return one.few_action_s is not None and layout.micro <= one.few


def _stages_of_each(layout: Layout) -> int:
    """Of a pipeline's workers; 1 without one."""
    return layout.stages or SCHEDULES[layout.schedule].default_stages if layout.pp > 1 else 1


def _micro(layout: Layout) -> int:
    return layout.micro
