"""Measuring the gradient noise scale while training, from the gradients that a layout computes anyway.

A batch has as many parts as micro-batches times data-parallel workers; with batch norm, whose statistics make workers'
gradients depend on each other, only micro-batches of one worker are parts. In a measured step a hook on each parameter
sees the gradient of each part as it comes, before anything is added to it, and keeps its norm; nothing else is kept,
and no gradient is touched. What each worker has found travels with the sums of the step after it.
`paceline.plan.noise` has the formulas.

Cost of a measurement: the gradients of each micro-batch are read once while they are in the cache, those of the whole
batch once more; no memory, no message of its own (in a pipeline with a weighted loss one, of a number for each
micro-batch, as only its last stage knows the weights). Steps are measured so seldom that this is at most `SHARE` of the
time.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch

from paceline.comm.mesh import Mesh
from paceline.plan.noise import Measurement, NoiseScale, Smoothing
from paceline.split.apply import LocalParameter
from paceline.split.tensor_mode import plainly
from paceline.train.data import GlobalBatch, Part

SHARE = 0.005
"""Of the training's time that measuring may take, on average: a worker that counts for all takes up to twice that."""

_PARTS, _COUNT, _WHOLE, _COST, _STEP = range(5)
NUM_SUMS = 5
"""Numbers that travel with a step's sums."""
_COSTS = 5
"""Measurements that tell what one costs."""
_ROW = 1 << 15
"""So many squares are added up in float32; the sums of these in float64."""


@dataclasses.dataclass(frozen=True)
class StepNoise:
    """What one measured step has told, and all until then."""

    measured: Measurement
    scale: NoiseScale
    """Averaged; the critical batch size."""
    every: int
    """Steps from this measurement to the next."""
    cost_s: float
    """Of this measurement: all workers that have one model between them together, the mean over data parallelism."""


@dataclasses.dataclass
class _Measuring:
    """A step that is measured, as far as this worker knows."""

    step: int
    samples: int
    begin_s: float
    weights: dict[int, torch.Tensor]
    """Of each of this worker's parts, by its first sample; likewise below."""
    norms: dict[int, list[torch.Tensor]]
    """Of gradients, or of rows of them."""
    knows_weights: bool = False
    """The loss was computed here, and came with weights."""
    cost_s: float = 0.0
    step_s: float = 0.0
    seen: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    """Parameters and parts whose gradients have come."""
    pieces: dict[tuple[int, int], torch.Tensor] = dataclasses.field(default_factory=dict)
    """Gradients that come in several pieces, added up."""
    is_void: bool = False
    of_parts: torch.Tensor | None = None
    """`Σ |d|² / w` over this worker's parts, which count for w and added d to the gradient."""
    of_whole: torch.Tensor | None = None
    to_mean: float = 1.0
    """What makes `Σ w |g|² / Σ w` of the sum over all parts, where g is the gradient of a part alone."""
    handles: list[torch.utils.hooks.RemovableHandle] = dataclasses.field(default_factory=list)

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class NoiseMeter:
    """Measures every so many steps. All workers have one, and call the same methods in the same steps.

    Parameters that several stages of a pipeline have are left out, of parts and whole alike: their gradients exist only
    as sums over those stages.
    """

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        mesh: Mesh,
        batch_size: int | None,
        *,
        mixes_samples: bool = False,
    ) -> None:
        """
        Args:
            parameters: what is trained here.
            batch_size: of the batches to measure, an uneven last one is not; None: measure nothing.
            mixes_samples: batch norms take their statistics over all data-parallel workers: those have no independent
                parts of a micro-batch.
        """
        self._mesh, self._batch_size = mesh, batch_size
        self._mixes_samples = mixes_samples and mesh.data.size > 1
        self.left_out = frozenset(p.name for p in parameters if len(p.holders) > 1)
        """Names of parameters."""
        self._counted = [
            p.parameter
            for p in parameters
            if p.name not in self.left_out and (p.shard is not None or mesh.tensor.rank == 0)
        ]
        self._in_pieces: set[int] = set()
        """Places of parameters whose gradients of one part come in several pieces."""
        self._now: _Measuring | None = None
        self._sent: _Measuring | None = None
        """Measured, and not added up yet."""
        self._part = 0
        self._next = 1  # the first step warms up
        self._is_weighted = False
        self._shares: collections.deque[float] = collections.deque(maxlen=_COSTS)
        """Of a step, that the last measurements have taken."""
        self._smoothing = Smoothing()

    @property
    def lacks(self) -> str:
        """Why nothing can be measured, or what is left out; else empty."""
        layout, size = self._mesh.layout, self._batch_size or 1
        if self._mixes_samples:
            return (
                "batch norm takes its statistics over all workers, so that their gradients depend on each other "
                "(micro-batches of one process, --layout dp_replicate=1,micro=2, do not)"
            )
        if layout.micro * self._mesh.data.size < 2:
            micro = next((number for number in range(2, size + 1) if size % number == 0), None)
            more = f" (--layout {layout.model_copy(update={'micro': micro})} has more)" if micro else ""
            return f"it takes two parts of a batch, and here a batch is computed in one piece{more}"
        names = ", ".join(sorted(self.left_out))
        return f"parameters that several stages have are left out: {names}" if names else ""

    def begin(self, batch: GlobalBatch, step: int) -> None:
        """Before the passes of step number `step`, from 0."""
        few = self._mixes_samples or len(batch.parts) * self._mesh.data.size < 2
        if self._now is not None:  # its step failed
            self._now.remove_hooks()
            self._now = None
        if step < self._next or self._sent is not None or batch.samples != self._batch_size or few:
            return
        begin_s = time.perf_counter()
        device = self._mesh.everyone.device
        self._now = now = _Measuring(
            step=step,
            samples=batch.samples,
            begin_s=begin_s,
            weights={p.share.begin: torch.tensor(float(p.share.samples), device=device) for p in batch.parts},
            norms={p.share.begin: [] for p in batch.parts},
        )
        for place, parameter in enumerate(self._counted):
            if parameter.requires_grad:
                now.handles.append(parameter.register_hook(functools.partial(self._came, place)))
        now.cost_s = time.perf_counter() - begin_s

    def compute(self, part: Part) -> None:
        """The passes that follow are those of `part`."""
        self._part = part.share.begin

    def weigh(self, part: Part, weight: torch.Tensor | float) -> None:
        """What `part` counts for, where the loss says so; else it is its samples."""
        if self._now is not None:
            device = self._mesh.everyone.device
            self._now.weights[part.share.begin] = torch.as_tensor(weight, dtype=torch.float32, device=device)
            self._now.knows_weights = True

    def put(self, sums: torch.Tensor) -> None:
        """After the passes of a step: close this step's hooks, and add to `sums` what the last one measured.

        Args:
            sums: float32, shape `[NUM_SUMS]`, zeros; they are added up over all workers.
        """
        if self._now is not None:
            self._close(self._now)
        sent = self._sent
        if sent is not None:
            assert sent.of_parts is not None
            assert sent.of_whole is not None
            sums[_PARTS], sums[_WHOLE] = sent.of_parts, sent.of_whole
            mesh = self._mesh
            if mesh.tensor.rank == 0 and mesh.pipeline.rank == 0:
                sums[_COUNT] = torch.stack(list(sent.weights.values())).gt(0).sum()
            sums[_COST], sums[_STEP] = sent.cost_s, sent.step_s

    def take(
        self,
        sums: Sequence[float],
        weight: float | None,
        gradients: Callable[[frozenset[str]], Iterable[torch.Tensor]],
    ) -> StepNoise | None:
        """After a step's gradients were added up and before they are used: what the last measured step has told.

        Args:
            sums: the `NUM_SUMS`, over all workers.
            weight: of this step's batch, where its loss came with weights.
            gradients: of the whole batch, this worker's share, but for those of the names that are given.
        """
        self._is_weighted = weight is not None
        told = None
        if self._sent is not None:
            told, self._sent = self._tell(self._sent, sums), None
        now = self._now
        if now is not None:
            begin_s = time.perf_counter()
            # Parts of a mean have been divided by all samples already.
            now.to_mean = float(now.samples) if weight is None else 1.0 / weight
            now.of_whole = self._total([norms(gradient) for gradient in gradients(self.left_out)])
            end_s = time.perf_counter()
            now.cost_s += end_s - begin_s
            now.step_s = max(end_s - now.begin_s - now.cost_s, 1e-9)
            self._now, self._sent = None, now
        return told

    def _came(self, place: int, gradient: torch.Tensor) -> None:
        """A gradient of the present part; autograd adds it to the parameter's afterwards."""
        now = self._now
        assert now is not None
        begin_s = time.perf_counter()
        key = place, self._part
        with plainly():
            if place in self._in_pieces:
                known = now.pieces.get(key)
                now.pieces[key] = gradient.clone() if known is None else known + gradient
            elif key in now.seen:
                # One measurement is lost; from the next one on the pieces are added up.
                self._in_pieces.add(place)
                now.is_void = True
            else:
                now.seen.add(key)
                now.norms[self._part].append(norms(gradient))
        now.cost_s += time.perf_counter() - begin_s

    def _close(self, now: _Measuring) -> None:
        begin_s = time.perf_counter()
        now.remove_hooks()
        for (_, part), gradient in now.pieces.items():
            now.norms[part].append(norms(gradient))
        now.pieces.clear()
        weights = torch.stack(list(now.weights.values()))
        pipeline = self._mesh.pipeline
        if self._is_weighted and pipeline.size > 1:
            known = weights if now.knows_weights else torch.zeros_like(weights)
            weights = pipeline.sum_(known, "weights of parts")
            now.weights = dict(zip(now.weights, weights.unbind(), strict=True))
        found = torch.stack([self._total(parts) for parts in now.norms.values()])
        of_parts = torch.where(weights > 0, found / weights.clamp(min=1e-30), 0.0).sum()
        now.of_parts = of_parts * math.nan if now.is_void else of_parts
        now.norms.clear()
        now.cost_s += time.perf_counter() - begin_s

    def _total(self, found: list[torch.Tensor]) -> torch.Tensor:
        """The sum of the squares of what `norms` gave; float64, a scalar."""
        with torch.no_grad(), plainly():
            if not found:
                return torch.zeros((), dtype=torch.float64, device=self._mesh.everyone.device)
            return torch.cat(found).double().square().sum()

    def _tell(self, sent: _Measuring, sums: Sequence[float]) -> StepNoise | None:
        # Workers that have one model between them may wait for each other.
        cost_s = sums[_COST] / self._mesh.data.size
        self._shares.append(cost_s / (sums[_STEP] / self._mesh.everyone.size))
        # The first one is slow, as everything is at first, and says little about the others.
        every = max(2, math.ceil(median(self._shares) / SHARE)) if sent.step > 1 else 2
        self._next = sent.step + every
        of_parts, of_whole, parts = sums[_PARTS] * sent.to_mean, sums[_WHOLE], round(sums[_COUNT])
        if parts < 2 or not math.isfinite(of_parts) or not math.isfinite(of_whole):
            return None
        measured = Measurement.of(sent.step + 1, sent.samples, parts, of_parts, of_whole)
        self._smoothing.add(measured)
        return StepNoise(measured, self._smoothing.scale(), every, cost_s)


def norms(gradient: torch.Tensor) -> torch.Tensor:
    """Norms of rows of `gradient`, 1-D, whose squares add up to its own: one sum of many numbers loses digits."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    wide = torch.float32 if gradient.element_size() < 4 else None
    whole = gradient.numel() // _ROW * _ROW
    if whole <= _ROW:
        small: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=wide).reshape(1)
        return small
    flat = gradient.reshape(-1)
    rest: torch.Tensor = torch.linalg.vector_norm(flat[whole:], dtype=wide).reshape(1)
    return torch.cat([torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=wide), rest])
