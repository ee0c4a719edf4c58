"""What a worker of a layout holds at its worst moment.

That is in a backward pass, while what the forward pass has kept goes and gradients come; or in an evaluation, which may
take more samples at a time. Beside these there are the parameters, the optimizer's state, what every worker holds
whatever the model, and what the way of splitting copies, gathers or maps. Of several layouts that were tried it is
known what they really held in steps and in an evaluation; what is missing is added to the forecasts of all that split
in that way (`corrections.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from paceline.plan.profile import PIPELINE, Profile
from paceline.plan.schedules import SCHEDULES
from paceline.plan.stages import Stage
from paceline.plan.terms import Memory
from paceline.plan.ways import ways_of
from paceline.records import Layout

WEIGHTS_APART = "pipeline, gradients of weights apart"
_LEAST_SHARE = 0.5
"""Of a forecast that is left, however much the tried layouts take off it."""


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Bytes that are there from step to step, and what comes for a moment whenever a block is computed."""

    parameters: float
    state: float
    shared_gradients: float
    """In memory that the workers of a host map: they stay there when they have been used."""
    mapped: float
    gathered: float
    """Parameters of others, while they are used."""


def training_memory(
    profile: Profile, layout: Layout, mine: Sequence[Stage], *, stored: int, sharers: int
) -> Memory:
    """Of a worker with these stages, in its steps.

    Args:
        stored: pairs of a stage and a micro-batch whose activations it has at the same time, at most.
        sharers: workers of its host with one copy of the parameters between them; 1: it has its own.
    """
    kept = _kept(profile, layout, mine, sharers)
    trained = sum(stage.trained_bytes for stage in mine)
    largest = max(stage.largest_bytes for stage in mine)
    saved, gradients, temporary = _worst(layout, mine, stored)
    temporary += kept.gathered
    if layout.dp_shard > 1:
        # A unit's gradients are copied end to end before they are reduced.
        temporary += min(trained, largest)
        whole = layout.keeps_gradients
        gradients = float(trained) if whole else trained / layout.dp_shard + min(trained, largest)
    elif sharers > 1:
        # A gradient is copied to common memory as it comes.
        gradients = kept.shared_gradients
    if layout.recompute in profile.recomputed_bytes:
        samples = profile.batch_size / (layout.data_parallel * layout.micro)
        more = profile.recomputed_bytes[layout.recompute] * samples / (layout.tp * layout.pp)
        # Less than nothing is not held: what is saved is forecast too high then.
        less = min(0.0, temporary + more)
        temporary, saved = max(0.0, temporary + more), max(0.0, saved + less)
    found = _memory(profile, layout, kept).model_copy(
        update={"gradients": round(gradients), "saved": round(saved), "temporary": round(temporary)}
    )
    return _with_unexplained(found, layout, profile.unexplained_bytes)


def evaluation_memory(profile: Profile, layout: Layout, mine: Sequence[Stage], *, sharers: int) -> Memory:
    """As `training_memory`, while the model is evaluated: its batches are cut into micro-batches and shares as well."""
    kept = _kept(profile, layout, mine, sharers)
    parts = layout.data_parallel * layout.micro
    samples = -(-profile.evaluation_samples // parts)
    # Which of a pipeline's stages has the block that needs most is not known.
    temporary = profile.evaluation_bytes + profile.evaluated_bytes * samples / layout.tp + kept.gathered
    if layout.pp > 1:
        # As many micro-batches are on their way through the stages, and lie there until they are received.
        output_bytes = max(stage.output_bytes for stage in mine) * parts / profile.batch_size
        temporary += layout.pp * samples * output_bytes
    found = _memory(profile, layout, kept).model_copy(
        update={"gradients": round(kept.shared_gradients), "temporary": max(0, round(temporary))}
    )
    return _with_unexplained(found, layout, profile.unexplained_evaluation_bytes)


def _kept(profile: Profile, layout: Layout, mine: Sequence[Stage], sharers: int) -> _Kept:
    whole = sum(stage.parameter_bytes for stage in mine)
    trained = sum(stage.trained_bytes for stage in mine)
    parameters, held, gradients, mapped, gathered = float(whole), float(trained), 0.0, 0.0, 0.0
    s = layout.dp_shard
    if s > 1:
        held = trained / s
        if layout.zero_stage > 1:
            parameters = whole / s
            gathered = max(stage.largest_bytes for stage in mine) if layout.zero_stage == 3 else whole
    elif sharers > 1:
        # Each worker's gradients stay in memory that all map.
        parameters, held = whole / sharers, trained / sharers
        gradients = float(trained)
        mapped = (sharers - 1) / sharers * (whole + trained)
    return _Kept(parameters, held * profile.state_per_byte, gradients, mapped, float(gathered))


def _memory(profile: Profile, layout: Layout, kept: _Kept) -> Memory:
    return Memory(
        base=profile.base_bytes + (profile.splitting_bytes if layout.splits_model else 0),
        parameters=round(kept.parameters),
        state=round(kept.state),
        mapped=round(kept.mapped) + profile.mapped_bytes,
    )


def held_as(layout: Layout) -> tuple[str, ...]:
    """The layout's ways of splitting, of which each holds something of its own beyond what is foreseen.

    A pipeline with gradients of weights as actions of their own is another way than one without: until their turn comes
    it keeps what they need.
    """
    is_apart = SCHEDULES[layout.schedule].in_parts
    return tuple(WEIGHTS_APART if way == PIPELINE and is_apart else way for way in ways_of(layout))


def _with_unexplained(found: Memory, layout: Layout, unexplained_bytes: Mapping[str, float]) -> Memory:
    more = 0.0
    for way in held_as(layout):
        other = {WEIGHTS_APART: PIPELINE, PIPELINE: WEIGHTS_APART}.get(way, way)
        more += unexplained_bytes.get(way, unexplained_bytes.get(other, 0.0))
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
