"""What to do: which layout on how many workers, what limits it, and what would help, found by forecasting that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from paceline.errors import LayoutError
from paceline.plan.curves import Curve
from paceline.plan.explain import limited_by
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.profile import LinkedCluster, Profile
from paceline.plan.scaling import ScalingCurve
from paceline.plan.search import Found, search
from paceline.plan.terms import Forecast
from paceline.records import Layout, Record

LEAST_GAIN = 0.02
"""Share from which on a change, or a loss, is worth a word."""
FASTER_PROCESSORS = "processors twice as fast"


class Change(Record):
    """Something else than there is, and what would come of it."""

    what: str
    """In words, to follow `what would help:`."""
    factor: float
    """Samples a second, over those of the plan."""
    layout: Layout
    """Which would then be the fastest."""


class Advice(Record):
    """What to do with a plan."""

    sentences: tuple[str, ...]
    changes: tuple[Change, ...]
    """What was tried, the most helpful first."""


def advise(
    forecaster: Forecaster,
    found: Found,
    curve: ScalingCurve,
    lost: Sequence[dict[str, float]],
    *,
    memory_bytes: int | None = None,
) -> Advice:
    """Three or four sentences, and the changes that they rest on.

    Args:
        lost: of each point of the curve, as `paceline.plan.losses` tells.
        memory_bytes: what a worker may use, as in `search`.
    """
    best = found.fastest[0]
    changes = sorted(
        _forecast_changes(forecaster, found, memory_bytes), key=lambda change: change.factor, reverse=True
    )
    sentences = [
        *_which(best, curve, forecaster.linked.cluster.workers),
        _limit(best, curve, lost),
        _help(best, changes),
    ]
    return Advice(sentences=tuple(sentences), changes=tuple(changes))


def _which(best: Forecast, curve: ScalingCurve, available: int) -> list[str]:
    used = best.layout.workers
    first = curve.points[0]
    text = f"Train with {best.layout}"
    text += f": {_workers(used)}" if used == available else f": {used} of {available} workers"
    text += f", {best.samples_per_s:.4g} samples a second"
    if used > first.workers:
        gain = best.samples_per_s / first.forecast.samples_per_s
        text += f", {gain:.2f}× what {_workers(first.workers)} would reach"
    if used < available:
        is_slower = any(point.workers > used for point in curve.points)
        text += "; more workers would be slower" if is_slower else "; no layout that fits uses more"
    text += "."
    knee = next(point for point in curve.points if point.workers == curve.knee)
    if knee.workers >= used:
        return [text]
    share = knee.forecast.samples_per_s / best.samples_per_s
    return [
        text,
        f"Where workers cost something, take {knee.workers}: that gives {_percent(share)} of the speed.",
    ]


def _limit(best: Forecast, curve: ScalingCurve, lost: Sequence[dict[str, float]]) -> str:
    """Of several workers what eats the ideal, of the fewest what their step is made of."""
    for point, causes in zip(curve.points, lost, strict=True):
        if point.workers != best.layout.workers or point is curve.points[0]:
            continue
        eaten = sorted(causes.items(), key=lambda item: item[1], reverse=True)
        told = [f"{_percent(share)} to {cause}" for cause, share in eaten[:2] if share >= LEAST_GAIN]
        lost_to = " and ".join(told) or "little to anything"
        return f"{_percent(point.efficiency)} of its workers' time brings speed-up; it loses {lost_to}."
    what = limited_by(best)
    if what == "computation":
        return f"Computation takes {_percent(best.terms.compute_s / best.step_s)} of the step."
    most_s = max(getattr(best.terms, name) for name in type(best.terms).model_fields if name != "compute_s")
    return f"Beside computation most of the step goes to {what}: {_percent(most_s / best.step_s)}."


def _help(best: Forecast, changes: Sequence[Change]) -> str:
    """What would help, faster processors last: they help nearly always, and are what the others are compared with."""
    others = [change for change in changes if change.what != FASTER_PROCESSORS]
    useful = [change for change in others if change.factor >= 1 + LEAST_GAIN]
    if useful:
        first = useful[0]
        text = f"What would help most: {first.what}, {first.factor:.2f}× the samples a second"
        text += f" with {first.layout}" if first.layout != best.layout else ""
        text += f"; next, {useful[1].what}, {useful[1].factor:.2f}×" if len(useful) > 1 else ""
    elif others:
        text = f"Less than {_percent(LEAST_GAIN)} more would come of {' or of '.join(c.what for c in others)}"
    else:
        text = "What would help"
    processors = [f"{c.what}, {c.factor:.2f}×" for c in changes if c.what == FASTER_PROCESSORS]
    return ("; " if others else ": ").join([text, *processors]) + "."


def _forecast_changes(forecaster: Forecaster, found: Found, memory_bytes: int | None) -> Iterator[Change]:
    """Each change alone, with the layout that is then the fastest."""
    profile, linked = forecaster.profile, forecaster.linked
    best = found.fastest[0]
    for case in _cases(profile, linked, found, memory_bytes):
        try:
            changed = Forecaster(case.profile, case.linked, memory_bytes=case.memory_bytes)
            (then,) = search(changed, number=1, memory_bytes=case.memory_bytes).fastest
        except LayoutError:
            continue  # such as a batch that does not fit
        yield Change(what=case.what, factor=then.samples_per_s / best.samples_per_s, layout=then.layout)


@dataclasses.dataclass(frozen=True)
class _Case:
    what: str
    profile: Profile
    linked: LinkedCluster
    memory_bytes: int | None


def _cases(
    profile: Profile, linked: LinkedCluster, found: Found, memory_bytes: int | None
) -> Iterator[_Case]:
    """What could be otherwise: only what the job and the cluster have."""

    def case(what: str, **changes: object) -> _Case:
        return dataclasses.replace(_Case(what, profile, linked, memory_bytes), **changes)  # type: ignore[arg-type]

    doubled = profile.batch_size * 2
    yield case(
        f"a batch of {doubled} samples, where the training allows it",
        profile=profile.model_copy(update={"batch_size": doubled}),
    )
    speeds = tuple(2 * speed for speed in linked.speeds or (1.0,) * len(linked.cluster.hosts))
    yield case(FASTER_PROCESSORS, linked=linked.model_copy(update={"speeds": speeds}))
    if linked.cluster.workers > 1 and linked.per_host > 1:
        faster = {
            "within": _twice_as_fast(linked.within),
            "within_of": tuple(map(_twice_as_fast, linked.within_of)),
        }
        name = _names(linked.within_of or (linked.within,))
        yield case(f"exchanges within a host ({name}) twice as fast", linked=linked.model_copy(update=faster))
    if linked.between is not None:
        faster = {
            "between": _twice_as_fast(linked.between),
            "between_of": tuple(map(_twice_as_fast, linked.between_of)),
        }
        name = _names(linked.between_of or (linked.between,))
        yield case(f"a link between hosts ({name}) twice as fast", linked=linked.model_copy(update=faster))
        hosts = linked.cluster.hosts
        more = linked.model_copy(
            update={
                "cluster": linked.cluster.model_copy(update={"hosts": (*hosts, *hosts)}),
                "speeds": (*linked.speeds, *linked.speeds),
                "within_of": (*linked.within_of, *linked.within_of),
                "between_of": (*linked.between_of, *linked.between_of),
            }
        )
        yield case("twice as many hosts", linked=more)
    if found.smallest is not None:
        if memory_bytes is not None:
            yield case("twice the memory", memory_bytes=2 * memory_bytes)
        else:
            cluster = linked.cluster
            twice = (h.model_copy(update={"memory_bytes": 2 * h.memory_bytes}) for h in cluster.hosts)
            larger = cluster.model_copy(update={"hosts": tuple(twice)})
            yield case("twice the memory", linked=linked.model_copy(update={"cluster": larger}))


def _names(links: Sequence[Link]) -> str:
    return ", ".join(dict.fromkeys(link.name for link in links))


def _twice_as_fast(link: Link) -> Link:
    measured = tuple(
        one.model_copy(update={"seconds": Curve(points=tuple((x, y / 2) for x, y in one.seconds.points))})
        for one in link.measured
    )
    return link.model_copy(
        update={"latency_s": link.latency_s / 2, "bytes_per_s": link.bytes_per_s * 2, "measured": measured}
    )


def _workers(number: int) -> str:
    return f"{number} worker{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"
