"""Which layouts are worth timing on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from paceline.records import Cluster, Layout, Trial

LEAST_SHARE_FOR_WEIGHTS = 0.2
"""Of a step's time, spent on the optimizer and on exchanging gradients, from which on tensor parallelism is timed."""
LEAST_FOR_WEIGHTS_S = 0.005
"""And at least so long: in less time it would not have exchanged what it has to in every layer."""


def candidates(
    cluster: Cluster, batch_size: int, *, micro: int = 1, threads: int | None = None
) -> list[Layout]:
    """Layouts to time for a global batch of `batch_size` samples, the single processes first.

    One worker with one thread, one worker with all threads of its host, and data parallelism over 2, 4, …
    and all workers. Where the batch cannot be divided evenly among so many, that number is left out.

    Args:
        micro: micro-batches in every candidate.
        threads: what the user asked each worker to have; None: the host's cores are shared out.
    """
    cores = cluster.hosts[0].cores
    found: list[Layout] = []
    if cluster.device == "cpu":
        counts = sorted({1, cores}) if threads is None else [threads]
        found += [Layout(micro=micro, threads=count) for count in counts]
    else:
        found.append(Layout(micro=micro))
    for workers in _doubling(cluster.workers):
        layout = Layout(dp_replicate=workers, micro=micro, threads=_threads(cluster, workers, threads))
        if batch_size % (layout.data_parallel * micro) == 0:
            found.append(layout)
    return found


def further_candidates(cluster: Cluster, trials: Sequence[Trial]) -> list[Layout]:
    """Layouts that are worth timing in view of the first `trials`: tensor parallelism over the cores of one host.

    To find and prove how a model can be divided takes seconds, and tensor parallelism exchanges something in every
    layer. It pays where data parallelism makes every worker read all weights and write all gradients for few samples:
    there the optimizer and the exchange of gradients, which grow with the weights alone, take much of the step.
    """
    timed = [trial for trial in trials if trial.step_s]
    if cluster.device != "cpu" or len(cluster.hosts) > 1 or cluster.workers == 1 or not timed:
        return []
    fastest = min(timed, key=lambda trial: median(trial.step_s))
    for_weights_s = (fastest.optimizer_s or 0.0) + (fastest.communication_s or 0.0)
    if for_weights_s < max(LEAST_FOR_WEIGHTS_S, LEAST_SHARE_FOR_WEIGHTS * median(fastest.step_s)):
        return []
    workers = min(cluster.workers, cluster.hosts[0].cores)
    several = [trial.layout.threads for trial in timed if trial.workers == workers]
    return [Layout(tp=workers, threads=several[0] if several else None)]


def _threads(cluster: Cluster, workers: int, threads: int | None) -> int | None:
    """Threads of each of `workers` workers, filled host by host."""
    if cluster.device != "cpu":
        return None
    if threads is not None:
        return threads
    first = cluster.hosts[0]
    return max(1, first.cores // min(workers, first.workers))


def _doubling(most: int) -> list[int]:
    """2, 4, 8, … and `most` itself."""
    sizes, size = [], 2
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most] if most > 1 else []
