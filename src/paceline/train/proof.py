"""Proof that a layout trains what one process of plain PyTorch trains.

The job's real model takes a few steps on its real samples twice: in the layout, and on rank 0 in a loop that
knows nothing of layouts. Loss, every gradient, every parameter after its update and every buffer are compared.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from paceline.comm.mesh import Mesh
from paceline.errors import ProofError, WorkerError
from paceline.job import Job
from paceline.records import Difference, Proof
from paceline.split.determinism import default_type, deterministic
from paceline.split.finding import Found
from paceline.train.calling import caller
from paceline.train.comparison import Observed, Tensors, badness, compare, worst_of_each_kind
from paceline.train.data import GlobalBatch, ShareLoader, few_samples, is_iterable, map_tensors
from paceline.train.matmul import by_torch
from paceline.train.replica import Replica
from paceline.train.seeds import derive, seed_everything, seed_torch
from paceline.train.session import Datasets

STEPS = 2
"""The second step starts from what the first has left: parameters, buffers, optimizer state."""


def prove(job: Job, mesh: Mesh, datasets: Datasets, *, seed: int, device: torch.device) -> Proof:
    """`prove_and_find`, without what was found."""
    return prove_and_find(job, mesh, datasets, seed=seed, device=device)[0]


def prove_and_find(
    job: Job, mesh: Mesh, datasets: Datasets, *, seed: int, device: torch.device
) -> tuple[Proof, Found | None]:
    """Compare `STEPS` steps in `layout` with those of one process. A collective call.

    In float32; and where that shows a difference, once more in float64. ReLU and max-pooling turn a change in the
    last place into another gradient, for one in a thousand elements of a large batch: that is gone in float64,
    and an error in the layout is not.

    The plain side's optimizer is given the layout's gradients, after they were compared: so each update is
    judged for itself, and what an optimizer makes of rounding (Adam divides by it) is not held against the layout.

    Cost: on rank 0 the memory of two more models, and their time for `STEPS` steps; on the others of one.

    Returns:
        The same proof on every worker; and where the model was split, so that the training splits it there too.

    Raises:
        CollectiveError, JobError, …: what a step raises.
    """
    begin_s = time.perf_counter()
    arguments = (job, mesh, datasets, seed, device)
    proof, found = _prove_in(torch.float32, *arguments, None)
    if proof.status == "different" and not proof.parted:
        try:
            wide, _ = _prove_in(torch.float64, *arguments, found)
        except RuntimeError as error:
            # Some job insists on float32: then that has the last word.
            proof = proof.model_copy(update={"why_not_float64": str(error).splitlines()[0]})
        else:
            proof = proof.model_copy(update={"in_float64": wide.worst, "parted": wide.parted})
    gc.collect()  # models and their hooks refer to each other
    return proof.model_copy(update={"proof_s": time.perf_counter() - begin_s}), found


def _prove_in(
    dtype: torch.dtype,
    job: Job,
    mesh: Mesh,
    datasets: Datasets,
    seed: int,
    device: torch.device,
    found: Found | None,
) -> tuple[Proof, Found | None]:
    layout, group = mesh.layout, mesh.everyone
    with default_type(dtype):
        ours = _LayoutSide(job, mesh, datasets, dtype, found, seed=seed, device=device)
        plain = None
        if group.rank == 0:
            plain = _PlainSide(job, layout.micro, datasets, dtype, seed=seed, device=device)
        models = [ours.model, plain.model] if plain is not None else [ours.model]
        differences: list[Difference] = []
        samples, failure = 0, ""
        with deterministic(*models) as mode:
            random = False
            if plain is not None:
                # The others are not left waiting: this worker goes on, and tells them.
                try:
                    random = plain.draws_at_random()
                except RuntimeError as error:
                    failure = str(error)
            random, failure = group.gather_json([random, failure], "randomness")[0]
            if failure:
                raise RuntimeError(f"a step in one process failed: {failure}")
            for number in range(1, 1 + (0 if random else STEPS)):
                seen = ours.step()
                samples += seen.samples
                if plain is not None and not failure:
                    try:
                        with by_torch():
                            expected = plain.step(seen.gradients)
                        differences += compare(number, seen, expected)
                    except RuntimeError as error:
                        failure = str(error)
        parted = ours.how_parted()
    differences.sort(key=badness, reverse=True)
    proof = Proof(
        layout=layout,
        steps=0 if random else STEPS,
        samples=samples,
        compared=len(differences),
        worst=worst_of_each_kind(differences),
        switched_off=tuple(sorted(mode.switched_off)),
        drawn_at_random=random,
        parted=parted,
        left_whole=ours.left_whole,
        proof_s=0.0,
    )
    told = group.gather_json({"proof": proof.to_json(), "failure": failure}, "the proof")[0]
    if told["failure"]:
        raise RuntimeError(f"a step in one process failed: {told['failure']}")
    return Proof.from_json(told["proof"]), ours.found


def require(proof: Proof) -> None:
    """Raise `ProofError` where the layout does not compute what one process does."""
    if proof.status != "different":
        return
    raise ProofError(
        f"layout {proof.layout} does not train what one process trains: {proof.what_differs}",
        cause="the model or the loss mixes samples of a batch, depends on the rank, or keeps state of its own; "
        "or an error in paceline",
        next_step=f"`paceline verify FILE --layout {proof.layout}` shows the whole comparison; "
        "train in one process (--layout dp_replicate=1), or with --no-verify at your own risk",
    )


class _LayoutSide:
    """This worker's part of the layout's steps."""

    def __init__(
        self,
        job: Job,
        mesh: Mesh,
        datasets: Datasets,
        dtype: torch.dtype,
        found: Found | None,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._replica = Replica(
            job,
            seed=seed,
            device=device,
            precision="fp32",
            total_steps=job.steps or 1000,
            dtype=dtype,
            in_parts=mesh.layout.splits_model,
            images=datasets.images,
        )
        layout = mesh.layout
        self.model = self._replica.model
        if layout.splits_model:
            self._replica.split(mesh, _to_type(few_samples(job, datasets["train"], device), dtype), found)
        else:
            self._replica.attach(mesh)
        data = mesh.data
        self._batches = _batches(
            job, datasets, dtype, seed, layout.micro, size=data.size, rank=data.rank, device=device
        )
        self._gradients: Tensors = {}
        self._replica.optimizer.register_step_pre_hook(self._keep_gradients)

    def step(self) -> Observed:
        before = _copies(self._replica.state.parameters())
        result = self._replica.step(next(self._batches))
        return Observed(
            loss=result.loss,
            grad_norm=result.grad_norm,
            samples=result.samples,
            gradients=self._gradients,
            before=before,
            parameters=_copies(self._replica.state.parameters()),
            buffers=_copies(self._replica.state.buffers()),
        )

    @property
    def found(self) -> Found | None:
        return self._replica.found

    @property
    def left_whole(self) -> dict[str, str]:
        return self._replica.left_whole

    def how_parted(self) -> str:
        """How the workers' parameters differ; empty where they are the same."""
        try:
            self._replica.check_in_step()
        except WorkerError as error:
            return error.what
        return ""

    def _keep_gradients(self, *_: object) -> None:
        self._gradients = {
            name: None if gradient is None else gradient.clone()
            for name, gradient in self._replica.state.gradients()
        }


class _PlainSide:
    """The same steps as a script would write them: one process, the whole batch."""

    def __init__(
        self,
        job: Job,
        micro: int,
        datasets: Datasets,
        dtype: torch.dtype,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._job, self._device = job, device
        seed_everything(derive(seed, "model"))
        self.model: nn.Module = job.model().to(device, dtype)
        self.model.train()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = job.optimizer(self._trained)
        self._schedule = job.schedule(self._optimizer, job.steps or 1000) if job.schedule else None
        self._call = caller(job, self.model)
        self._batches = _batches(job, datasets, dtype, seed, micro, size=1, rank=0, device=device)
        self._next: GlobalBatch | None = None

    def draws_at_random(self) -> bool:
        """Whether the loss of one and the same batch changes with the seed."""
        self._next = next(self._batches)
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        losses = []
        with torch.no_grad():
            for seed in (1, 2):
                seed_torch(seed, self._device)
                part = self._next.parts[0]
                loss = self._job.loss(self._call(part.batch), part.batch)
                losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            for name, buffer in self.model.named_buffers():
                buffer.copy_(kept[name])
        return losses[0] != losses[1] and not all(map(math.isnan, losses))

    def step(self, given: Tensors) -> Observed:
        """One step; the update is made with the `given` gradients, after its own were kept."""
        batch = self._next or next(self._batches)
        self._next = None
        before = _copies(self.model.named_parameters())
        loss = self._backward(batch)
        norm = None
        if self._job.clip_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(self._trained, self._job.clip_norm))
        gradients = _gradients(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.grad = given.get(name)
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        self._optimizer.zero_grad()
        return Observed(
            loss=loss,
            grad_norm=norm,
            samples=batch.samples,
            gradients=gradients,
            before=before,
            parameters=_copies(self.model.named_parameters()),
            buffers=_copies(self.model.named_buffers()),
        )

    def _backward(self, batch: GlobalBatch) -> float:
        """Gradients of the batch's mean loss, micro-batch after micro-batch; the loss."""
        total = weights = 0.0
        for part in batch.parts:
            loss = self._job.loss(self._call(part.batch), part.batch)
            if isinstance(loss, tuple):
                part_sum, weight = loss
                part_sum.backward()
                total += float(part_sum.detach())
                weights += float(weight)
            else:
                (loss * part.share.samples).backward()
                total += float(loss.detach()) * part.share.samples
                weights += part.share.samples
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad.div_(weights)
        return total / weights


def _batches(
    job: Job,
    datasets: Datasets,
    dtype: torch.dtype,
    seed: int,
    micro: int,
    *,
    size: int,
    rank: int,
    device: torch.device,
) -> Iterator[GlobalBatch]:
    """The first global batches, their numbers in `dtype`; the next epoch's where one has too few."""
    dataset = datasets["train"]
    if is_iterable(dataset):
        # Each side reads a stream of its own.
        dataset = Datasets(job, seed)["train"]
    job = dataclasses.replace(job, loader_workers=0)
    loader = ShareLoader(job, dataset, seed=seed, micro=micro, size=size, rank=rank, device=device)
    for epoch in range(STEPS):
        for batch in loader.epoch(epoch):
            for part in batch.parts:
                part.batch = _to_type(part.batch, dtype)
            yield batch


def _to_type(batch: Any, dtype: torch.dtype) -> Any:
    return map_tensors(batch, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _gradients(model: nn.Module) -> Tensors:
    return {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _copies(tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors if tensor is not None}
