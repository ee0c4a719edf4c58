"""What ways of splitting cost beyond the sum of their parts, taken from a few steps of each that were timed.

Blocks, links and the optimizer are measured apart. Run together they cost more: a pipeline's worker runs the code
around its blocks for every action, sharding gathers and frees, caches are shared. So of each way of splitting some
layouts are tried, and what their steps take beyond their forecasts is added to the forecasts of all that split in that
way. Likewise what their workers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from paceline.plan.forecast import Forecaster
from paceline.plan.memory import held_as
from paceline.plan.places import Places
from paceline.plan.profile import (
    ALONE,
    GATHERED,
    PIPELINE,
    TENSOR,
    Correction,
    LinkedCluster,
    Profile,
    Tried,
)
from paceline.plan.schedules import SCHEDULES
from paceline.plan.ways import is_over_network, size_of, ways_of

_HALVINGS = 40
_Place = tuple[tuple[str, ...], int | None, bool, int | None]
"""Ways of splitting, among how many workers, whether over a network, and the threads of a process alone."""


def corrected(profile: Profile, linked: LinkedCluster, tried: Sequence[Tried]) -> Profile:
    """The profile with what was tried, and what that tells.

    Args:
        linked: the cluster on which the profile was measured and the layouts were tried.
        tried: layouts that split in one way, with one and with several micro-batches, pipelines with few and with many
            and one whose gradients of weights are actions of their own; and layouts that split in several ways.
    """
    nothing: dict[str, Any] = {"corrections": (), "unexplained_bytes": {}, "unexplained_evaluation_bytes": {}}
    bare = profile.model_copy(update={"tried": tuple(_without_rest(tried)), **nothing})
    places = Places(linked)
    groups: dict[_Place, list[Tried]] = {}
    for one in tried:
        ways = ways_of(one.layout)
        place: _Place = ways, None, False, one.layout.threads
        if ways != (ALONE,):
            place = ways, size_of(one.layout, ways), is_over_network(one.layout, ways, places), None
        groups.setdefault(place, []).append(one)
    corrections: list[Correction] = []
    action_s: float | None = None
    # Those of which several were tried come first: they tell what an action of a pipeline takes.
    for place, of_place in sorted(groups.items(), key=lambda item: not _tells_actions(item[1])):
        if place[0] == (PIPELINE,):
            corrections.append(_of_pipelines(bare, linked, place, of_place, action_s))
            action_s = corrections[-1].action_s if _tells_actions(of_place) else action_s
        elif len(place[0]) == 1:
            corrections.append(_of_a_step(bare, linked, place, of_place))
    each = bare.model_copy(update={"corrections": tuple(corrections)})
    # Those of which most were tried come first.
    several = sorted((item for item in groups.items() if len(item[0][0]) > 1), key=lambda item: -len(item[1]))
    known: dict[tuple[bool, bool], Correction] = {}
    for place, of_place in several:
        # Of pipelines whose data are split: what a further micro-batch takes more there.
        kind = PIPELINE in place[0] and TENSOR not in place[0], place[2]
        corrections.append(_of_a_step(each, linked, place, of_place, known.get(kind)))
        if _num_micro(of_place) > 1:
            known.setdefault(kind, corrections[-1])
    found = bare.model_copy(update={"corrections": tuple(corrections), **_bytes(bare, linked, tried)})
    told = Forecaster(found, linked)
    rests = (one.model_copy(update={"rest_s": one.step_s - told.on_the_lines_s(one.layout)}) for one in tried)
    return found.model_copy(update={"tried": tuple(rests)})


def _without_rest(tried: Iterable[Tried]) -> Iterator[Tried]:
    for one in tried:
        yield one.model_copy(update={"rest_s": 0.0})


def _bytes(profile: Profile, linked: LinkedCluster, tried: Iterable[Tried]) -> dict[str, dict[str, float]]:
    """What was held in steps and in evaluations, by way of splitting, from layouts that split in no other."""
    steps: dict[str, float] = {}
    evaluations: dict[str, float] = {}
    forecaster = Forecaster(profile, linked)
    for one in tried:
        ways = held_as(one.layout)
        if len(ways) != 1 or ways == (ALONE,):
            continue
        peaks_bytes = one.peak_bytes, one.evaluation_peak_bytes
        memories = forecaster.memories(one.layout)
        for found, peak_bytes, memory in zip((steps, evaluations), peaks_bytes, memories, strict=True):
            if peak_bytes is not None:
                more = peak_bytes - memory.total
                found[ways[0]] = max(more, found.get(ways[0], more))
    return {"unexplained_bytes": steps, "unexplained_evaluation_bytes": evaluations}


def _of_a_step(
    profile: Profile,
    linked: LinkedCluster,
    place: _Place,
    tried: Sequence[Tried],
    known: Correction | None = None,
) -> Correction:
    """A straight line through what layouts with one and with several micro-batches took beyond their forecasts.

    Where one was tried, its further micro-batches take what they do in pipelines that split otherwise, `known`; so do
    gradients of weights as actions of their own where none was tried.
    """
    ways, workers, over_network, threads = place
    forecaster = Forecaster(profile, linked)

    def missing_s(one: Tried) -> float:
        """In seconds of the device that was measured: slower hosts pay more."""
        return (one.step_s - forecaster.forecast(one.layout).step_s) * linked.slowest(one.layout.workers)

    in_whole = _in_whole(tried)
    in_parts = [one for one in tried if one not in in_whole]
    few, many = _ends(in_whole or in_parts)
    micro_s = 0.0
    if many.layout.micro > few.layout.micro:
        micro_s = (missing_s(many) - missing_s(few)) / (many.layout.micro - few.layout.micro)
        step_s = missing_s(few) - (few.layout.micro - 1) * micro_s
    elif ways in ((GATHERED,), (TENSOR,)):
        # Each micro-batch gathers, or exchanges, anew.
        step_s = micro_s = missing_s(few) / few.layout.micro
    elif known is not None and PIPELINE in ways and TENSOR not in ways:
        micro_s = known.micro_s
        step_s = missing_s(few) - (few.layout.micro - 1) * micro_s
    else:
        step_s = missing_s(few)
    found = Correction(
        ways=ways,
        workers=workers,
        over_network=over_network,
        threads=threads,
        step_s=step_s,
        micro_s=micro_s,
        micro=many.layout.micro,
    )
    if not in_whole or PIPELINE not in ways:
        return found
    if in_parts:
        return _in_parts_beside(profile, linked, found, in_parts)
    if TENSOR in ways or known is None or known.split_step_s is None:
        return found
    more_s = known.split_step_s - known.step_s
    return found.model_copy(update={"split_step_s": step_s + more_s, "split_micro_s": known.split_micro_s})


def _in_parts_beside(
    profile: Profile, linked: LinkedCluster, found: Correction, tried: Sequence[Tried]
) -> Correction:
    """What is found of pipelines beside another way with what those take whose gradients of weights are actions of
    their own: a straight line over their number, or so much for each micro-batch where one was tried."""
    told = Forecaster(profile.model_copy(update={"corrections": (*profile.corrections, found)}), linked)

    def more_s(one: Tried) -> float:
        return (one.step_s - told.forecast(one.layout).step_s) * linked.slowest(one.layout.workers)

    few, many = _ends(tried)
    split_micro_s = more_s(many) / many.layout.micro
    if many is not few:
        split_micro_s = (more_s(many) - more_s(few)) / (many.layout.micro - few.layout.micro)
    split_step_s = found.step_s + more_s(many) - many.layout.micro * split_micro_s
    return found.model_copy(update={"split_step_s": split_step_s, "split_micro_s": split_micro_s})


def _of_pipelines(
    profile: Profile,
    linked: LinkedCluster,
    place: _Place,
    tried: Sequence[Tried],
    known_action_s: float | None,
) -> Correction:
    """What each action of a pipeline takes beside its blocks, and each step beside that.

    Where one was tried, an action takes what it does in pipelines over another number of workers, `known_action_s`; if
    that is not known, all is each action's, unless a step took less than its forecast.
    """
    ways, workers, over_network, _ = place
    none = Correction(ways=ways, workers=workers, over_network=over_network)

    def missing_s(one: Tried, action_s: float) -> float:
        correction = none.model_copy(update={"action_s": action_s})
        told = Forecaster(profile.model_copy(update={"corrections": (correction,)}), linked)
        return one.step_s - told.forecast(one.layout).step_s

    in_whole = _in_whole(tried)
    in_parts = [one for one in tried if one not in in_whole]
    few, many = _ends(in_whole or in_parts)
    if few is many and known_action_s is not None:
        action_s = known_action_s
        step_s = missing_s(many, action_s)
    elif few is many:
        action_s = _root(lambda a: missing_s(many, a), many.step_s)
        step_s = 0.0 if action_s else missing_s(many, 0.0)
    else:
        action_s = _root(lambda a: missing_s(many, a) - missing_s(few, a), many.step_s)
        step_s = (missing_s(few, action_s) + missing_s(many, action_s)) / 2
    update: dict[str, float | int] = {
        "action_s": action_s,
        "step_s": step_s * linked.slowest(few.layout.workers),
    }
    if few is not many and step_s < 0 < missing_s(few, 0.0):
        # Many actions took more than their share, as where workers share cores: fewer do not take less than nothing.
        action_s = _root(lambda a: missing_s(few, a), few.step_s)
        update |= {"few_action_s": action_s, "few": few.layout.micro}
    found = none.model_copy(update=update)
    return _in_parts(profile, linked, found, in_parts) if in_parts and few not in in_parts else found


def _in_parts(
    profile: Profile, linked: LinkedCluster, found: Correction, tried: Sequence[Tried]
) -> Correction:
    """What is found of pipelines with what those take whose gradients of weights are actions of their own.

    Two of them tell what such an action takes; one cannot tell actions from steps.
    """
    few, many = _ends(tried)
    slowest = linked.slowest(few.layout.workers)

    def missing_s(one: Tried, weight_s: float | None) -> float:
        correction = found.model_copy(update={"weight_action_s": weight_s, "split_step_s": 0.0})
        told = Forecaster(profile.model_copy(update={"corrections": (correction,)}), linked)
        return one.step_s - told.forecast(one.layout).step_s

    weight_s = None
    if many is not few:
        weight_s = _root(lambda w: missing_s(many, w) - missing_s(few, w), many.step_s)
    step_s = missing_s(few, weight_s)
    if many is not few:
        step_s = (step_s + missing_s(many, weight_s)) / 2
    return found.model_copy(update={"weight_action_s": weight_s, "split_step_s": step_s * slowest})


def _num_micro(tried: Sequence[Tried]) -> int:
    """Of different numbers of micro-batches."""
    return len({one.layout.micro for one in tried})


def _in_whole(tried: Sequence[Tried]) -> list[Tried]:
    """Those whose backward pass is one action for each micro-batch."""
    return [one for one in tried if not SCHEDULES[one.layout.schedule].in_parts]


def _tells_actions(tried: Sequence[Tried]) -> bool:
    """Whether what a pipeline's actions take can be told from what its steps do."""
    return len({one.layout.micro for one in _in_whole(tried)}) > 1


def _ends(tried: Sequence[Tried]) -> tuple[Tried, Tried]:
    """Those with the fewest and with the most micro-batches."""
    few, many = (pick(tried, key=lambda one: one.layout.micro) for pick in (min, max))
    return few, many


def _root(missing_s: Callable[[float], float], most_s: float) -> float:
    """Where a falling function is nothing, between 0 and `most_s`; 0 where it is less from the beginning."""
    if missing_s(0.0) <= 0:
        return 0.0
    low, high = 0.0, most_s
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if missing_s(middle) > 0 else (low, middle)
    return (low + high) / 2
