"""Pipeline parallelism of any module: every stage runs the model's own forward, and computes its pieces.

Each value belongs to the stage that computes it. On that stage it is a tensor; on the others it is absent: a tensor on
the meta device, which has a shape and no memory. The code between the pieces runs everywhere. Where it works on what
comes from the batch alone (masks, positions) every stage does; where it works on values of stages, the last of
these stages does. A value that another stage needs is sent when the program comes to where it is needed,
and received there: both run the same program, so no one needs to say what comes next. Skip connections go from
the stage that has the value to the one that needs it, whatever lies between.

Cost: the forward's code between the pieces, on every stage and for every micro-batch; some 10 µs for each call to
torch in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from paceline.errors import SplitError
from paceline.split.exchange import silent
from paceline.split.pieces import Piece
from paceline.split.stages import PieceCalls, Stages
from paceline.split.tensor_mode import mark, plainly, shard_of
from paceline.split.trees import flatten, map_tensors, tensors_in

_STAGE = "_paceline_stage"
_HERE = "_paceline_here"
_SENT = "_paceline_sent"


class Links(Protocol):
    """How one worker's stages reach those of others, or of its own."""

    def send(self, tensor: torch.Tensor, source: int, target: int, kind: str) -> None:
        """Begin to send a contiguous tensor from stage `source`, which is here, to stage `target`."""

    def receive(self, tensor: torch.Tensor, source: int, target: int, kind: str) -> torch.Tensor:
        """Fill `tensor` with what comes next of this kind from stage `source` to stage `target`, which is here."""


@dataclasses.dataclass
class Flight:
    """One micro-batch on one stage, between its forward and its backward."""

    received: dict[int, list[_Arrival]] = dataclasses.field(default_factory=dict)
    """By the stage that sent them, in order: values that take a gradient."""
    sent: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    """By the stage that got them, in order: values that get a gradient."""
    loss: torch.Tensor | None = None
    """What the last stage differentiates."""


@dataclasses.dataclass
class _Arrival:
    """A received value, and its gradient once the backward pass has come to it."""

    gradient: torch.Tensor | None = None
    value: torch.Tensor | None = None
    """Where the backward pass is in parts."""


class _Arrive(torch.autograd.Function):
    """Lets a received tensor take part in the graph; the gradient is kept when it has come."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor, arrival: _Arrival) -> torch.Tensor:
        ctx.arrival = arrival
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.arrival.gradient = gradient
        return None, None, None


class PipelineStage(TorchFunctionMode):
    """Within it, the model's forward is one stage's part of one micro-batch."""

    def __init__(
        self,
        stage: int,
        stages: Stages,
        calls: PieceCalls,
        links: Links,
        absent: AbsentPieces,
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
        self._absent, self._names, self._device, self._compute = absent, names, device, compute
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
        in_place = _works_in_place(name)
        with plainly():
            if stage == self._stage:
                args_here, kwargs_here = _map(args, self._here), _map(kwargs, self._here)
            else:
                for tensor in found:
                    self._let_have(tensor, stage)
                args_here, kwargs_here = _map(args, _on_meta), _map(kwargs, _on_meta)
        result = (
            func(*args_here, **kwargs_here)
            if stage == self._stage
            else _shape_of(func, args_here, kwargs_here)
        )
        if in_place and args and isinstance(args[0], torch.Tensor):
            return self._changed_in_place(args[0], result, stage)
        return _map(result, lambda t: _belongs(t, stage))

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
        value = self._links.receive(value, stage, self._stage, "F")
        if tensor.requires_grad and torch.is_grad_enabled():
            arrival = _Arrival()
            self.flight.received.setdefault(stage, []).append(arrival)
            anchor = torch.empty(0, requires_grad=True)
            value = _Arrive.apply(anchor, value, arrival)
            if self._in_parts:
                # Kept as it came: the model may change its own in place.
                arrival.value, value = value, value.clone()
        mark(value, shard_of(tensor))
        setattr(tensor, _HERE, value)
        return value


def backward(flight: Flight, stage: int, links: Links, device: torch.device) -> None:
    """The backward pass of one micro-batch on one stage.

    Gradients of what was sent come in, gradients of what was received go out.
    """
    roots, gradients = _gradients_in(flight, stage, links, device)
    if roots:
        torch.autograd.backward(roots, gradients)
    _gradients_out(flight, stage, links, device)


def backward_of_inputs(
    flight: Flight, stage: int, links: Links, device: torch.device, weights: list[nn.Parameter]
) -> Callable[[], None] | None:
    """As `backward`, without the gradients of `weights`.

    Returns:
        What computes these later; None: there is nothing left to do.
    """
    roots, gradients = _gradients_in(flight, stage, links, device)
    arrivals = [a for _, found in sorted(flight.received.items()) for a in found]
    if not arrivals:
        # Nobody waits for this stage.
        if roots:
            torch.autograd.backward(roots, gradients)
        return None
    groups: list[Any] = []
    if roots:
        # One number with the same gradients: torch detaches what it is given, which the graph may have saved.
        weighed = [r if g is None else (r * g).sum() for r, g in zip(roots, gradients, strict=True)]
        root = torch.stack([w.reshape(()) for w in weighed]).sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gradients of tensors that are no leaves are meant
            found, groups = stage_backward_input([root], None, [a.value for a in arrivals], iter(weights))
        for arrival, gradient in zip(arrivals, found, strict=True):
            arrival.gradient, arrival.value = gradient, None
    _gradients_out(flight, stage, links, device)
    return lambda: _of_weights(weights, groups)


def _of_weights(weights: list[nn.Parameter], groups: list[Any]) -> None:
    stage_backward_weight(iter(weights), groups)


def _gradients_in(
    flight: Flight, stage: int, links: Links, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """What to differentiate, and the gradients of it that others have sent."""
    roots: list[torch.Tensor] = []
    gradients: list[torch.Tensor | None] = []
    if flight.loss is not None:
        roots.append(flight.loss)
        gradients.append(None)
    for target, tensors in sorted(flight.sent.items()):
        flags = torch.zeros(len(tensors), dtype=torch.uint8, device=device)
        flags = links.receive(flags, target, stage, "B")
        for tensor, flag in zip(tensors, flags.tolist(), strict=True):
            if flag:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                roots.append(tensor)
                gradients.append(links.receive(empty, target, stage, "B"))
    return roots, gradients


def _gradients_out(flight: Flight, stage: int, links: Links, device: torch.device) -> None:
    for source, arrivals in sorted(flight.received.items()):
        flags = torch.tensor([a.gradient is not None for a in arrivals], dtype=torch.uint8, device=device)
        links.send(flags, stage, source, "B")
        for arrival in arrivals:
            if arrival.gradient is not None:
                links.send(arrival.gradient.contiguous(), stage, source, "B")


def _shape_of(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a function returns where tensors have shapes only."""
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        raise SplitError(
            f"the model cannot be cut into pipeline stages: it calls {getattr(func, '__name__', func)} between its "
            "blocks on a value that another stage computes",
            cause=str(error).splitlines()[0],
            next_step="use another axis (dp_shard, tp), or move that code into a block",
        ) from error


class AbsentPieces:
    """What the pieces of other stages would return, from the shapes of what they are given."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[Any], Callable[[list[Any]], Any]]] = {}

    def outputs(
        self,
        piece: Piece,
        forward: Callable[..., Any],
        leaves: list[Any],
        restore: Callable[[list[Any]], Any],
    ) -> Any:
        """Absent tensors in the structure that the piece returns; what it hands through is that which it was given.

        Args:
            leaves, restore: the piece's `(args, kwargs)`, flat.
        """
        with plainly():
            key = (piece.name, torch.is_grad_enabled(), piece.module.training, *map(_signature, leaves))
        if key not in self._known:
            self._known[key] = self._find_out(piece, forward, leaves, restore)
        described, rebuild = self._known[key]
        with plainly():
            return rebuild(
                [leaf.make(leaves) if isinstance(leaf, _Output | _Given) else leaf for leaf in described]
            )

    def _find_out(
        self,
        piece: Piece,
        forward: Callable[..., Any],
        leaves: list[Any],
        restore: Callable[[list[Any]], Any],
    ) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        with silent():
            return self._find_out_silently(piece, forward, leaves, restore)

    def _find_out_silently(
        self, piece: Piece, forward: Callable[..., Any], leaves: list[Any], restore: Callable[[list[Any]], Any]
    ) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        try:
            try:
                with FakeTensorMode(allow_non_fake_inputs=True), _quietly():
                    return _describe(piece, forward, leaves, restore, torch.empty)
            except Exception:
                # What it does depends on values: it is run once on zeros, with weights of zero.
                return _describe(piece, forward, leaves, restore, torch.zeros)
        except Exception as error:
            raise SplitError(
                f"the model cannot be cut into pipeline stages: what {piece.name} returns cannot be told from the "
                "shapes of what it is given",
                cause=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                next_step="use another axis (dp_shard, tp)",
            ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch logs what a fake tensor cannot do; it is tried in another way then."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _describe(
    piece: Piece,
    forward: Callable[..., Any],
    leaves: list[Any],
    restore: Callable[[list[Any]], Any],
    make: Callable[..., torch.Tensor],
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Run the piece on tensors that `make` makes, and say what it returns."""
    module = _Calling(piece.module, forward)
    with plainly():
        stand_ins = [_stand_in(leaf, make) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        state = {n: _stand_in(t, make) for n, t in (*module.named_parameters(), *module.named_buffers())}
    args, kwargs = restore(stand_ins)
    found, rebuild = flatten(functional_call(module, state, args, kwargs))
    given = {id(t): number for number, t in enumerate(stand_ins) if _is_object(t)}
    with plainly():
        described = [
            _Given(given[id(leaf)])
            if id(leaf) in given
            else _Output(tuple(leaf.shape), leaf.dtype, leaf.requires_grad, shard_of(leaf))
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in found
        ]
    return described, rebuild


def _is_object(value: Any) -> bool:
    """Whether two of them are the same only if they are one."""
    return value is not None and not isinstance(value, bool | int | float | str)


class _Calling(nn.Module):
    """Calls a piece's forward, so that its parameters can be stood in for."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._call = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Output:
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    shard: Any

    def make(self, leaves: list[Any]) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if self.requires_grad:
            # No leaf: the code between the pieces may change it in place.
            tensor = tensor.requires_grad_().clone()
        return mark(tensor, self.shard)


@dataclasses.dataclass(frozen=True)
class _Given:
    number: int

    def make(self, leaves: list[Any]) -> Any:
        return leaves[self.number]


def _stand_in(tensor: torch.Tensor, make: Callable[..., torch.Tensor]) -> torch.Tensor:
    device = "cpu" if tensor.is_meta else tensor.device
    new = make(tensor.shape, dtype=tensor.dtype, device=device)
    if tensor.requires_grad:
        new = new.requires_grad_()
        if not isinstance(tensor, nn.Parameter):
            new = new.clone()
    return mark(new, shard_of(tensor))


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.requires_grad, shard_of(leaf)
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return leaf
    return type(leaf).__name__


def _stage_of(tensor: torch.Tensor) -> int | None:
    return getattr(tensor, _STAGE, None)


def _belongs(tensor: torch.Tensor, stage: int, *, new: bool = False) -> torch.Tensor:
    if new and _stage_of(tensor) is not None:
        return tensor
    setattr(tensor, _STAGE, stage)
    return tensor


def _on_meta(value: Any) -> Any:
    """An argument, or a device to go to, as it is where tensors have shapes only."""
    return _as_meta(value) if isinstance(value, torch.Tensor) else torch.device("meta")


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    meta = torch.empty_like(tensor, device="meta", requires_grad=False)
    if tensor.requires_grad:
        meta = meta.requires_grad_().clone()
    return mark(meta, shard_of(tensor))


def _collect(values: Any, into: list[torch.Tensor]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            into.append(value)
        elif isinstance(value, tuple | list):
            _collect(value, into)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, torch.Tensor) or (function is _on_meta and isinstance(value, torch.device)):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, function) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    return value


_SHAPE_ONLY = frozenset({
    "shape", "dtype", "size", "dim", "ndim", "numel", "nelement", "__len__", "requires_grad", "is_floating_point",
    "is_complex", "element_size", "ndimension", "layout", "is_leaf", "is_sparse", "is_nested", "is_quantized", "names",
    "itemsize", "stride", "is_contiguous", "grad_fn", "is_cuda", "is_cpu", "get_device", "__hash__",
})  # fmt: skip


def _works_in_place(name: str) -> bool:
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.startswith("__"))
        or name
        in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__", "__ixor__")
    )
