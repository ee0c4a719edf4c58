"""`Session`: training in a loop of one's own, right in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import Mesh, make_mesh
from paceline.comm.threads import take_cores
from paceline.comm.world import AUTO, World, join
from paceline.errors import LayoutError, RunError
from paceline.job import Job
from paceline.measure.machine import device_kind
from paceline.records import Layout
from paceline.split.finding import Found
from paceline.train.allocator import keep_freed_memory
from paceline.train.data import GlobalBatch, ShareLoader, few_samples
from paceline.train.images import ImageFormat
from paceline.train.matmul import Matmul, use_onednn
from paceline.train.replica import Replica
from paceline.train.seeds import derive, seed_everything
from paceline.train.step import StepResult
from paceline.train.training_state import TrainingState

DEFAULT_TIMEOUT_S = 300.0


class Datasets:
    """The job's data sets, each built once per worker and under the run's seed."""

    def __init__(self, job: Job, seed: int) -> None:
        self._job, self._seed = job, seed
        self._built: dict[str, Any] = {}
        self.images = ImageFormat()
        """How batches of images are to lie in memory, whatever the layout; undecided: as its first step finds."""
        self.matmul = Matmul()
        """What multiplies matrices, whatever the layout; undecided: as the first step of a whole model finds."""

    def __getitem__(self, split: str) -> Any:
        if split not in self._built:
            seed_everything(derive(self._seed, "data", split == "test"))
            self._built[split] = self._job.data(split)
        return self._built[split]


class Session:
    """One worker's side of a training: it gives out batches and steps on them.

    ```python
    with paceline.Session(job) as session:
        for batch in session.batches(epochs=3):
            metrics = session.step(batch)
    ```

    Started by plain `python`, it trains in one process with all threads; started by
    `torchrun --nproc-per-node N`, on all N workers. Every worker runs the same loop.

    A session sets this process up to train: its threads, the cores it may use, and malloc, which is told to
    keep freed memory (`MALLOC_TRIM_THRESHOLD_` in the environment leaves malloc as it is).
    """

    def __init__(
        self,
        job: Job,
        layout: Layout | str | None = None,
        *,
        seed: int = 0,
        total_steps: int | None = None,
        precision: str = "fp32",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: str = AUTO,
        world: World | None = None,
        mesh: Mesh | None = None,
        datasets: Datasets | None = None,
        found: Found | None = None,
        measure_noise: bool = True,
    ) -> None:
        """
        Args:
            layout: a `Layout` or its text; None: the batch split over all workers that were started.
            total_steps: the length of the training, which the job's schedule is given; by default
                the job's own `steps` or `epochs`.
            precision: `fp32` or `bf16`.
            timeout_s: the limit of every wait for another worker.
            transport: what carries tensors between workers on CPUs: `gloo`, or `auto` for shared memory
                within a host; `session.group.transport` says which it is.
            world, mesh, datasets: where the caller has joined and built them already.
            found: where the model is split, as the layout was proven.
            measure_noise: the gradient noise scale (`StepResult.noise`), in every so many steps.

        Raises:
            LayoutError: the layout does not fit the batch or the workers.
            JobError: the job cannot be built.
        """
        self._owns_world = world is None
        self.world = join(device_kind(), timeout_s, transport=transport) if world is None else world
        self.layout = _settle(layout, self.world.size if mesh is None else mesh.everyone.size)
        self.layout.check_batch(job.batch_size)
        if mesh is None:
            mesh = make_mesh(self.world, self.layout)
            assert mesh is not None  # _settle has seen that all workers are in it
        self.mesh = mesh
        self.job = job
        self.datasets = datasets or Datasets(job, seed)
        self._owns_datasets = datasets is None
        keep_freed_memory()
        take_cores(self.world.local_rank, self.local_workers, self.layout.threads)
        self._loader = ShareLoader(
            job,
            self.datasets["train"],
            seed=seed,
            micro=self.layout.micro,
            size=mesh.data.size,
            rank=mesh.data.rank,
            device=self.world.device,
        )
        if total_steps is None:
            total_steps = self._default_steps()
        self._replica = Replica(
            job,
            seed=seed,
            device=self.world.device,
            precision=precision,
            total_steps=total_steps,
            in_parts=self.layout.splits_model,
            images=self.datasets.images,
            matmul=self.datasets.matmul,
        )
        if self.layout.splits_model:
            self._replica.split(mesh, few_samples(job, self.datasets["train"], self.world.device), found)
        else:
            self._replica.attach(mesh)
        self._what_noise_lacks = self._replica.measure_noise() if measure_noise else ""

    @property
    def group(self) -> Group:
        """All workers of the layout."""
        return self.mesh.everyone

    @property
    def local_workers(self) -> int:
        """Workers of this layout on this host."""
        return min(self.world.local_size, self.layout.workers)

    @property
    def model(self) -> torch.nn.Module:
        """The model on this worker; where the layout splits the model, only a part of it is here."""
        return self._replica.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer on this worker; its parameter groups may be changed between steps."""
        optimizer: torch.optim.Optimizer = self._replica.optimizer
        return optimizer

    @property
    def num_parameters(self) -> int:
        return self._replica.num_parameters

    @property
    def left_whole(self) -> dict[str, str]:
        """Pieces of the model that tensor parallelism does not divide, as they failed a proof of their own, and why."""
        return self._replica.left_whole

    @property
    def why_cut_so(self) -> str:
        """Why the pipeline's stages are not cut as was to be expected, in a sentence; empty where they are."""
        return self._replica.why_cut_so

    @property
    def why_not_shared(self) -> str:
        """Why workers of one host have each a copy of the parameters, where they could have one; else empty."""
        return self._replica.why_not_shared

    @property
    def what_noise_lacks(self) -> str:
        """Why the gradient noise scale is not measured, or what it leaves out; else empty."""
        return self._what_noise_lacks

    @property
    def channels_last(self) -> float | None:
        """Where images are turned over so that their channels come last: the share of the time that it takes then."""
        return self._replica.images.ratio

    @property
    def batches_per_epoch(self) -> int | None:
        """None where the data set is iterable."""
        return self._loader.batches_per_epoch

    def batches(
        self, epochs: int | None = None, steps: int | None = None, after: tuple[int, int] = (0, 0)
    ) -> Iterator[GlobalBatch]:
        """This worker's part of each global batch, for `epochs` or `steps`, whichever ends first.

        Args:
            after: where to go on: so many epochs, and so many batches of the next one, were taken before. `epochs` are
                those in all, `steps` those from now on.

        Raises:
            RunError: neither is given, here or in the job.
            DataError: the data cannot be read.
        """
        if epochs is None and steps is None:
            epochs, steps = (self.job.epochs, None) if self.job.steps is None else (None, self.job.steps)
        if epochs is None and steps is None:
            raise RunError(
                "the training has no length",
                next_step="give epochs= or steps=, here or in the job (--epochs or --steps)",
            )
        (epoch, skip), done = after, 0
        while epochs is None or epoch < epochs:
            for batch in self._loader.epoch(epoch, skip):
                yield batch
                done += 1
                if done == steps:
                    return
            epoch, skip = epoch + 1, 0

    def step(self, batch: GlobalBatch) -> StepResult:
        """Train on one global batch: forward, backward, update. All workers call it in the same order."""
        return self._replica.step(batch)

    def evaluate(self) -> dict[str, float]:
        """The job's metrics, and the loss, over its test split. All workers call it."""
        return self.evaluate_counted()[0]

    def evaluate_counted(self) -> tuple[dict[str, float], int]:
        """`evaluate`, and the number of samples."""
        return self._replica.evaluate(self.datasets["test"])

    def whole_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's parameters and buffers by name, whole, on rank 0; on others what is there. All call it."""
        yield from self._replica.state.parameters()
        yield from self._replica.state.buffers()

    def describe_state(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and whole shape of what `whole_state` gives and is kept with the model."""
        return self._replica.state.describe()

    def request_stop(self) -> None:
        """Ask all workers to stop: the next step's result has `stop` set on each of them."""
        self._replica.stop_requested = True

    def request_change(self) -> None:
        """On rank 0: the next step's result has `change` set on all workers."""
        self._replica.change_requested = True

    def collect_state(self) -> TrainingState:
        """All that the training has come to, whole, on rank 0: another session of the job can `load_state` it.

        All workers call it, between steps.

        Raises:
            LayoutError: the optimizer keeps something that cannot be made whole.
        """
        return self._replica.collect()

    def load_state(self, state: TrainingState | None) -> None:
        """Go on from what rank 0 gives, before the first step, in any layout. All workers call it."""
        self._replica.load(state)

    def why_not_movable(self) -> str:
        """Why `collect_state` cannot be called, as far as this worker knows; empty if it can."""
        return self._replica.why_not_movable()

    @property
    def needs_whole_parameters(self) -> bool:
        """Whether the optimizer keeps something here that no layout may divide with its parameter."""
        return self._replica.needs_whole_parameters

    @property
    def state_bytes(self) -> int:
        """Of what this worker has of parameters and of the optimizer's state."""
        return self._replica.state_bytes

    def close(self) -> None:
        """Leave the other workers, where this session joined them, and matrices to torch, if it changed that."""
        if self._owns_datasets:
            use_onednn(False)
        if self._owns_world:
            self.world.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _default_steps(self) -> int | None:
        if self.job.steps is not None or self.job.epochs is None:
            return self.job.steps
        per_epoch = self.batches_per_epoch
        return None if per_epoch is None else self.job.epochs * per_epoch


def _settle(layout: Layout | str | None, num_workers: int) -> Layout:
    if layout is None:
        return Layout(dp_replicate=num_workers)
    if isinstance(layout, str):
        layout = Layout.parse(layout)
    if layout.workers != num_workers:
        raise LayoutError(
            f"layout {layout} needs {layout.workers} workers, and {num_workers} are here",
            cause="a script that is started by `python` is one worker"
            if num_workers == 1
            else "the launcher started another number",
            next_step=f"start it with `torchrun --nproc-per-node {layout.workers}`, or leave the layout out",
        )
    return layout
