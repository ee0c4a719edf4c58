"""Bytes that a layout sends over the network: what a host sends to others in a step.

The forecast itself counts them: played with workers that compute in no time, memory that carries in no time, and a
cable that takes a second for a byte, its seconds are bytes. What stages of a pipeline send is added up, as these
seconds overlap.
"""

from __future__ import annotations

from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.profile import Block, Costs, Division, LinkedCluster, Profile
from paceline.plan.schedules import make_schedule
from paceline.records import Layout

_NOTHING = Curve.line(0.0, 0.0)
_FREE = Link(name="none", latency_s=0.0, bytes_per_s=1e300)
_CABLE = Link(name="a byte a second", latency_s=0.0, bytes_per_s=1.0)


class Traffic:
    """The bytes of any layout of one job on one cluster."""

    def __init__(self, profile: Profile, linked: LinkedCluster) -> None:
        within = _FREE.model_copy(update={"name": linked.within.name})
        bare = LinkedCluster(
            cluster=linked.cluster, within=within, between=_CABLE if linked.between else None
        )
        self._cluster = linked.cluster
        self._forecaster = Forecaster(_without_seconds(profile), bare, cut_as=Forecaster(profile, linked))

    def sent_bytes(self, layout: Layout) -> float:
        """What the host that sends most sends to other hosts in a step, headers apart.

        Raises:
            LayoutError: the batch, the model or the cluster does not allow the layout.
        """
        terms = self._forecaster.forecast(layout).terms
        collectives = terms.compute_s + terms.gather_s + terms.gradients_s
        if layout.pp == 1:
            return collectives + terms.tensor_s
        return collectives + terms.tensor_s + self._sent_by_stages(layout)

    def _sent_by_stages(self, layout: Layout) -> float:
        """Forwards what crosses the cut after each stage, and its gradients back, where the next is on another host."""
        stages = self._forecaster.stages_of(layout)
        schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
        inner = layout.workers // layout.pp
        host_of = [at for at, host in enumerate(self._cluster.hosts) for _ in range(host.workers)]
        sent = [0.0] * len(self._cluster.hosts)
        for at, stage in enumerate(stages[:-1]):
            for place in range(inner):
                here, there = (host_of[schedule.worker_of(s) * inner + place] for s in (at, at + 1))
                if here != there:
                    sent[here] += layout.micro * stage.output_bytes
                    sent[there] += layout.micro * stage.output_bytes
        return max(sent)


def _without_seconds(profile: Profile) -> Profile:
    """The job on workers that take no time."""
    update = {"costs": tuple(map(_costs, profile.costs)), "corrections": (), "tried": ()}
    return profile.model_copy(update=update)


def _costs(costs: Costs) -> Costs:
    seconds = ("optimizer_s_per_byte", "add_s_per_byte", "fixed_s", "meeting_s")
    blocks = tuple(map(_block, costs.blocks))
    return costs.model_copy(update={"blocks": blocks, "data_s": _NOTHING, **dict.fromkeys(seconds, 0.0)})


def _block(block: Block) -> Block:
    update = _no_curves(block) | {"divisions": tuple(map(_division, block.divisions))}
    if block.forward_among_s is not None:
        update |= {"forward_among_s": _NOTHING, "backward_among_s": _NOTHING}
    return block.model_copy(update=update)


def _division(division: Division) -> Division:
    return division.model_copy(update=_no_curves(division))


def _no_curves(piece: Block | Division) -> dict[str, object]:
    return {"forward_s": _NOTHING, "backward_s": _NOTHING}
