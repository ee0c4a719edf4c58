"""Everything that can be checked before a worker starts."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import default_collate

from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.comm.world import resolve_transport
from paceline.errors import DataError, JobError, LayoutError, PacelineError
from paceline.job import Job
from paceline.launch.spec import AUTO, RunSpec
from paceline.load import LoadedJob, load_job_file
from paceline.records import Layout
from paceline.train.compiler import put_off_compiler
from paceline.train.data import GlobalBatch, Part, is_iterable, num_batches, num_samples
from paceline.train.matmul import wanted_library
from paceline.train.order import Share
from paceline.train.pipeline import schedule_of
from paceline.train.precision import check_precision
from paceline.train.replica import Replica
from paceline.train.room import MEASURING_BYTES, TRAINING_BYTES, why_no_room
from paceline.train.session import Datasets
from paceline.train.target import Target


def preflight(spec: RunSpec, device: str, max_workers: int) -> LoadedJob:
    """Load the job and try it on two samples; every mistake found here costs no worker.

    Args:
        device: `cpu` or `cuda`; the trial step is made on a CPU only, as the launcher keeps off GPUs.
        max_workers: how many workers there can be.

    Raises:
        PacelineError: whatever is wrong with the job, the layout or the run's length.
    """
    loaded = load_job_file(spec.job_file, spec.settings)
    job = loaded.job
    check_precision(spec.precision)
    resolve_transport(spec.transport, device)
    wanted_library()
    if spec.replan and spec.layout != AUTO:
        raise LayoutError(
            f"--replan is given with --layout {spec.layout}",
            cause="--replan changes the layout, and a layout that is asked for is kept",
            next_step="leave out one of them",
        )
    if spec.layout != AUTO:
        _check_layout(Layout.parse(spec.layout), job.batch_size, device, max_workers)
    if spec.until is not None:
        Target.parse(spec.until, job)
    datasets = Datasets(job, spec.seed)
    dataset = _build(datasets, "train")
    per_epoch = num_batches(dataset, job.batch_size)
    planned = spec.length(job, per_epoch)
    num_samples(_build(datasets, "test"), "test")
    if device == "cpu" and not _why_no_trial(spec, job, device):
        _try_step(loaded, datasets, spec.seed, planned.steps)
    return loaded


def _check_layout(layout: Layout, batch_size: int, device: str, max_workers: int) -> None:
    layout.check_batch(batch_size)
    schedule_of(layout)
    if device == "cuda" and layout.workers > max_workers:
        raise LayoutError(
            f"layout {layout} needs {layout.workers} workers, and this host has {max_workers} GPUs",
            next_step=f"use at most dp_replicate={max_workers}, or start on more hosts with torchrun",
        )


def _why_no_trial(spec: RunSpec, job: Job, device: str) -> str:
    """Why one process, or all workers of this host where each of them tries it, cannot train the whole model."""
    if spec.layout == AUTO:
        return why_no_room(job, device, MEASURING_BYTES * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return why_no_room(job, device, TRAINING_BYTES) if Layout.parse(spec.layout).splits_model else ""


def _build(datasets: Datasets, split: str) -> Any:
    try:
        return datasets[split]
    except PacelineError:
        raise
    except Exception as error:
        raise DataError(
            f"data({split!r}) raised {type(error).__name__}: {error}",
            cause="an error in the job's data function",
            next_step=f"call the job's data({split!r}) in a Python shell",
        ) from error


def _try_step(loaded: LoadedJob, datasets: Datasets, seed: int, total_steps: int | None) -> None:
    """One training step on two samples, in this process."""
    put_off_compiler()
    job, device = loaded.job, torch.device("cpu")
    samples = _first_samples(datasets["train"], 2)
    try:
        batch = (job.collate or default_collate)(samples)
    except Exception as error:
        raise DataError(
            f"collating two samples failed: {type(error).__name__}: {error}",
            cause="samples of unequal shapes, or of a type that default_collate does not know",
            next_step="give the job a collate function",
        ) from error
    count = len(samples)
    part = Part(batch, Share(0, count, borrowed=False))
    try:
        replica = Replica(job, seed=seed, device=device, precision="fp32", total_steps=total_steps or 1)
        replica.attach(data_mesh(Group.alone(device)))
        replica.step(GlobalBatch(0, 0, count, [part], 0.0))
    except PacelineError:
        raise
    except Exception as error:
        raise JobError(
            f"a training step on two samples raised {type(error).__name__}: {error}",
            cause="model, loss, optimizer or inputs do not fit together",
            next_step="compare what the data set gives with what model.forward takes (see `inputs` of paceline.Job)",
        ) from error


def _first_samples(dataset: Any, count: int) -> Any:
    try:
        if not is_iterable(dataset):
            indices = list(range(min(count, len(dataset))))
            if hasattr(dataset, "__getitems__"):
                return dataset.__getitems__(indices)
            return [dataset[i] for i in indices]
        samples = [sample for _, sample in zip(range(count), dataset, strict=False)]
    except Exception as error:
        raise DataError(
            f"reading the first training sample raised {type(error).__name__}: {error}",
            cause="an error in the data set",
            next_step="try data('train')[0] in a Python shell",
        ) from error
    if not samples:
        raise DataError(
            "data('train') gave no sample",
            cause="an empty stream, or an iterator that can be read only once",
            next_step="look at what the job's data function reads",
        )
    return samples
