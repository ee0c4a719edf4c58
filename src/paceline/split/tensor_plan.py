"""Finding what tensor parallelism can divide in a model: which weights, along which dimension.

The model's forward runs once on whole tensors that are only said to be divided, so that the data is followed through
whatever the model does: a linear layer that reads a whole input is divided by its outputs, one that reads a
divided input by its inputs, and vectors that meet divided data along with it. Where the data then has to be made whole
again, the weights that it comes from are looked at once more: divided into more parts (the heads of queries, keys
and values in one weight), or left whole where they are small; and the forward runs again, until nothing changes.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from paceline.split.placement import Shape, Shard, is_divisible, take
from paceline.split.tensor_mode import SplitMode, mark, shard_of
from paceline.split.trees import map_arguments

_ORIGINS = "_paceline_origins"
_TRANSPOSED = "_paceline_transposed"
_TRANSPOSES = (
    torch.Tensor.T.__get__,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.Tensor.t,
    torch.t,
    torch.transpose,
    torch.Tensor.transpose,
)

LEAST_SHARE = 0.01
"""Of the model's parameters: a smaller weight is left whole where dividing it costs a message of its own."""
_MOST_PASSES = 20
LEAST_BY_POSITION = 1 << 17
"""Mean elements of a sum that is divided along positions: with fewer, the messages take longer than what is saved."""
_MOST_BY_POSITION = 1.05
"""Division along positions may cost so much more exchange, for the memory and the work that it saves."""


class Thought(SplitMode):
    """Tensors are whole, and only said to be divided: nothing is exchanged."""

    def shape(self, tensor: torch.Tensor) -> Shape:
        return tuple(tensor.shape)

    def local(self, shape: Sequence[int], shard: Shard | None) -> Shape:
        return tuple(shape)

    def divide(self, number: int) -> int:
        return number

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def share_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.whole(tensor)

    def add_up_pieces(self, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
        return tensor

    def put(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        tensor.copy_(source)

    def own_range(self, shard: Shard) -> tuple[int, int]:
        return 0, shard.size

    def cross_entropy_of_rows(self, scores: torch.Tensor, target: torch.Tensor, shard: Shard) -> torch.Tensor:
        by_class = scores.movedim(-1, 1) if scores.dim() > 1 else scores
        return F.cross_entropy(by_class, target, reduction="none")

    def random(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Planning(Thought):
    """One pass over the model."""

    def __init__(
        self,
        num_workers: int,
        names: Mapping[int, str],
        num_elements: int,
        left_whole: set[str],
        parts: Mapping[str, tuple[int, ...]],
        *,
        by_position: bool = False,
    ) -> None:
        """
        Args:
            names: of the parameters, by id.
            left_whole: what may not be divided.
            parts: into what parts the outputs of a weight are divided, where it is not one.
        """
        super().__init__(num_workers, by_position=by_position)
        self._names, self._num_elements, self._left_whole, self._parts = (
            names,
            num_elements,
            left_whole,
            parts,
        )
        self.shards: dict[str, Shard] = {}
        self.gathered: dict[str, int] = {}
        """Elements that had to be made whole, by the weights that they come from."""
        self.better: dict[str, tuple[int, ...]] = {}
        self.moved = 0
        """Elements that a worker sends in a forward and a backward pass, roughly: b(n-1)/n of them count as b."""
        self.divided_by_position = self.num_divided_by_position = 0
        """Elements, and number, of the sums that are divided along positions."""
        self._shared: collections.deque[tuple[torch.Tensor, int]] = collections.deque(maxlen=4)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _TRANSPOSES and isinstance(args[0], nn.Parameter) and args[0].dim() == 2:
            setattr(result, _TRANSPOSED, args[0])
        return result

    def weigh(self, weight: torch.Tensor, shard: Shard, *, saves_only_memory: bool = False) -> None:
        behind = getattr(weight, _TRANSPOSED, None)
        if behind is not None and shard_of(weight) is None:
            self.weigh(behind, shard.at(1 - shard.dim), saves_only_memory=saves_only_memory)
            found = shard_of(behind)
            if found is not None:
                self.made(weight, found.at(1 - found.dim), behind)
            return
        name = self._names.get(id(weight))
        if name is None or shard_of(weight) is not None or name in self._left_whole:
            return
        if saves_only_memory and weight.numel() < LEAST_SHARE * self._num_elements:
            return
        parts = self._parts.get(name)
        if parts is not None and sum(parts) == shard.size:
            shard = Shard(shard.dim, parts)
        if is_divisible(shard, self.num_workers):
            self.shards[name] = shard
            mark(weight, shard)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or hasattr(tensor, _TRANSPOSED)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        if shard_of(tensor) is None:
            return tensor
        self.moved += tensor.numel()
        for name in self._origins(tensor):
            self.gathered[name] = self.gathered.get(name, 0) + tensor.numel()
        return tensor.view_as(tensor)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        self._share_once(tensor)
        return tensor

    def share_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        shard = shard_of(tensor)
        if shard is None or shard.dim != tensor.dim() - 2:
            return self.share(self.whole(tensor))
        self._share_once(tensor)
        return tensor.view_as(tensor)

    def _share_once(self, tensor: torch.Tensor) -> None:
        """An all-reduce backward; or an all-gather forward and a reduce-scatter backward."""
        if not any(known is tensor and version == tensor._version for known, version in self._shared):
            self.moved += 2 * tensor.numel()
            self._shared.append((tensor, tensor._version))

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        self.moved += 2 * tensor.numel()
        return tensor

    def add_up_pieces(self, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
        self.moved += 2 * tensor.numel()
        self.divided_by_position += tensor.numel()
        self.num_divided_by_position += 1
        return tensor

    def cut(self, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
        if shard_of(tensor) == shard:
            return tensor
        name = self._names.get(id(tensor))
        if name is not None and shard_of(tensor) is None and name not in self._left_whole:
            self.shards[name] = shard
            return mark(tensor, shard)
        if shard_of(tensor) is None:
            self.moved += tensor.numel()  # backward
        return mark(self.whole(tensor).view_as(tensor), shard)

    def made(self, result: Any, shard: Shard | None, *sources: Any) -> Any:
        origins: frozenset[str] = frozenset()
        for source in sources:
            if isinstance(source, torch.Tensor) and shard_of(source) is not None:
                origins |= self._origins(source)

        def note(tensor: torch.Tensor) -> torch.Tensor:
            setattr(tensor, _ORIGINS, origins)
            return mark(tensor, shard)

        return note(result) if isinstance(result, torch.Tensor) else map_arguments(result, note)

    def would_fit(self, tensor: torch.Tensor, shard: Shard) -> None:
        for name in self._origins(tensor):
            if name in self.shards and self.shards[name].size == shard.size:
                self.better[name] = shard.parts

    def _origins(self, tensor: torch.Tensor) -> frozenset[str]:
        name = self._names.get(id(tensor))
        return frozenset([name]) if name is not None else getattr(tensor, _ORIGINS, frozenset())


def plan_tensor_split(
    model: nn.Module,
    run: Callable[[], Any],
    num_workers: int,
    left_whole: Collection[str] = (),
    *,
    sequence: str = "auto",
    growth: float = 1.0,
) -> tuple[dict[str, Shard], bool]:
    """What to divide among `num_workers`.

    Args:
        run: one forward of the model and its loss. Buffers and random state are put back afterwards.
        left_whole: names of parameters that may not be divided.
        sequence: see `Layout`.
        growth: how many times larger than the run's batch a worker's micro-batch is.

    Returns:
        How, by the names of the parameters; and whether what is between the divided layers is to be divided along
        positions. If so, the last call of `run` was as it will be; if not, the one before the last.
    """
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    num_elements = sum(p.numel() for p in parameters.values())
    left_whole = set(left_whole)
    parts: dict[str, tuple[int, ...]] = {}
    tried: set[tuple[str, tuple[int, ...]]] = set()

    def follow(*, by_position: bool) -> Planning:
        planning = Planning(num_workers, names, num_elements, left_whole, parts, by_position=by_position)
        with _unmarked(parameters.values()), undisturbed(model), planning:
            run()
        return planning

    for _ in range(_MOST_PASSES):
        planning = follow(by_position=False)
        better = {
            (n, p) for n, p in planning.better.items() if n in planning.gathered and (n, p) not in tried
        }
        if better:
            tried |= better
            parts.update(better)
            continue
        small = {n for n in planning.gathered if parameters[n].numel() < LEAST_SHARE * num_elements}
        if not small - left_whole:
            break
        left_whole |= small
    along = follow(by_position=True)
    is_possible = along.divided_by_position > 0 and along.shards == planning.shards
    if not is_possible or sequence != "auto":
        return planning.shards, is_possible and sequence == "on"
    mean = growth * along.divided_by_position / along.num_divided_by_position
    pays = mean >= LEAST_BY_POSITION and along.moved <= _MOST_BY_POSITION * planning.moved
    return planning.shards, pays


@contextlib.contextmanager
def _unmarked(parameters: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for parameter in parameters:
            mark(parameter, None)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model's buffers and the random state are afterwards what they were. No gradients are computed within."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(), torch.no_grad():
        try:
            yield
        finally:
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])


def divide_parameters(
    model: nn.Module,
    shards: Mapping[str, Shard],
    rank: int,
    num_workers: int,
    values: Callable[[nn.Parameter], contextlib.AbstractContextManager[None]],
) -> dict[nn.Parameter, nn.Parameter]:
    """Replace parameters by this worker's pieces, everywhere in the model; old -> new.

    Args:
        values: what a parameter is read in.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        shard = shards.get(name)
        if shard is not None:
            with values(parameter):
                piece = take(parameter.detach(), shard, rank, num_workers).clone()
            replaced[parameter] = nn.Parameter(piece, requires_grad=parameter.requires_grad)
            mark(replaced[parameter], shard)
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None and held in replaced:
                module._parameters[name] = replaced[held]
    return replaced
