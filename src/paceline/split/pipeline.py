"""Pipeline parallelism of any module: every stage runs the model's own forward, and computes its pieces.

Each value belongs to the stage that computes it. On that stage it is a tensor; on the others it is absent: a tensor on
the meta device, which has a shape and no memory. The code between the pieces runs everywhere. Where it works on what
comes from the batch alone (masks, positions) every stage does; where it works on values of stages, the last of
these stages does. A value that another stage needs is sent when the program comes to where it is needed,
and received there: both run the same program, so no one needs to say what comes next. Skip connections go from
the stage that has the value to the one that needs it, whatever lies between.

Cost: the forward's code between the pieces, on every stage and for every micro-batch. A call to torch in it takes some
microseconds more where its values are here, and some tens in all where they are absent (docs/log.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from paceline.errors import SplitError
from paceline.split.absent import AbsentCalls, AbsentPieces
from paceline.split.flight import Arrival, Arrive, Flight, Links
from paceline.split.formats import as_it_lies
from paceline.split.pieces import Piece
from paceline.split.stages import PieceCalls, Stages
from paceline.split.tensor_mode import mark, plainly, shard_of, works_in_place
from paceline.split.trees import flatten, map_arguments, map_tensors, tensors_in

_STAGE = "_paceline_stage"
_HERE = "_paceline_here"
_SENT = "_paceline_sent"


class PipelineStage(TorchFunctionMode):
    """Within it, the model's forward is one stage's part of one micro-batch."""

    def __init__(
        self,
        stage: int,
        stages: Stages,
        calls: PieceCalls,
        links: Links,
        absent: AbsentPieces,
        absent_calls: AbsentCalls,
        names: Mapping[int, str],
        device: torch.device,
        compute: Callable[[Piece, Callable[..., Any], Any, Any], Any],
        *,
        in_parts: bool,
    ) -> None:
        """
        Args:
            names: of the parameters, by id.
            compute: runs a piece that is here: `(piece, forward, args, kwargs)`.
            in_parts: the backward pass will be `backward_of_inputs`.
        """
        self._in_parts = in_parts
        super().__init__()
        self._stage, self._stages, self._calls, self._links = stage, stages, calls, links
        self._absent, self._absent_calls = absent, absent_calls
        self._names, self._device, self._compute = names, device, compute
        self._position = 0
        self._counts: dict[str, int] = {}
        self.flight = Flight()

    @contextlib.contextmanager
    def running(self) -> Iterator[Flight]:
        """The model's forward is to be called within."""
        self._position, self._counts, self.flight = 0, {}, Flight()
        self._calls.on_call = self._call
        try:
            with self:
                yield self.flight
        finally:
            self._calls.on_call = None

    def collect(self, outputs: Any) -> Any:
        """Bring the model's outputs to the last stage: there they are tensors, elsewhere absent."""
        last = self._stages.num_stages - 1

        def bring(tensor: torch.Tensor) -> torch.Tensor:
            stage = _stage_of(tensor)
            if stage is None or stage == last == self._stage:
                return tensor
            if self._stage == last:
                return self._here(tensor)
            self._let_have(tensor, last)
            return tensor

        with plainly():
            return map_tensors(outputs, bring)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._calls.is_inside:
            return func(*args, **kwargs)
        found: list[torch.Tensor] = []
        _collect(args, found)
        _collect(kwargs.values(), found)
        stages = [s for s in map(_stage_of, found) if s is not None]
        if not stages:
            if not any(id(t) in self._names for t in found):
                return func(*args, **kwargs)
            stage = self._position
        else:
            stage = max(stages)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "device":
                return self._device
        if name in _SHAPE_ONLY:
            return func(*args, **kwargs)
        if name in ("cpu", "cuda") or (name == "to" and len(args) > 1 and isinstance(args[1], str)):
            func, args, kwargs = torch.Tensor.to, (args[0], self._device), {}
        in_place = works_in_place(func)
        if stage == self._stage:
            with plainly():
                args_here, kwargs_here = (map_arguments(a, self._here) for a in (args, kwargs))
            result = func(*args_here, **kwargs_here)
        else:
            with plainly():
                for tensor in found:
                    self._let_have(tensor, stage)
            result = self._absent_calls.result(func, args, kwargs)
        if in_place and args and isinstance(args[0], torch.Tensor):
            return self._changed_in_place(args[0], result, stage)
        return map_arguments(result, lambda t: _belongs(t, stage))

    def _changed_in_place(self, target: torch.Tensor, result: Any, stage: int) -> torch.Tensor:
        if stage == self._stage and isinstance(result, torch.Tensor) and result is not target:
            setattr(target, _HERE, result)
        return _belongs(target, stage)

    def _call(self, piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = self._counts.get(piece.name, 0)
        self._counts[piece.name] = number + 1
        stage = self._stages.calls.get((piece.name, number))
        if stage is None:
            raise SplitError(
                f"the model calls {piece.name} once more than when it was cut into stages",
                cause="which blocks are called depends on the data or on chance",
                next_step="use another axis (dp_replicate, dp_shard, tp)",
            )
        self._position = stage
        with plainly():
            if stage != self._stage:
                for tensor in tensors_in((args, kwargs)):
                    self._let_have(tensor, stage)
            leaves, restore = flatten((args, kwargs))
            here = leaves
            if stage == self._stage:
                here = [self._here(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        if stage != self._stage:
            result = self._absent.outputs(piece, forward, leaves, restore)
            return map_tensors(result, lambda t: _belongs(t, stage, new=True))
        given = {id(new): old for old, new in zip(leaves, here, strict=True)}
        args, kwargs = restore(here)
        result = self._compute(piece, forward, args, kwargs)
        # What is handed through still belongs to whom it belonged.
        return map_tensors(result, lambda t: given[id(t)] if id(t) in given else _belongs(t, stage))

    def _let_have(self, tensor: torch.Tensor, stage: int) -> None:
        """Send `tensor`, if it is this stage's, to `stage`; once."""
        if _stage_of(tensor) != self._stage:
            return
        sent: set[int] = getattr(tensor, _SENT, set())
        if stage in sent:
            return
        setattr(tensor, _SENT, sent | {stage})
        value = getattr(tensor, _HERE, tensor)
        self._links.send(value.detach().contiguous(), self._stage, stage, "F")
        if value.requires_grad and torch.is_grad_enabled():
            self.flight.sent.setdefault(stage, []).append(value)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of `tensor` on this stage: received, if it comes from another."""
        stage = _stage_of(tensor)
        if stage is None or stage == self._stage:
            return getattr(tensor, _HERE, tensor)
        if hasattr(tensor, _HERE):
            return getattr(tensor, _HERE)  # type: ignore[no-any-return]
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        value = as_it_lies(tensor, self._links.receive(value, stage, self._stage, "F"))
        if tensor.requires_grad and torch.is_grad_enabled():
            arrival = Arrival()
            self.flight.received.setdefault(stage, []).append(arrival)
            anchor = torch.empty(0, requires_grad=True)
            value = Arrive.apply(anchor, value, arrival)
            if self._in_parts:
                # Kept as it came: the model may change its own in place.
                arrival.value, value = value, value.clone()
        mark(value, shard_of(tensor))
        setattr(tensor, _HERE, value)
        return value


def _stage_of(tensor: torch.Tensor) -> int | None:
    return getattr(tensor, _STAGE, None)


def _belongs(tensor: torch.Tensor, stage: int, *, new: bool = False) -> torch.Tensor:
    if new and _stage_of(tensor) is not None:
        return tensor
    setattr(tensor, _STAGE, stage)
    return tensor


def _collect(values: Any, into: list[torch.Tensor]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            into.append(value)
        elif isinstance(value, tuple | list):
            _collect(value, into)


_SHAPE_ONLY = frozenset({
    "shape", "dtype", "size", "dim", "ndim", "numel", "nelement", "__len__", "requires_grad", "is_floating_point",
    "is_complex", "element_size", "ndimension", "layout", "is_leaf", "is_sparse", "is_nested", "is_quantized", "names",
    "itemsize", "stride", "is_contiguous", "grad_fn", "is_cuda", "is_cpu", "get_device", "__hash__",
})  # fmt: skip
