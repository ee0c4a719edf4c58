"""Proving tensor parallelism piece by piece, before anything is divided for good.

Each piece that would be divided, or be given divided tensors, computes once whole and once on its parts, forward and
backward, on what it is given in a forward of the model on a small batch. Where the two differ, or the parts cannot be
computed, the piece is left whole, as it is with whole tensors, and the rest is found anew. So one block that torch's
functions do not show (a native kernel of the user's own, say) costs the division of that block, and not the layout.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from paceline.comm.mesh import Mesh
from paceline.errors import CollectiveError, SplitError
from paceline.records import PROOF_TOLERANCE, Layout
from paceline.split.absent import Calling
from paceline.split.determinism import NoDropout, default_type
from paceline.split.finding import TensorSplit, find_tensor_split
from paceline.split.pieces import Piece
from paceline.split.placement import Shard, take
from paceline.split.stages import PieceCalls
from paceline.split.tensor_mode import mark, shard_of
from paceline.split.tensor_parallel import TensorParallel
from paceline.split.tensor_plan import undisturbed
from paceline.split.trees import flatten, map_tensors

_SEED = 20_000
_FLOOR = 1e-2
"""A gradient that is small beside the piece's largest is held against this share of that."""

Run = Callable[[], Any]


def find_proven_split(
    mesh: Mesh, model: nn.Module, calls: PieceCalls, run: Run, layout: Layout, growth: float
) -> tuple[TensorSplit, dict[str, str]]:
    """What to divide by tensor parallelism, each piece proven. A collective call.

    Returns:
        The split, and the pieces that failed, with the reason.

    Raises:
        SplitError: nothing is left to divide.
    """
    failed: dict[str, str] = {}
    left_whole: set[str] = set()
    while True:
        try:
            split = find_tensor_split(mesh.everyone, model, calls, run, layout, left_whole, growth)
        except SplitError as error:
            if not failed:
                raise
            piece, why = next(iter(failed.items()))
            raise SplitError(
                f"nothing in the model can be divided by tp={layout.tp}: {piece} does not compute the same "
                f"on parts ({why})",
                cause="it works on tensors in ways that torch does not show, such as kernels of its own",
                next_step="use another axis (dp_shard, pp)",
            ) from error
        found = _Proof(mesh, model, calls, split).run(run)
        if not found:
            return split, failed
        failed |= found
        calls.undivided |= set(found)
        modules = {piece.name: piece.module for piece in calls.pieces}
        names = {id(p): name for name, p in model.named_parameters()}
        left_whole |= {names[id(p)] for name in found for p in modules[name].parameters()}


class _Proof:
    """One forward of the model, in which every piece is proven when it is called first.

    And when it is called with arguments that are divided otherwise.
    """

    def __init__(self, mesh: Mesh, model: nn.Module, calls: PieceCalls, split: TensorSplit) -> None:
        self._mesh, self._model, self._calls, self._split = mesh, model, calls, split
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._failed: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._proven: set[Any] = set()

    def run(self, run: Run) -> dict[str, str]:
        """The pieces that failed, and why."""
        self._calls.on_call = self._call
        try:
            with undisturbed(self._model), torch.enable_grad():
                run()
        finally:
            self._calls.on_call = None
        return self._failed

    def _call(self, piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = self._counts.get(piece.name, 0)
        self._counts[piece.name] = number + 1
        shards = self._split.given.get((piece.name, number))
        names = [self._names[id(p)] for p in piece.module.parameters()]
        is_divided = shards is not None and (any(shards) or any(n in self._split.shards for n in names))
        if is_divided and piece.name not in self._calls.undivided and (piece, shards) not in self._proven:
            self._proven.add((piece, shards))
            assert shards is not None
            why = self._why_not(piece, forward, args, kwargs, shards)
            if why:
                self._failed.setdefault(piece.name, why)
        with torch.no_grad():
            result = forward(*args, **kwargs)
        return map_tensors(result, _as_new)

    def _why_not(
        self,
        piece: Piece,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        shards: tuple[Shard | None, ...],
    ) -> str:
        """Why the piece may not be divided; empty where it may. The same on all workers.

        In float32; and where that shows a difference, in float64, as for the whole layout.
        """
        why = ""
        for dtype in (torch.float32, torch.float64):
            side = _Side(self._mesh, piece, forward, args, kwargs, dtype, self._names)
            try:
                whole = side.compute_whole(_SEED)
            except Exception:
                # Not in this precision; or not at all, which is not for tensor parallelism to mend.
                return why
            why = self._why_parts_differ(side, whole, shards)
            told = self._mesh.everyone.gather_json(why, f"the proof of {piece.name}")
            why = next((text for text in told if text), "")
            if not why or _differ(whole, side.compute_whole(_SEED + 1), {}):
                # Or it draws random numbers that cannot be switched off.
                return ""
        return why

    def _why_parts_differ(
        self, side: _Side, whole: Mapping[str, torch.Tensor], shards: tuple[Shard | None, ...]
    ) -> str:
        try:
            parts = side.compute_parts(_SEED, shards, self._split.shards, by_position=self._split.by_position)
        except CollectiveError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        group = self._mesh.tensor
        return _differ(whole, parts, side.shards_of_results, group.rank, group.size)


class _Side:
    """The computation of one piece."""

    def __init__(
        self,
        mesh: Mesh,
        piece: Piece,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        dtype: torch.dtype,
        names: Mapping[int, str],
    ) -> None:
        self._mesh, self._dtype, self._names = mesh, dtype, names
        self._module = Calling(piece.module, forward)
        self._leaves, self._restore = flatten((args, kwargs))
        self.shards_of_results: dict[str, Shard | None] = {}

    def compute_whole(self, seed: int) -> dict[str, torch.Tensor]:
        """Outputs and gradients, by what they are of."""
        return self._compute(seed, contextlib.nullcontext(), {}, {})

    def compute_parts(
        self, seed: int, given: tuple[Shard | None, ...], shards: Mapping[str, Shard], *, by_position: bool
    ) -> dict[str, torch.Tensor]:
        """The same on this worker's parts; `shards_of_results` says which part of the whole each is."""
        by_place = {number: shard for number, shard in enumerate(given) if shard is not None}
        mode = TensorParallel(self._mesh.tensor, by_position=by_position)
        return self._compute(seed, mode, by_place, shards)

    def _compute(
        self,
        seed: int,
        mode: contextlib.AbstractContextManager[Any],
        given: Mapping[int, Shard],
        shards: Mapping[str, Shard],
    ) -> dict[str, torch.Tensor]:
        leaves = [
            self._part(leaf, given.get(number), leaf.requires_grad)
            if isinstance(leaf, torch.Tensor)
            else copy.deepcopy(leaf)  # a cache, say, that grows with each call
            for number, leaf in enumerate(self._leaves)
        ]
        state: dict[str, torch.Tensor] = {}
        known: dict[int, nn.Parameter] = {}
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            if id(parameter) not in known:
                shard = shards.get(self._names[id(parameter)])
                part = self._part(parameter, shard, False).detach()
                known[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
                mark(known[id(parameter)], shard)
            state[name] = known[id(parameter)]
        for name, buffer in self._module.named_buffers():
            state[name] = self._part(buffer, None, False)
        args, kwargs = self._restore([_not_a_leaf(leaf) for leaf in leaves])
        torch.manual_seed(seed)
        with default_type(self._dtype), mode, NoDropout(), torch.enable_grad():
            outputs = flatten(functional_call(self._module, state, args, kwargs))[0]
        outputs = [t for t in outputs if isinstance(t, torch.Tensor)]
        results: dict[str, torch.Tensor] = {}
        for number, output in enumerate(outputs):
            results[f"output {number}"] = output.detach()
            self.shards_of_results[f"output {number}"] = shard_of(output)
        with_gradient = [t for t in outputs if t.requires_grad]
        if with_gradient:
            torch.autograd.backward(with_gradient, [self._direction(t) for t in with_gradient])
        wanted = {
            f"gradient of argument {n}": leaf
            for n, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor)
        }
        wanted |= {f"gradient of {name.removeprefix('module.')}": p for name, p in state.items()}
        for name, tensor in wanted.items():
            if tensor.grad is not None:
                results[name] = tensor.grad
                self.shards_of_results[name] = shard_of(tensor)
        return results

    def _part(self, tensor: torch.Tensor, shard: Shard | None, requires_grad: bool) -> torch.Tensor:
        new = tensor.detach()
        if new.is_floating_point():
            new = new.to(self._dtype)
        if shard is not None:
            new = take(new, shard, self._mesh.tensor.rank, self._mesh.tensor.size)
        return mark(new.clone().requires_grad_(requires_grad), shard)

    def _direction(self, output: torch.Tensor) -> torch.Tensor:
        """A gradient to begin with: the same whole one on every worker, or this worker's part of it."""
        shard = shard_of(output)
        shape = list(output.shape)
        if shard is not None:
            shape[shard.dim] = shard.size
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device=output.device)
        whole = torch.sin(1.0 + 0.7 * numbers).view(shape).to(output.dtype)
        if shard is None:
            return whole
        return take(whole, shard, self._mesh.tensor.rank, self._mesh.tensor.size).contiguous()


def _differ(
    whole: Mapping[str, torch.Tensor],
    parts: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard | None],
    rank: int = 0,
    size: int = 1,
) -> str:
    """What differs, and by how much; empty where nothing does."""
    norms = {name: float(torch.linalg.vector_norm(t.double())) for name, t in whole.items()}
    largest = max((norm for name, norm in norms.items() if name.startswith("gradient")), default=0.0)
    for name, wanted in whole.items():
        found, shard = parts.get(name), shards.get(name)
        if found is None:
            return f"no {name}"
        if shard is not None:
            wanted = take(wanted, shard, rank, size)
        if found.shape != wanted.shape:
            return f"the shape of {name} is {tuple(found.shape)}, not {tuple(wanted.shape)}"
        distance = float(torch.linalg.vector_norm(found.double() - wanted.double()))
        scale = max(norms[name], _FLOOR * largest if name.startswith("gradient") else 0.0, 1e-30)
        if not distance <= PROOF_TOLERANCE * scale:
            return f"relative error {distance / scale:.1e} in {name}"
    return ""


def _not_a_leaf(value: Any) -> Any:
    """The model may change it in place."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return mark(value.clone(), shard_of(value))
    return value


def _as_new(tensor: torch.Tensor) -> torch.Tensor:
    """A result whose history is not kept, and which would have one."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_().clone()
