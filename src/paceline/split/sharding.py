"""Sharded data parallelism: each worker keeps a part of every parameter, its gradient and its optimizer's state.

The parameters of a unit (a block of the model; one more unit has the rest) lie end to end in one flat tensor, of
which worker r keeps range r (Rajbhandari et al. 2020; flat as in Zhao et al. 2023). Before the unit computes, its
flat tensor is gathered in place, without a copy; afterwards its memory is given back. The model's parameters stay
the user's own objects: they look into the flat tensor.

Cost per worker and step, with P bytes of parameters on n workers and m micro-batches: 2 m all-gathers of P (ZeRO-3:
before each forward and each backward pass) or one (ZeRO-2, ZeRO-1), and m reduce-scatters of P or one (ZeRO-1). Memory
of parameters, gradients and state: 1/n of each (ZeRO-3), with the largest unit whole on top; two units, where the model
calls `torch.utils.checkpoint` around its blocks. ZeRO-2: the parameters of all units whole within a step, too; ZeRO-1:
these always, and all gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from paceline.comm.group import Group
from paceline.errors import SplitError
from paceline.split.deferred import DeferredParameters
from paceline.split.tensor_mode import plainly
from paceline.split.trees import tensors_in

KEEPS = ("nothing", "within_step", "always")
"""What stays gathered: ZeRO-3, ZeRO-2, ZeRO-1."""

Cut = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class _Member:
    """One parameter's place in a flat tensor."""

    name: str
    parameter: nn.Parameter
    begin: int
    end: int
    piece: nn.Parameter | None = None
    """What of it lies in this worker's range, and is trained here."""
    was_used: bool = False
    """A gradient of this step has been reduced already."""


class _Flat:
    """Parameters of one unit, type and kind, end to end."""

    def __init__(
        self, members: list[_Member], group: Group, deferred: DeferredParameters, *, whole: bool
    ) -> None:
        self.members, self._group, self._stays = members, group, whole
        self.trains = members[0].parameter.requires_grad
        first = members[0].parameter
        size = group.size
        self.numel = -(-members[-1].end // size) * size
        self.begin, self.end = (self.numel // size * r for r in (group.rank, group.rank + 1))
        self.full = torch.zeros(self.numel, dtype=first.dtype, device=first.device)
        for member in members:
            with deferred.filled([member.parameter]):
                self.full[member.begin : member.end].copy_(member.parameter.detach().reshape(-1))
            member.parameter.data = self.full[member.begin : member.end].view(member.parameter.shape)
        own = self.full[self.begin : self.end]
        self.shard = own if whole else own.clone()
        self.gradient: torch.Tensor | None = None
        """Of the shard."""
        self.is_gathered = True
        if self.trains:
            for member in members:
                begin, end = max(member.begin, self.begin), min(member.end, self.end)
                if begin < end:
                    member.piece = nn.Parameter(self.shard[begin - self.begin : end - self.begin])
        self.release()

    def gather(self) -> None:
        if self.is_gathered:
            return
        self.full.untyped_storage().resize_(self.full.nbytes)
        self.full[self.begin : self.end].copy_(self.shard)
        self._group.all_gather_(self.full, "parameters")
        self.is_gathered = True

    def release(self) -> None:
        if self.is_gathered and not self._stays:
            self.full.untyped_storage().resize_(0)
            self.is_gathered = False

    def publish(self) -> None:
        """After the shards were updated, where parameters stay whole."""
        if self.trains:
            self.refresh()

    def refresh(self) -> None:
        if self._stays:
            self._group.all_gather_(self.full, "parameters")

    def has_gradient(self) -> bool:
        return any(m.parameter.grad is not None for m in self.members)

    def reduce(self) -> None:
        """Add the gradients that have come, of all workers, to the shard's."""
        flat = torch.zeros(self.numel, dtype=self.shard.dtype, device=self.shard.device)
        for member in self.members:
            gradient = member.parameter.grad
            if gradient is not None:
                _require_dense(member.name, gradient)
                member.was_used = True
                flat[member.begin : member.end].copy_(gradient.reshape(-1))
                member.parameter.grad = None
        self._group.reduce_scatter_(flat, "gradients")
        own = flat[self.begin : self.end]
        if self.gradient is None:
            self.gradient = own.clone()
        else:
            self.gradient += own

    def piece_gradient(self, member: _Member) -> torch.Tensor:
        assert self.gradient is not None
        begin, end = max(member.begin, self.begin), min(member.end, self.end)
        return self.gradient[begin - self.begin : end - self.begin]

    def whole_of(self, shard: torch.Tensor) -> Iterator[tuple[_Member, torch.Tensor]]:
        """Each parameter's part of what lies in shards, whole. A collective call."""
        full = torch.zeros(self.numel, dtype=shard.dtype, device=shard.device)
        full[self.begin : self.end].copy_(shard)
        self._group.all_gather_(full, "shards")
        for member in self.members:
            yield member, full[member.begin : member.end].view(member.parameter.shape)


class _Unit:
    def __init__(self, flats: list[_Flat], *, forgets: bool) -> None:
        self.flats, self._forgets = flats, forgets
        self.is_open = False
        """Its backward pass is under way, or over and not reduced yet."""

    def gather(self) -> None:
        for flat in self.flats:
            flat.gather()

    def release(self) -> None:
        for flat in self.flats:
            flat.release()

    def close(self) -> None:
        """After its backward pass."""
        self.is_open = False
        for flat in self.flats:
            if flat.trains:
                flat.reduce()
        if self._forgets:
            self.release()


class ShardedParameters:
    """The parameters of one model, sharded over a group.

    All workers call the same blocks in the same order; within a block they may use different parameters.
    All of them have the same values at the beginning.

    Gathers and reductions are collective, so what starts them must happen on all workers alike, whatever each
    uses: it is the beginning of a block's forward or backward pass. When the backward pass of a block begins,
    those of all blocks called later are over, since autograd goes back in the order of creation (on one device):
    only then are they reduced and released. When gradients arrive decides nothing, as some may not come at all.

    Not for blocks that return tensors within objects that `trees.flatten` does not open, nor for second
    derivatives: their backward passes begin unseen.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        apart: Collection[nn.Parameter],
        group: Group,
        data: Group,
        deferred: DeferredParameters,
        *,
        keep: str,
        waits: bool = False,
    ) -> None:
        """
        Args:
            apart: parameters that are read outside of the blocks that hold them.
            data: the workers among which the batch is split; `group` is a part of them.
            blocks: modules that are gathered and released each for itself.
            deferred: the parameters that have no values yet; they get them here.
            keep: one of `KEEPS`.
            waits: gradients stay as they are until `finish`, as with `always`: others are to be added to them.
        """
        self._group, self._data, self._deferred, self._keep = group, data, deferred, keep
        assert keep != "nothing" or not waits
        self._reduces_early = keep != "always" and not waits
        names = {p: name for name, p in model.named_parameters() if not p.is_meta}
        owners: dict[nn.Parameter, set[int]] = {}
        for number, block in enumerate(blocks):
            for parameter in block.parameters():
                owners.setdefault(parameter, set()).add(number)
        inside = {id(m) for block in blocks for m in block.modules()}
        for module in model.modules():
            if id(module) not in inside:
                for held in module._parameters.values():
                    if held is not None:
                        owners.setdefault(held, set()).add(-1)
        for parameter in apart:
            owners.setdefault(parameter, set()).add(-1)
        members: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 1)]
        for parameter in names:
            where = owners[parameter]
            members[next(iter(where)) if len(where) == 1 else -1].append(parameter)
        forgets = keep == "nothing"
        units = [_Unit(self._lay_out(parameters, names), forgets=forgets) for parameters in members]
        self._root, self._units = units[-1], units[:-1]
        self._flats = [flat for unit in units for flat in unit.flats]
        if keep != "always":
            for block, unit in zip(blocks, self._units, strict=True):
                if unit.flats:
                    self._watch(block, unit)
        self.pieces: dict[str, nn.Parameter] = {
            m.name: m.piece for flat in self._flats for m in flat.members if m.piece is not None
        }
        """What of each trained parameter lies here: 1-D, missing where nothing does."""
        self.ranges = {m.name: _range(flat, m) for flat in self._flats for m in flat.members}
        """Which numbers of each parameter lie here, trained or not: from, and up to; nothing where they are equal."""
        self.replaced: dict[nn.Parameter, tuple[nn.Parameter, Cut] | None] = {
            m.parameter: None if m.piece is None else (m.piece, _cutter(flat, m))
            for flat in self._flats
            if flat.trains
            for m in flat.members
        }
        """For `swap_parameters`."""

    def begin_step(self) -> None:
        """Before the first forward of a step, or of an evaluation."""
        for flat in self._flats:
            flat.gradient = None
            for member in flat.members:
                member.was_used = False
        if self._keep != "always":
            self._root.gather()

    def shard_of(self, name: str) -> torch.Tensor:
        """What lies here of a parameter, trained or not: 1-D. To change it, and then `refresh`."""
        flat, member = next((f, m) for f in self._flats for m in f.members if m.name == name)
        begin, end = (member.begin + at - flat.begin for at in self.ranges[name])
        return flat.shard[begin:end]

    def refresh(self) -> None:
        """After shards were changed otherwise than by the optimizer."""
        for flat in self._flats:
            flat.refresh()

    def end_evaluation(self) -> None:
        """After the last forward of an evaluation."""
        for flat in self._flats:
            flat.release()

    def finish(self) -> None:
        """Complete the reduction: afterwards the pieces have the gradients of all workers, or none."""
        trained = [flat for flat in self._flats if flat.trains]
        used = [m.was_used or m.parameter.grad is not None for flat in trained for m in flat.members]
        left = [flat.has_gradient() for flat in trained]
        flags = torch.tensor([*map(float, used), *map(float, left)], device=self._group.device)
        flags = self._data.sum_(flags, "which parameters were used").cpu()
        was_used = iter((flags[: len(used)] > 0).tolist())
        for flat, anywhere in zip(trained, (flags[len(used) :] > 0).tolist(), strict=True):
            if anywhere:
                flat.reduce()
            if flat.gradient is None:
                flat.gradient = torch.zeros_like(flat.shard)
        for flat in trained:
            for member in flat.members:
                member.was_used = next(was_used)
                if member.piece is not None:
                    member.piece.grad = flat.piece_gradient(member) if member.was_used else None
        for unit in (*self._units, self._root):
            unit.is_open = False
            unit.release()

    def shard_gradients(self) -> list[torch.Tensor]:
        """The gradients of this worker's shards, 1-D; the pieces' gradients look into them."""
        return [flat.gradient for flat in self._flats if flat.gradient is not None]

    def scale_(self, factor: float) -> None:
        """Multiply all gradients."""
        torch._foreach_mul_(self.shard_gradients(), factor)

    def publish(self) -> None:
        """Let all workers know the updated parameters, after the optimizer's step."""
        for flat in self._flats:
            flat.publish()

    def whole_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters by name, one unit at a time. A collective call."""
        for flat in self._flats:
            for member, tensor in flat.whole_of(flat.shard):
                yield member.name, tensor

    def whole_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """All gradients by name, between `finish` and the next step. A collective call."""
        for flat in self._flats:
            if flat.gradient is not None:
                for member, tensor in flat.whole_of(flat.gradient):
                    yield member.name, tensor if member.was_used else None

    def _lay_out(self, parameters: Sequence[nn.Parameter], names: dict[nn.Parameter, str]) -> list[_Flat]:
        kinds: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
        for parameter in parameters:
            kinds.setdefault((parameter.dtype, parameter.requires_grad), []).append(parameter)
        flats = []
        for same in kinds.values():
            members, begin = [], 0
            for parameter in same:
                members.append(_Member(names[parameter], parameter, begin, begin + parameter.numel()))
                begin += parameter.numel()
            flats.append(_Flat(members, self._group, self._deferred, whole=self._keep == "always"))
        return flats

    def _watch(self, block: nn.Module, unit: _Unit) -> None:
        """Gather before the block's forward and backward pass, and reduce after that; release after each, or not."""
        forgets = self._keep == "nothing"
        first_node = 0

        def before(module: nn.Module, args: Any) -> None:
            nonlocal first_node
            first_node = torch._C._autograd._get_sequence_nr()
            with plainly():
                if torch._C._current_graph_task_id() == -1:
                    # Not a recomputation, which runs within the backward pass.
                    self._close_units()
                unit.gather()

        def after(module: nn.Module, args: Any, outputs: Any) -> None:
            with plainly():
                if torch.is_grad_enabled() and self._reduces_early:
                    for tensor in tensors_in(outputs):
                        if _was_made_since(first_node, tensor):
                            tensor.register_hook(lambda _: self._open(unit))
                if forgets and not unit.is_open:
                    unit.release()

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
        held = {id(member.parameter) for flat in unit.flats for member in flat.members}
        for module in block.modules():
            if module is not block and any(id(p) in held for p in module.parameters(recurse=False)):
                module.register_forward_pre_hook(functools.partial(_require_gathered, unit))

    def _open(self, unit: _Unit) -> None:
        """The unit's backward pass begins."""
        if not unit.is_open:
            with plainly():
                self._close_units()
                unit.gather()
            unit.is_open = True

    def _close_units(self) -> None:
        for unit in self._units:
            if unit.is_open:
                unit.close()


def _was_made_since(first_node: int, tensor: torch.Tensor) -> bool:
    """Whether autograd's node of `tensor` is not older: what a block only passes on is no sign of its backward pass."""
    return tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= first_node


def _require_gathered(unit: _Unit, module: nn.Module, args: Any) -> None:
    if not unit.flats[0].is_gathered:
        name = unit.flats[0].members[0].name
        raise SplitError(
            f"a {type(module).__name__} was called while its parameters lie on other workers (the block of {name})",
            cause="the model calls a part of a block directly, not through the block's own forward",
            next_step="call the block as a whole, or use zero=1, which keeps parameters whole",
        )


def _require_dense(name: str, gradient: torch.Tensor) -> None:
    if gradient.is_sparse:
        raise SplitError(
            f"{name} has a sparse gradient",
            cause="an embedding with sparse=True: sparse gradients cannot be sharded",
            next_step="use sparse=False",
        )


def _range(flat: _Flat, member: _Member) -> tuple[int, int]:
    """Of the member's numbers, those in the flat's range here."""
    begin, end = max(member.begin, flat.begin), min(member.end, flat.end)
    return begin - member.begin, max(begin, end) - member.begin


def _cutter(flat: _Flat, member: _Member) -> Cut:
    begin, end = _range(flat, member)
    return lambda tensor: tensor.reshape(-1)[begin:end].clone()
