"""What rank 0 finds out of a job before anything else, for all workers: what multiplies its matrices, its precision,
and how images lie in memory.

They are kept with the measurements of the job. What gains about as much as it must would otherwise come out now this
way, now the other: runs of one job would not train alike, and what was measured of it would not be found again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.launch.spec import AUTO, RunSpec
from paceline.load import LoadedJob
from paceline.measure import store
from paceline.measure.machine import versions
from paceline.records import Cluster, Layout
from paceline.train import image_format, matmul_choice
from paceline.train.precision import choose_precision
from paceline.train.room import MEASURING_BYTES, why_no_room
from paceline.train.session import Datasets


def agree_on_matmul(
    spec: RunSpec, loaded: LoadedJob, datasets: Datasets, world: World, everyone: Group, cluster: Cluster
) -> None:
    """Have all workers' `datasets.matmul` decided alike, and this process multiply so. A collective call.

    It comes before the precision, as what bf16 gains depends on how fast fp32 is. In bf16 it is left to torch.

    Raises:
        PacelineError: the job fails on its first batch.
    """
    if spec.precision == "bf16":
        datasets.matmul.decide(None)
        return
    matmul_choice.agree_on_matmul(
        loaded.job,
        datasets,
        world,
        everyone,
        seed=spec.seed,
        once=lambda find: _once(spec, loaded, cluster, f"matmul by {world.local_size}", find),
    )


def agree_on_precision(
    spec: RunSpec, loaded: LoadedJob, datasets: Datasets, world: World, everyone: Group, cluster: Cluster
) -> tuple[str, str]:
    """`fp32` or `bf16` on all workers, and why. A collective call.

    Raises:
        PacelineError: the job fails on its first steps.
    """

    def choose(wanted: str) -> tuple[str, str]:
        return choose_precision(wanted, loaded.job, datasets, seed=spec.seed, device=world.device)

    chosen = None
    if world.rank == 0:
        if spec.precision != AUTO:
            chosen = choose(spec.precision)
        elif spec.layout != AUTO and Layout.parse(spec.layout).splits_model:
            chosen = "fp32", "the layout splits the model: what one process would gain was not timed"
        elif why := why_no_room(loaded.job, world.device.type, MEASURING_BYTES):
            chosen = "fp32", f"what one process would gain was not timed: {why}"
        else:
            chosen = _once(spec, loaded, cluster, "precision", lambda: choose(AUTO))
    precision, reason = everyone.gather_json(chosen, "the precision")[0]
    if precision == "bf16":  # torch takes oneDNN for it by itself
        datasets.matmul.decide(None)
    return precision, reason


def agree_on_images(
    spec: RunSpec,
    loaded: LoadedJob,
    datasets: Datasets,
    world: World,
    everyone: Group,
    cluster: Cluster,
    precision: str,
) -> None:
    """Have all workers' `datasets.images` decided alike, where that can be found out beforehand. A collective call.

    Raises:
        PacelineError: the job fails on its first batch.
    """
    image_format.agree_on_images(
        loaded.job,
        datasets,
        world,
        everyone,
        seed=spec.seed,
        precision=precision,
        once=lambda find: _once(spec, loaded, cluster, f"images in {precision}", find),
    )


def _once(spec: RunSpec, loaded: LoadedJob, cluster: Cluster, what: str, find: Callable[[], Any]) -> Any:
    """What was found of a job here within the last week, or is found now, and kept."""
    key = store.key_of(
        loaded.path, loaded.options, what, cluster.to_json(), versions(), loaded.job.batch_size
    )
    known = None if spec.remeasure else store.kept(key)
    if known is None or len(known) != 1:
        known = [find()]
        store.keep(key, known)
    return known[0]
