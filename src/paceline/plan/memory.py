"""What a worker of a layout holds at its worst moment.

That is in a backward pass, while what the forward pass has kept goes and gradients come. Beside these there are the
parameters, the optimizer's state, what every worker holds whatever the model, and what the way of splitting copies,
gathers or maps. Of several layouts that were tried it is known what they really held; what is missing is added to the
forecasts of all that split in that way (`corrections.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.plan.profile import Profile
from paceline.plan.stages import Stage
from paceline.plan.terms import Memory
from paceline.plan.ways import ways_of
from paceline.records import Layout

_LEAST_SHARE = 0.5
"""Of a forecast that is left, however much the tried layouts take off it."""


def worker_memory(
    profile: Profile, layout: Layout, mine: Sequence[Stage], *, stored: int, sharers: int
) -> Memory:
    """Of a worker with these stages.

    Args:
        stored: pairs of a stage and a micro-batch whose activations it has at the same time, at most.
        sharers: workers of its host with one copy of the parameters between them; 1: it has its own.
    """
    whole = sum(stage.parameter_bytes for stage in mine)
    trained = sum(stage.trained_bytes for stage in mine)
    largest = max(stage.largest_bytes for stage in mine)
    saved, gradients, temporary = _worst(layout, mine, stored)
    parameters, held, mapped = float(whole), float(trained), 0.0
    s = layout.dp_shard
    if s > 1:
        held = trained / s
        # A unit's gradients are copied end to end before they are reduced.
        temporary += min(trained, largest)
        gradients = float(trained) if layout.keeps_gradients else trained / s + min(trained, largest)
        if layout.zero_stage > 1:
            parameters = whole / s
            temporary += largest if layout.zero_stage == 3 else whole
    elif sharers > 1:
        # Each worker's gradients stay in memory that all map; a gradient is copied there as it comes.
        parameters, held = whole / sharers, trained / sharers
        gradients = float(trained)
        mapped = (sharers - 1) / sharers * (whole + trained)
    if layout.recompute == "full":
        samples = profile.batch_size / (layout.data_parallel * layout.micro)
        temporary = max(0.0, temporary + profile.recomputed_bytes * samples / (layout.tp * layout.pp))
    found = Memory(
        base=profile.base_bytes + (profile.splitting_bytes if layout.splits_model else 0),
        parameters=round(parameters),
        gradients=round(gradients),
        state=round(held * profile.state_per_byte),
        saved=round(saved),
        temporary=round(temporary),
        mapped=round(mapped) + profile.mapped_bytes,
    )
    more = sum(profile.unexplained_bytes.get(way, 0.0) for way in ways_of(layout))
    least = round(_LEAST_SHARE * found.own) - found.own
    return found.model_copy(update={"unexplained": max(round(more), least)})


def _worst(layout: Layout, mine: Sequence[Stage], stored: int) -> tuple[float, float, float]:
    """Bytes of what is saved, of gradients, and of temporaries."""
    heaviest = max(mine, key=lambda stage: stage.saved_bytes)
    temporary = max(stage.peak_bytes for stage in mine)
    saved, gradients, peak = max((stage.worst for stage in mine), key=sum)
    moments = [((stored - 1) * heaviest.saved_bytes + saved, gradients, peak)]
    if layout.micro > 1:
        # In its second backward pass a worker has all gradients, and maybe as much stored as before the first.
        still = stored if layout.micro > stored else stored - 1
        trained = sum(stage.trained_bytes for stage in mine)
        moments.append((still * heaviest.saved_bytes, float(trained), temporary))
    return max(moments, key=sum)
