"""Rules carried out on pieces, together with the other workers of a group: the mode in which a model computes."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from paceline.comm.group import Group
from paceline.split import exchange
from paceline.split.placement import Shape, Shard, local_shape, whole_shape
from paceline.split.tensor_mode import SplitMode, mark, shard_of
from paceline.split.trees import map_arguments


class TensorParallel(SplitMode):
    """Computes on pieces, together with the other workers of `group`."""

    def __init__(self, group: Group, *, by_position: bool = False) -> None:
        super().__init__(group.size, by_position=by_position)
        self.group = group
        self._depth = 0
        self._shared: collections.deque[tuple[torch.Tensor, int, torch.Tensor]] = collections.deque(maxlen=4)
        """What was shared last. Not an attribute of the tensor: the two would keep each other for ever."""

    @property
    def is_active(self) -> bool:
        """Whether calls to torch are made on pieces now."""
        return self._depth > 0

    def __enter__(self) -> Any:
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if not self._depth:
            self._shared.clear()

    def shape(self, tensor: torch.Tensor) -> Shape:
        return whole_shape(tensor.shape, shard_of(tensor))

    def local(self, shape: Sequence[int], shard: Shard | None) -> Shape:
        return local_shape(shape, shard, self.num_workers)

    def divide(self, number: int) -> int:
        return number // self.num_workers

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        shard = shard_of(tensor)
        return tensor if shard is None else exchange.gather(tensor, shard, self.group)

    def cut(self, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
        if shard_of(tensor) == shard:
            return tensor
        return mark(exchange.cut(self.whole(tensor), shard, self.group), shard)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad or not torch.is_grad_enabled():
            return tensor
        return self._once(tensor, lambda: exchange.share(tensor, self.group))

    def share_together(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if len(tensors) < 2 or not all(t.requires_grad for t in tensors) or not torch.is_grad_enabled():
            return super().share_together(tensors)
        return exchange.share_together(tensors, self.group)

    def share_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        shard = shard_of(tensor)
        if shard is None:
            return self.share(tensor)
        return self._once(tensor, lambda: exchange.share_whole(tensor, shard, self.group))

    def _once(self, tensor: torch.Tensor, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        # Queries, keys and values read the same input: what is exchanged for it is exchanged once.
        for known, version, shared in self._shared:
            if known is tensor and version == tensor._version:
                return shared
        shared = function()
        if not isinstance(tensor, torch.nn.Parameter):
            self._shared.append((tensor, tensor._version, shared))
        return shared

    def add_up_pieces(self, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
        return exchange.add_up_pieces(tensor, shard, self.group)

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return exchange.add_up(tensor, self.group)

    def put(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        shard = shard_of(tensor)
        assert shard is not None
        tensor.copy_(exchange.cut(source, shard, self.group))

    def made(self, result: Any, shard: Shard | None, *sources: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return mark(result, shard)
        map_arguments(result, lambda t: mark(t, shard))
        return result

    def own_range(self, shard: Shard) -> tuple[int, int]:
        length = shard.size // self.num_workers
        return self.group.rank * length, (self.group.rank + 1) * length

    def cross_entropy_of_rows(self, scores: torch.Tensor, target: torch.Tensor, shard: Shard) -> torch.Tensor:
        def gather(rows: torch.Tensor) -> torch.Tensor:
            if exchange.has_no_values(rows):
                return rows.expand(self.num_workers, *rows.shape)
            return self.group.gather(rows, "losses of tensor parallelism")

        flat = scores.reshape(-1, scores.shape[-1])
        begin, _ = self.own_range(shard)
        rows = exchange.RowsCrossEntropy.apply(flat, target.reshape(-1), begin, gather)
        return rows.view(target.shape)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def random(self) -> Iterator[None]:
        # What is whole must be drawn alike on all workers afterwards: the generator is put back, one draw further.
        device = torch.device(self.group.device)
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
            torch.default_generator.manual_seed(seed ^ (self.group.rank + 1))
            if device.type == "cuda":
                torch.cuda.manual_seed(seed ^ (self.group.rank + 1))
            yield
