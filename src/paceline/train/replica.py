"""One worker's copy of the model, and one step of its training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import Mesh, data_mesh
from paceline.errors import JobError
from paceline.job import Job
from paceline.split.apply import SplitModel
from paceline.split.batchnorm import BatchShare, share_batch_norms, uses_batch_statistics
from paceline.split.deferred import DeferredParameters
from paceline.split.finding import Found
from paceline.split.groupnorm import GroupNorms
from paceline.train import training_state
from paceline.train.allocator import give_back_freed_memory
from paceline.train.calling import caller
from paceline.train.data import GlobalBatch, Part, evaluation_parts, repeated
from paceline.train.device_clock import StepClock
from paceline.train.evaluation import Totals
from paceline.train.first_step import decide_on_images, decide_on_matmul
from paceline.train.held_model import HeldModel
from paceline.train.images import ImageFormat
from paceline.train.matmul import Matmul, is_available, may_be_large
from paceline.train.noise import NoiseMeter
from paceline.train.optimizer_state import needs_whole_parameters
from paceline.train.pipeline import Pipeline
from paceline.train.reduction import Reduction
from paceline.train.seeds import derive, seed_torch
from paceline.train.state import WholeState
from paceline.train.step import (
    CHANGE,
    NOISE,
    STOP,
    SUMS,
    WEIGHT,
    WEIGHTED,
    StepResult,
    StepSums,
    mean_loss,
)
from paceline.train.training_state import TrainingState


class Replica:
    """One worker's model, or its part of one, trained in step with the others'.

    The global batch's loss is `Σ sum / Σ weight` over micro-batches and workers; each worker's
    backward pass computes its part of that one sum, and the parts are added up.
    """

    def __init__(
        self,
        job: Job,
        *,
        seed: int,
        device: torch.device,
        precision: str,
        total_steps: int | None,
        dtype: torch.dtype | None = None,
        in_parts: bool = False,
        images: ImageFormat | None = None,
        matmul: Matmul | None = None,
    ) -> None:
        """
        Args:
            precision: `fp32`, or `bf16` for autocast with float32 parameters.
            dtype: of the parameters; None: as the job says.
            in_parts: `split` will be called: the whole model need not be in memory.
            images: how they are to lie in memory; None, or undecided: found in the first step, if the model is whole.
            matmul: what multiplies matrices; undecided: found in the first step, if the model is whole.
            total_steps: what the job's schedule is given; None where the length is not known.
        """
        self.job = job
        self.device = device
        self.precision = precision
        self.stop_requested = False
        self.change_requested = False
        self._seed = seed
        self._num_steps = 0
        self._clock = StepClock(device)
        self._has_state = False
        """A step has been taken here."""
        self._held = HeldModel(
            job, seed=seed, device=device, dtype=dtype, in_parts=in_parts, num_sums=SUMS.num
        )
        self.model, self.optimizer = self._held.model, self._held.optimizer
        self.scheduler = None
        if job.schedule is not None:
            if total_steps is None:
                raise JobError(
                    "the schedule needs the number of steps, which is not known",
                    cause="an iterable data set has no length",
                    next_step="give --steps, or steps= in the job",
                )
            self.scheduler = job.schedule(self.optimizer, total_steps)
        self._share = BatchShare()
        self.takes_statistics = bool(share_batch_norms(self.model, self._share))
        """Its batch norms take statistics over all workers among which a micro-batch is split."""
        self._group_norms = GroupNorms(self.model)
        self.call = caller(job, self.model)
        self._mesh = data_mesh(Group.alone(device))
        self._reductions: dict[Group, Reduction] = {}
        self._pipeline: Pipeline | None = None
        self._noise = NoiseMeter([], self._mesh, None)
        # What one replica finds out for itself is not told to others: not all workers take part in it.
        self.images = images if images is not None and images.is_decided else ImageFormat()
        self._matmul = matmul
        self._reduction = self._reduction_of(self._mesh)
        self.model.train()

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return self._held.num_parameters

    @property
    def state(self) -> WholeState:
        """The whole model, as far as workers hold parts of it."""
        return self._held.state

    @property
    def why_not_shared(self) -> str:
        """Why each worker keeps all parameters for itself, where that is not what was to be expected."""
        return self._held.why_not_shared

    @property
    def left_whole(self) -> dict[str, str]:
        """Pieces of the model that tensor parallelism does not divide, as they failed their proof, and why."""
        return {} if self.found is None else dict(self.found.left_whole)

    @property
    def why_cut_so(self) -> str:
        """Why the pipeline's stages are not cut as was to be expected, in a sentence; empty where they are."""
        return "" if self.found is None else self.found.why_cut_so

    @property
    def found(self) -> Found | None:
        """Where the model was split."""
        return None if self._held.parts is None else self._held.parts.found

    @property
    def parts(self) -> SplitModel | None:
        """What `split` has made of the model."""
        return self._held.parts

    @property
    def deferred(self) -> DeferredParameters:
        """Which parameters have no values yet: of a replica built in parts, until `split`."""
        return self._held.deferred

    def among(self, group: Group) -> contextlib.AbstractContextManager[None]:
        """Within it micro-batches are split among the workers of `group`."""
        return self._share.among(group)

    def attach(self, mesh: Mesh) -> None:
        """Train in step with the workers of `mesh`, each with the whole model; all start from rank 0's.

        Once; or several times, with workers that have no memory in common.
        """
        self._mesh = mesh
        self._held.attach(mesh)
        self._reduction = self._reduction_of(mesh)

    def split(self, mesh: Mesh, samples: list[Any], found: Found | None = None) -> None:
        """Take this worker's part of the model, as `mesh.layout` says; once, before the first step.

        Args:
            samples: small batches, on which the model is followed to find out where it can be split.
            found: what was found out earlier, for the same job and layout.

        Raises:
            LayoutError: the model cannot be split so.
        """

        def run(batch: Any) -> None:
            self.job.loss(self.call(batch), batch)

        self._mesh = mesh
        runs = [functools.partial(run, batch) for batch in samples]
        micro_batch = self.job.batch_size / (mesh.layout.data_parallel * mesh.layout.micro)

        def timed() -> None:
            run(self.images.arrange(repeated(samples[0], micro_batch)))

        parts = self._held.split(mesh, runs, found, timed)
        self._reductions.clear()
        if mesh.layout.pp > 1:
            self._pipeline = Pipeline(parts, mesh.layout, self.device, self.call, self.forward_context)
            self._group_norms.in_parts = self._pipeline.in_parts
        self._reduction = self._reduction_of(mesh)

    def collect(self) -> TrainingState:
        """What this training has come to, on rank 0. A collective call. Raises as `optimizer_state.collect`."""
        return training_state.collect(self._held, self.scheduler, self._num_steps, self._mesh.everyone)

    def load(self, state: TrainingState | None) -> None:
        """Go on from what rank 0 gives, after `attach` or `split`. A collective call.

        The gradient noise scale is measured anew.
        """
        self._num_steps = training_state.load(state, self._held, self.scheduler, self._mesh.everyone)

    def why_not_movable(self) -> str:
        """Why `collect` cannot be called, as far as this worker knows; empty if it can."""
        return training_state.why_not_movable(self._held, self.scheduler)

    @property
    def needs_whole_parameters(self) -> bool:
        """Whether the optimizer keeps something here that no layout may divide with its parameter."""
        return needs_whole_parameters(self.optimizer, self._held.trained_pieces())

    @property
    def state_bytes(self) -> int:
        """Of what is here of parameters and of the optimizer's state."""
        return training_state.num_bytes(self._held)

    def measure_noise(self) -> str:
        """Measure the gradient noise scale from now on, after `attach` or `split`; why not, or what is left out."""
        mixes = any(uses_batch_statistics(module) for module in self.model.modules())
        self._noise = NoiseMeter(self._held.local, self._mesh, self.job.batch_size, mixes_samples=mixes)
        return self._noise.lacks

    def _reduction_of(self, mesh: Mesh) -> Reduction:
        held = self._held
        if mesh.everyone not in self._reductions:
            links = self._pipeline.links if self._pipeline is not None else None
            stages = self._pipeline.first_stage_of if self._pipeline is not None else {}
            self._reductions[mesh.everyone] = Reduction(
                mesh, held.local, SUMS, held.sharded, held.shared, links, stages
            )
        return self._reductions[mesh.everyone]

    def step(self, batch: GlobalBatch) -> StepResult:
        """Forward, backward, one update, over one global batch.

        Raises:
            LossError: the loss is no scalar, not finite, or its weights sum to zero.
            CollectiveError: another worker did not answer.
        """
        self._find_out(batch.parts[0].batch)
        self._clock.begin(self._mesh.waited_s)
        self._held.begin_pass()
        self._noise.begin(batch, self._num_steps)
        own = self._accumulate(batch)
        stop, change, self.change_requested = self.stop_requested, self.change_requested, False
        local = own.close(self._noise, stop=stop, change=change)
        self._clock.end_backward(self._mesh.waited_s)
        sums = self._reduce(local, weighted=own.weighted and not self._is_whole(batch)).tolist()
        self._clock.end_reduction()
        loss = mean_loss(sums, self._num_steps + 1)
        weight = sums[WEIGHT] if sums[WEIGHTED] > 0 else None
        noise = self._noise.take(sums[NOISE], weight, self._reduction.counted_gradients)
        grad_norm = None
        if self.job.clip_norm is not None:
            grad_norm = self._reduction.clip_(self.job.clip_norm)
        lr = [float(g["lr"]) for g in self.optimizer.param_groups]
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._held.publish()
        self._num_steps += 1
        times = self._clock.end()
        if not self._has_state:
            # The optimizer's state lies where it will be: what is free between its parts is not held on top of a step.
            self._has_state = True
            give_back_freed_memory()
        return StepResult(
            loss=loss,
            samples=batch.samples,
            lr=lr,
            grad_norm=grad_norm,
            stop=sums[STOP] > 0,
            step_s=times.step_s + batch.data_s,
            compute_s=times.compute_s,
            communication_s=times.communication_s,
            optimizer_s=times.optimizer_s,
            data_s=batch.data_s,
            noise=noise,
            change=sums[CHANGE] > 0,
        )

    def evaluate(self, dataset: Any) -> tuple[dict[str, float], int]:
        """Metrics over the test split (`loss` among them) and the number of its samples.

        What steps have freed is given back before, and what the evaluation has freed afterwards: neither is held beside
        what the other needs.

        Raises:
            WorkerError: the workers' parameters have parted.
        """
        self.check_in_step()
        totals, data = Totals(self.job), self._mesh.data
        has_outputs = self._pipeline is None or self._pipeline.has_last
        self.model.eval()
        try:
            self._held.begin_pass()
            give_back_freed_memory()
            with torch.no_grad(), self._share.among(data):
                # Batch norms without running statistics take those of the whole batch, as they do in every layout.
                mixes = any(uses_batch_statistics(module) for module in self.model.modules())
                micro = 1 if mixes else self._mesh.layout.micro
                for part in evaluation_parts(
                    self.job, dataset, micro=micro, size=data.size, rank=data.rank, device=self.device
                ):
                    self._share.counts = not part.share.borrowed
                    with self.forward_context():
                        outputs = self._outputs(part)
                        if has_outputs:
                            totals.add(outputs, part, counts=self._mesh.tensor.rank == 0)
            if self._pipeline is not None:
                self._pipeline.end_evaluation()
            self._held.end_evaluation()
        finally:
            self.model.train()
        give_back_freed_memory()
        return totals.over(self._mesh.everyone)

    def _outputs(self, part: Part) -> Any:
        part.batch = self.images.arrange(part.batch)
        if self._pipeline is None:
            return self.call(part.batch)
        return self._pipeline.evaluate(part, derive(self._seed, "evaluation", part.share.begin))

    def check_in_step(self) -> None:
        """Raise `WorkerError` unless workers that should hold the same parameters do, bit for bit in their sums."""
        self._held.check_in_step(self._mesh, f"after step {self._num_steps}")

    def _accumulate(self, batch: GlobalBatch) -> StepSums:
        """Backward over this worker's parts; its share of the step's sums."""
        sums = StepSums(self.device)
        is_whole = self._is_whole(batch)

        def seed_of(part: Part) -> int:
            return derive(self._seed, "forward", self._num_steps, part.share.begin)

        def loss_of(part: Part, outputs: Any) -> torch.Tensor:
            with self.forward_context():
                loss = self.job.loss(outputs, part.batch)
            return sums.weigh(loss, part, batch.samples, self._noise, is_whole=is_whole)  # type: ignore[no-any-return]

        for part in batch.parts:
            part.batch = self.images.arrange(part.batch)
        with self._share.among(self._mesh.data):
            if self._pipeline is not None:
                self._pipeline.step(batch, seed_of, loss_of, self._begin_part)
            else:
                for position, part in enumerate(batch.parts):
                    seed_torch(seed_of(part), self.device)
                    self._begin_part(part)
                    with self.forward_context():
                        outputs = self.call(part.batch)
                    to_differentiate = loss_of(part, outputs)
                    del outputs  # the backward pass keeps what it needs of them
                    self._reduction.begin_backward(last=position == len(batch.parts) - 1)
                    to_differentiate.backward()
        return sums

    def _find_out(self, batch: Any) -> None:
        """Decide what was left to the first step, on its first micro-batch."""
        group, is_whole = self._mesh.everyone, self._held.parts is None
        if not self.images.is_decided:
            decide_on_images(self.images, batch, self.try_out, group, is_whole=is_whole)
        if self._matmul is not None and not self._matmul.is_decided:
            may = self.device.type == "cpu" and self.precision == "fp32" and is_available()
            may_try = is_whole and may_be_large(self.model, batch)
            arranged = self.images.arrange(batch)
            decide_on_matmul(self._matmul, arranged, self.try_out, group, may_try=may_try, may=may)

    def try_out(self, batch: Any) -> float:
        """A forward and a backward pass that leave nothing behind; the loss."""
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                with self.forward_context():
                    loss = self.job.loss(self.call(batch), batch)
                loss = loss[0] if isinstance(loss, tuple) else loss
                torch.autograd.grad(loss, self._held.trained, allow_unused=True)
        finally:
            for buffer, values in kept:
                buffer.copy_(values)
        return float(loss.detach())

    def _begin_part(self, part: Part) -> None:
        """Before the forward or the backward pass of a micro-batch: whose it is."""
        self._share.counts = not part.share.borrowed
        self._noise.compute(part)

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """What calls of the model and of the loss run in."""
        if self._held.parts is None:
            return self._autocast()
        return self._within_parts(self._held.parts)

    @contextlib.contextmanager
    def _within_parts(self, parts: SplitModel) -> Iterator[None]:
        with parts.computing(), self._autocast():
            yield

    def _is_whole(self, batch: GlobalBatch) -> bool:
        """This worker computes the whole global batch in one piece: nothing is left to weigh."""
        return self._mesh.everyone.size == 1 and len(batch.parts) == 1

    def _reduce(self, sums: torch.Tensor, *, weighted: bool) -> torch.Tensor:
        if self._mesh.everyone.size > 1:
            return self._reduction.finish(sums, weighted=weighted)
        if weighted and sums[WEIGHT]:
            gradients = [p.grad for p in self._held.trained if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / float(sums[WEIGHT]))
        return sums

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()
