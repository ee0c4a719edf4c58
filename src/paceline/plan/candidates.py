"""Single processes and plain data parallelism: the layouts that are timed whatever their forecasts."""

from __future__ import annotations

from paceline.records import Cluster, Layout


def candidates(
    cluster: Cluster, batch_size: int, *, micro: int = 1, threads: int | None = None
) -> list[Layout]:
    """Layouts for a global batch of `batch_size` samples, the single processes first.

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
