"""What a job computes, counted.

With that, and the speed of a large product of matrices, a plan for another device can tell which part of a block's
time its products take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from paceline.job import Job
from paceline.plan.profile import Block
from paceline.split.pieces import Piece, find_pieces
from paceline.split.stages import PieceCalls
from paceline.train.calling import caller
from paceline.train.replica import Replica


class Work(TorchDispatchMode):
    """Counts what is computed while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Of products of matrices, convolutions and attention; a multiplication and an addition are two."""
        self.operations = 0
        """Calls that compute something: all but views."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        self.operations += not (func.is_view or packet is torch.ops.aten._unsafe_view)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=outputs)
        elif packet in _MORE:
            self.flops += _MORE[packet](*args)
        return outputs


def _attention_flops(query: Any, key: Any, value: Any, *_: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _mkldnn_rnn_flops(inputs: Any, of_input: Any, of_state: Any, *_: Any) -> int:
    """One layer in one direction: a product with each of two matrices at each position."""
    return int(2 * inputs.numel() // inputs.shape[-1] * (of_input.numel() + of_state.numel()))


def _cudnn_rnn_flops(inputs: Any, weights: Sequence[Any], *_: Any) -> int:
    matrices = sum(w.numel() for w in weights if w.dim() == 2)
    return int(2 * inputs.numel() // inputs.shape[-1] * matrices)


_MORE: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _mkldnn_rnn_flops,
    torch.ops.aten._cudnn_rnn: _cudnn_rnn_flops,
}
"""What torch's own registry does not have."""


def count_work(job: Job, replica: Replica, batch: Any) -> list[tuple[int, int]]:
    """Floating-point operations and calls of each call of a piece and what is before it; last, of what follows all."""
    found: list[tuple[int, int]] = []
    calls = PieceCalls(replica.model, find_pieces(replica.model))
    call_model = caller(job, replica.model)
    work = Work()

    def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        found.append((work.flops, work.operations))
        return outputs

    calls.on_call = call
    try:
        with torch.no_grad(), work:
            job.loss(call_model(replica.images.arrange(batch)), batch)
    finally:
        calls.on_call = None
    found.append((work.flops, work.operations))
    before = [(0, 0), *found[:-1]]
    return [(f - f0, o - o0) for (f, o), (f0, o0) in zip(found, before, strict=True)]


def with_work(
    blocks: Sequence[Block], row: Sequence[int], counted: Sequence[tuple[int, int]], samples: int
) -> tuple[Block, ...]:
    """The blocks with what their calls compute: means over those of each, in a forward pass of so many samples."""
    found = []
    for at, block in enumerate(blocks):
        mine = [counts for place, counts in zip(row, counted, strict=True) if place == at]
        flops = sum(flops for flops, _ in mine) / len(mine) / samples
        operations = round(sum(count for _, count in mine) / len(mine))
        found.append(block.model_copy(update={"flops": flops, "operations": operations}))
    return tuple(found)
