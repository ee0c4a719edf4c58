"""What workers hold of a job that was measured block by block: no process has trained all of it."""

from __future__ import annotations

from paceline.plan.profile import Block, LinkedCluster, Profile

_MOST_SHARE = 0.75
"""Of a worker's memory that the divided model may take while it is measured."""


def with_memory_of_blocks(
    profile: Profile, empty_bytes: int, file_bytes: int, splitting_bytes: int
) -> Profile:
    """The profile with what a process holds without a model, and the temporaries of divided blocks.

    Those of whole blocks were measured with each of them, alone; each part of a divided one is taken to have its share.

    Args:
        empty_bytes: when all blocks have been measured, and the model is gone.
        file_bytes: pages of files among that.
        splitting_bytes: and what only layouts need that split the model.
    """

    def divided(block: Block) -> Block:
        divisions = (d.model_copy(update={"peak_bytes": block.peak_bytes / d.tp}) for d in block.divisions)
        return block.model_copy(update={"divisions": tuple(divisions)})

    costs = (c.model_copy(update={"blocks": tuple(map(divided, c.blocks))}) for c in profile.costs)
    return profile.model_copy(
        update={
            "costs": tuple(costs),
            "base_bytes": max(0, empty_bytes - file_bytes - splitting_bytes),
            "mapped_bytes": file_bytes,
            "splitting_bytes": splitting_bytes,
        }
    )


def can_hold_divided(profile: Profile, linked: LinkedCluster, empty_bytes: int, tp: int) -> bool:
    """Whether each of `tp` workers could hold its part of the model, with gradients and activations.

    As if only half of the weights could be divided evenly, and no activation at all.
    """
    row = profile.costs[0].model
    weights = sum(block.parameter_bytes + block.trained_bytes for block in row)
    activations = sum(block.saved_bytes for block in row) * profile.batch_size
    temporary = max(block.peak_bytes for block in row) * profile.batch_size
    needed = empty_bytes + weights * (0.5 + 0.5 / tp) + activations + temporary
    return needed <= linked.worker_bytes(tp) * _MOST_SHARE
