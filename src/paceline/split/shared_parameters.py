"""Parameters that the workers of one host have between them: one copy in memory that all map, updated in place.

In plain data parallelism every worker holds all parameters and all of the optimizer's state, receives all gradients,
and computes what the others compute. On one host that is not needed. Here each worker's gradients lie where the others
can read them; each adds up its share of them and updates its share of the parameters, where all of them read it.
Nothing is gathered afterwards. Of several hosts each has a copy; a share's gradients are added up over the network
between those who have it on their hosts, and every host's copy is updated alike.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from paceline.comm.copying import write
from paceline.comm.gradients import require_dense
from paceline.comm.group import Group
from paceline.comm.memory_map import MemoryMap
from paceline.plan.overlap import bucket_bytes
from paceline.split.deferred import DeferredParameters
from paceline.split.early_sums import EarlySums, words_bytes
from paceline.split.granularity import NUMBERS
from paceline.split.shared_layout import Flat, Member
from paceline.split.swap import Cut
from paceline.split.tensor_mode import plainly

_AT_ONCE_BYTES = 64 << 10
"""Gradients of at least this size are copied as soon as they are there, while they are in the cache."""
_CHUNK_BYTES = 256 << 10
"""Gradients of more than two workers are added up in pieces of this size, which stay in the cache."""


class SharedParameters:
    """The parameters of one model, and its gradients, in memory that all workers of a group map, or of its hosts.

    A step: each worker's backward pass leaves its gradients in its own stretch of the memory; all meet once
    (`finish`), which also carries the step's sums; each adds up its own share over its host's workers, in the order of
    rank, and its optimizer updates that; all meet again (`publish`). On several hosts shares are added up over the
    hosts as well, in their order, beginning while the backward pass goes on (`EarlySums`).

    Shares are ranges of numbers, or whole parameters where the optimizer wants them whole.

    Cost per step and worker, in memory traffic, for P bytes of parameters and N workers: the gradients' copy, P
    written and (P read, as far as they are not in the cache); adding up, P read and P/N written; the optimizer's own,
    an N-th of what one process has. Memory: P on the host instead of N·P; P per worker for gradients; an N-th of the
    optimizer's state. Two meetings. Of several hosts N is what one of them has, a worker sends P/N bytes over the
    network with two, 2 (h-1)/h · P/N with h, and there are three meetings.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: Group,
        deferred: DeferredParameters,
        num_sums: int,
        *,
        kind: str,
        late: Collection[nn.Parameter] = (),
    ) -> None:
        """Move `parameters` to shared memory, with rank 0's values. A collective call.

        Args:
            parameters: by name, alike on all workers; those that are not trained as well.
            deferred: the parameters that have no values yet; they get them here.
            num_sums: how many numbers `finish` adds up beside the gradients.
            kind: `granularity` of the optimizer, `NUMBERS` or `TENSORS`.
            late: parameters whose gradients are to stay where they are until `finish`.

        Raises:
            OSError: there is not enough memory to share, on some worker; then nothing has changed on any.
        """
        assert group.grid is not None
        self._group, self._grid, self._num_sums = group, group.grid, num_sums
        per_host = self._grid.per_host
        kinds: dict[tuple[torch.dtype, bool], dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            kinds.setdefault((parameter.dtype, parameter.requires_grad), {})[name] = parameter
        self._by_numbers = kind == NUMBERS
        # Adding up on one host would take its time from the very cores that compute.
        size_bytes = bucket_bytes("cpu", over_network=self.has_copies, sharers=per_host)
        self._flats = [
            Flat(
                named,
                per_host,
                by_numbers=self._by_numbers,
                segment_bytes=size_bytes if trains else None,
                late=late,
            )
            for (_, trains), named in kinds.items()
        ]
        self._trained = [flat for flat in self._flats if flat.trains]
        self._members = [m for flat in self._trained for m in flat.members]
        values_memory = group.map_memory((0,), _total(self._flats))
        gradients_bytes = _total(self._trained)
        gradients_memory = group.map_memory(range(per_host), gradients_bytes + words_bytes(self._trained))
        for memory in (values_memory, gradients_memory):
            memory.close()  # the group watches the other workers
        values = _views(values_memory, 0, self._flats)
        at = 0
        for flat in self._flats:
            self._move(flat, values_memory, at, deferred)
            at += flat.num_bytes
        for place in range(per_host):
            for flat, gradients in zip(
                self._trained, _views(gradients_memory, place, self._trained), strict=True
            ):
                flat.gradients.append(gradients)
        for flat in self._trained:
            self._take_share(flat, values[self._flats.index(flat)])
        self._early: EarlySums | None = None
        if size_bytes is not None:
            self._early = EarlySums(
                self._trained, group, gradients_memory, gradients_bytes, size_bytes // per_host, self._add_up
            )
        for member in self._members:
            num_bytes = member.parameter.numel() * member.parameter.element_size()
            if (num_bytes >= _AT_ONCE_BYTES or self._early is not None) and member.parameter not in late:
                member.parameter.register_post_accumulate_grad_hook(functools.partial(self._came, member))
        widest = max((f.dtype.itemsize for f in self._trained), default=1)
        self._scratch = torch.empty(_CHUNK_BYTES // widest * widest, dtype=torch.uint8)
        self.pieces = {m.name: m.piece for m in self._members if m.piece is not None}
        """What of each trained parameter is this worker's to update; missing where nothing is."""
        self.ranges = {
            m.name: tuple(at - m.begin for at in m.segment.overlap(m, self._grid.place))
            for m in self._members
            if m.piece is not None
        }
        """Which numbers of the parameter each of them is: from, and up to."""
        self.replaced: dict[nn.Parameter, tuple[nn.Parameter, Cut] | None] = {
            m.parameter: None if m.piece is None else (m.piece, self._cutter(m)) for m in self._members
        }
        """For `swap_parameters`."""
        group.barrier_on_host("shared parameters")
        for whole in values:
            group.broadcast_between_hosts_(
                whole.tensor_split(per_host)[self._grid.place], "initial parameters"
            )
        group.barrier_on_host("initial parameters")

    def begin_backward(self, *, last: bool) -> None:
        """Called before each backward pass; `last` is the step's last micro-batch."""
        if self._early is not None:
            self._early.begin_backward(last=last)

    def finish(self, sums: torch.Tensor, scale_by_sum: int | None) -> torch.Tensor:
        """Complete the step's reduction: afterwards the pieces have their global gradients, or none.

        Args:
            sums: float32, shape `[num_sums]`: this worker's part of the step's sums.
            scale_by_sum: divide the gradients by this entry of the global sums; None: leave them.

        Returns:
            The global sums, float32, shape `[num_sums]`.
        """
        for member in self._members:
            if member.parameter.grad is not None:
                self._take(member, member.parameter)
            elif not member.was_taken:
                assert member.own_gradient is not None
                member.own_gradient.zero_()
        flags = torch.tensor([float(m.was_taken) for m in self._members])
        if self._early is not None:
            self._early.finish()
        tail = self._group.sum_(torch.cat([sums, flags]), "the step's sums")
        sums = tail[: self._num_sums].clone()
        if self._early is None:
            for flat in self._trained:
                for segment in flat.segments:
                    self._add_up(flat, segment.share(self._grid.place))
        if scale_by_sum is not None:
            self.scale_(1.0 / float(sums[scale_by_sum]))
        for member, used in zip(self._members, (tail[self._num_sums :] > 0).tolist(), strict=True):
            member.was_taken = False
            if member.piece is not None:
                member.piece.grad = member.piece_gradient if used else None
        return sums

    @property
    def counts(self) -> bool:
        """Whether this worker's share is its to count: every host has all of them."""
        return self._grid.host == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this worker is the first of its host, which has one copy of the parameters."""
        return self._grid.place == 0

    @property
    def has_copies(self) -> bool:
        """Whether there is more than one host, and so more than one copy of the parameters."""
        return self._grid.num_hosts > 1

    def scale_(self, factor: float) -> None:
        """Multiply this worker's share of the gradients."""
        for flat in self._trained:
            own = flat.gradients[self._grid.place]
            torch._foreach_mul_([own[segment.share(self._grid.place)] for segment in flat.segments], factor)

    def publish(self) -> None:
        """After the optimizer's step: return when all workers have made theirs."""
        self._group.barrier_on_host("updated parameters")

    def whole_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """All gradients by name, between `finish` and `publish`. A collective call."""
        mine = torch.tensor([float(m.piece is not None and m.piece.grad is not None) for m in self._members])
        used = (self._group.sum_(mine, "which parameters were used") > 0).tolist()
        flags = dict(zip(map(id, self._members), used, strict=True))
        for flat in self._trained:
            whole = torch.cat(
                [
                    gradients[segment.share(place)]
                    for segment in flat.segments
                    for place, gradients in enumerate(flat.gradients)
                ]
            )
            for m in flat.members:
                yield m.name, whole[m.begin : m.end].view(m.parameter.shape) if flags[id(m)] else None

    def _move(self, flat: Flat, memory: MemoryMap, at: int, deferred: DeferredParameters) -> None:
        for member in flat.members:
            # A storage of its own, as in any model: whoever saves it finds no other parameter in it.
            offset_bytes = at + member.begin * flat.dtype.itemsize
            own = memory.tensor(0, offset_bytes, member.parameter.numel(), flat.dtype)
            place = own.view(member.parameter.shape)
            if self._grid.place == 0:
                with deferred.filled([member.parameter]):
                    place.copy_(member.parameter.detach())
            member.parameter.data = place

    def _take_share(self, flat: Flat, values: torch.Tensor) -> None:
        own = flat.gradients[self._grid.place]
        for member in flat.members:
            member.own_gradient = own[member.begin : member.end].view(member.parameter.shape)
            begin, end = member.segment.overlap(member, self._grid.place)
            if begin < end:
                shape = (-1,) if self._by_numbers else member.parameter.shape
                member.piece = nn.Parameter(values[begin:end].view(shape))
                member.piece_gradient = own[begin:end].view(shape)

    def _came(self, member: Member, parameter: torch.Tensor) -> None:
        """A gradient has come."""
        self._take(member, parameter)
        if self._early is not None:
            self._early.came(member)

    def _take(self, member: Member, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        assert member.own_gradient is not None
        require_dense(parameter, gradient)
        with plainly():
            if member.was_taken:
                member.own_gradient.add_(gradient)
            else:
                write(member.own_gradient, gradient)
        member.was_taken = True
        parameter.grad = None

    def _add_up(self, flat: Flat, share: slice) -> None:
        """A range of all workers' gradients on this host, in the order of rank, in place of one's own."""
        rows = [gradients[share] for gradients in flat.gradients]
        own = rows[self._grid.place]
        if len(rows) == 2:
            torch.add(rows[0], rows[1], out=own)
            return
        scratch = self._scratch.view(flat.dtype)
        for begin in range(0, own.numel(), scratch.numel()):
            pieces = [row[begin : begin + scratch.numel()] for row in rows]
            total = torch.add(pieces[0], pieces[1], out=scratch[: pieces[0].numel()])
            for piece in pieces[2:]:
                total.add_(piece)
            own[begin : begin + scratch.numel()].copy_(total)

    def _cutter(self, member: Member) -> Cut:
        if not self._by_numbers:
            return torch.clone
        begin, end = member.segment.overlap(member, self._grid.place)
        return lambda tensor: tensor.reshape(-1)[begin - member.begin : end - member.begin].clone()


def _total(flats: list[Flat]) -> int:
    return sum(flat.num_bytes for flat in flats)


def _views(memory: MemoryMap, rank: int, flats: list[Flat]) -> list[torch.Tensor]:
    """Each flat's place in the memory that `rank` made."""
    views, at = [], 0
    for flat in flats:
        views.append(memory.tensor(rank, at, flat.numel, flat.dtype))
        at += flat.num_bytes
    return views
