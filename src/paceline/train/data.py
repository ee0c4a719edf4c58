"""From a data set to this worker's shares of the global batches."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from paceline.errors import DataError
from paceline.job import Job
from paceline.train.order import Share, batches_per_epoch, epoch_order, shares
from paceline.train.seeds import derive, mix

_FEW = 10
FEW_TOGETHER = 2


@dataclasses.dataclass
class Part:
    """This worker's share of one micro-batch, collated and on the device."""

    batch: Any
    share: Share


@dataclasses.dataclass
class GlobalBatch:
    """One global batch as this worker sees it: its shares of the micro-batches."""

    epoch: int
    index: int
    """Number of the batch within its epoch."""
    samples: int
    """Samples of the whole global batch."""
    parts: list[Part]
    data_s: float
    """Seconds that this worker waited for it."""


def is_iterable(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def num_samples(dataset: Any, split: str) -> int | None:
    """Length of a map-style data set; None for an iterable one.

    Raises:
        DataError: it is empty, or has neither `__getitem__` with `__len__` nor `__iter__`.
    """
    if is_iterable(dataset):
        if hasattr(dataset, "__iter__"):
            return None
        raise DataError(
            f"data({split!r}) gave {type(dataset).__name__}, which is no data set",
            next_step="return an object with __len__ and __getitem__, or an IterableDataset",
        )
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"data({split!r}) gave {type(dataset).__name__}, which has no length",
            next_step="define __len__, or make it an IterableDataset",
        )
    length = len(dataset)
    if length == 0:
        raise DataError(
            f"data({split!r}) is empty",
            cause="a path that matches nothing, or a filter that drops everything",
            next_step="look at what the job's data function reads",
        )
    return length


def num_batches(dataset: Any, batch_size: int) -> int | None:
    """Global batches in an epoch of the training split; None for an iterable data set."""
    length = num_samples(dataset, "train")
    return None if length is None else batches_per_epoch(length, batch_size)


class _Seeded:
    """A map-style data set whose samples may draw from torch's generator: seeded by (seed, epoch, index).

    Samples are read together, as far as the data set can. Once some of them have drawn, and these could depend on those
    read before them, each is read by itself, under its own seed; so are they then, once more.
    """

    def __init__(self, dataset: Any, base_seed: int) -> None:
        self._dataset = dataset
        self._base_seed = base_seed
        self._draws = False

    def __getitem__(self, index: int) -> Any:
        self._seed(index)
        return self._dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        read = getattr(self._dataset, "__getitems__", None)
        if not self._draws:
            self._seed(indices[0])
            before = torch.default_generator.get_state()
            samples = [self._dataset[index] for index in indices] if read is None else read(indices)
            self._draws = not torch.equal(torch.default_generator.get_state(), before)
            if not self._draws:
                return samples
        if read is None:
            return [self[index] for index in indices]
        samples = []
        for index in indices:
            self._seed(index)
            alone = read([index])
            if not isinstance(alone, list | tuple):
                raise DataError(
                    f"{type(self._dataset).__name__}.__getitems__ draws random numbers and gives "
                    f"{type(alone).__name__}, not a list of samples",
                    cause="samples that draw are read one by one, so that they are the same in every layout",
                    next_step="return a list of samples, or leave __getitems__ out",
                )
            samples.extend(alone)
        return samples

    def _seed(self, index: int) -> None:
        torch.default_generator.manual_seed(mix(self._base_seed, index))


def tensors_of(dataset: Any) -> tuple[list[torch.Tensor], torch.Tensor | None] | None:
    """The tensors that a data set's samples are rows of, and which rows; None where it is anything else.

    torch's `TensorDataset` and a `Subset` of it: known exactly, as a class derived from them may do more.
    """
    if type(dataset) is TensorDataset:
        return list(dataset.tensors), None
    if type(dataset) is Subset and (inside := tensors_of(dataset.dataset)) is not None:
        tensors, rows = inside
        chosen = torch.as_tensor(dataset.indices)
        return tensors, chosen if rows is None else rows[chosen]
    return None


class ShareLoader:
    """Yields this worker's `GlobalBatch`es, epoch after epoch, the same samples whatever the layout."""

    def __init__(
        self,
        job: Job,
        dataset: Any,
        *,
        seed: int,
        micro: int,
        size: int,
        rank: int,
        device: torch.device,
    ) -> None:
        self._job = job
        self._dataset = dataset
        self._seed = seed
        self._micro, self._size, self._rank = micro, size, rank
        self._device = device
        self._collate: Callable[[list[Any]], Any] = job.collate or default_collate
        self._num_samples = num_samples(dataset, "train")
        if self._num_samples is None and job.loader_workers:
            raise DataError(
                f"loader_workers={job.loader_workers} with an iterable data set",
                cause="the order of an iterable's samples is known only while it is read in one place",
                next_step="leave out loader_workers, or make the data set map-style",
            )

    @property
    def batches_per_epoch(self) -> int | None:
        """None where the data set is iterable."""
        return num_batches(self._dataset, self._job.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[GlobalBatch]:
        """The global batches of one epoch, in order.

        Args:
            skip: so many are left out at the beginning. An iterable data set is read from its beginning all the same.

        Raises:
            DataError: a sample cannot be read or collated, or an iterable data set is empty.
        """
        batches = (self._iterable_epoch if self._num_samples is None else self._map_epoch)(epoch, skip)
        while True:
            begin_s = time.perf_counter()
            try:
                batch = next(batches, None)
            except (DataError, KeyboardInterrupt):
                raise
            except Exception as error:
                raise DataError(
                    f"reading the training data failed: {type(error).__name__}: {error}",
                    cause="the data set's __getitem__ or __iter__, or collating samples of unequal shapes",
                    next_step="try data('train')[0], and `collate` on a few samples, in a Python shell",
                ) from error
            if batch is None:
                return
            batch.data_s = time.perf_counter() - begin_s
            yield batch

    def endless(self) -> Iterator[GlobalBatch]:
        """The global batches of one epoch after the other. Raises as `epoch`."""
        for number in itertools.count():
            yield from self.epoch(number)

    def _map_epoch(self, epoch: int, skip: int) -> Iterator[GlobalBatch]:
        assert self._num_samples is not None
        order = epoch_order(self._seed, epoch, self._num_samples)
        bounds = [
            (begin, min(begin + self._job.batch_size, len(order)))
            for begin in range(0, len(order), self._job.batch_size)
        ][skip:]

        def index_lists() -> Iterator[list[int]]:
            for begin, end in bounds:
                for s in self._shares(end - begin):
                    yield order[begin + s.begin : begin + s.end].tolist()

        loaded = self._load(index_lists(), epoch)
        for index, (begin, end) in enumerate(bounds, skip):
            mine = self._shares(end - begin)
            parts = [Part(to_device(next(loaded), self._device), share) for share in mine]
            yield GlobalBatch(epoch, index, end - begin, parts, 0.0)

    def _load(self, index_lists: Iterator[list[int]], epoch: int) -> Iterator[Any]:
        """Collated samples, one batch for each list of indices."""
        found = tensors_of(self._dataset) if self._collate is default_collate else None
        if found is not None and not self._job.loader_workers:
            # What taking row by row and stacking gives, in one call for each tensor.
            tensors, rows = found
            for indices in index_lists:
                wanted = torch.tensor(indices) if rows is None else rows[indices]
                yield [tensor[wanted] for tensor in tensors]
            return
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self._dataset, derive(self._seed, "samples", epoch)),  # type: ignore[arg-type]
            batch_sampler=index_lists,
            collate_fn=self._collate,
            num_workers=self._job.loader_workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator().manual_seed(derive(self._seed, "loader", epoch)),
        )
        yield from loader

    def _shares(self, batch_samples: int) -> list[Share]:
        return shares(batch_samples, self._micro, self._size, self._rank)

    def _iterable_epoch(self, epoch: int, skip: int) -> Iterator[GlobalBatch]:
        """Every worker reads the whole stream and keeps its shares: right for any iterable."""
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        stream = iter(self._dataset)
        index = 0
        while True:
            torch.default_generator.manual_seed(derive(self._seed, "samples", epoch, index))
            samples = _take(stream, self._job.batch_size)
            if not samples:
                break
            parts = (
                []
                if index < skip
                else [
                    Part(to_device(self._collate(samples[s.begin : s.end]), self._device), s)
                    for s in self._shares(len(samples))
                ]
            )
            if index >= skip:
                yield GlobalBatch(epoch, index, len(samples), parts, 0.0)
            index += 1
            if len(samples) < self._job.batch_size:
                return
        if index == 0:
            raise DataError(
                f"data('train') gave no sample in epoch {epoch}",
                cause="an iterator that can be read only once, or an empty stream"
                if epoch
                else "an empty stream",
                next_step="return a fresh iterator from __iter__",
            )


def evaluation_parts(
    job: Job, dataset: Any, *, micro: int, size: int, rank: int, device: torch.device
) -> Iterator[Part]:
    """This worker's shares of the test split's batches, each cut into `micro` micro-batches, in its own order.

    As many on every worker.
    """
    batch_size = job.evaluation_batch_size or job.batch_size
    collate: Callable[[list[Any]], Any] = job.collate or default_collate
    length = num_samples(dataset, "test")
    if length is None:
        stream = iter(dataset)
        while samples := _take(stream, batch_size):
            for share in shares(len(samples), micro, size, rank):
                yield Part(to_device(collate(samples[share.begin : share.end]), device), share)
        return
    begins = range(0, length, batch_size)
    mine = [
        (begin, share)
        for begin in begins
        for share in shares(min(batch_size, length - begin), micro, size, rank)
    ]
    index_lists = [list(range(begin + share.begin, begin + share.end)) for begin, share in mine]
    loader = DataLoader(
        dataset, batch_sampler=index_lists, collate_fn=collate, num_workers=job.loader_workers
    )
    for (_, share), batch in zip(mine, loader, strict=True):
        yield Part(to_device(batch, device), share)


def first_samples(dataset: Any, split: str, count: int) -> Any:
    """The first `count` samples as a data set."""
    length = num_samples(dataset, split)
    return _take(iter(dataset), count) if length is None else Subset(dataset, range(min(count, length)))


def few_samples(job: Job, dataset: Any, device: torch.device) -> list[Any]:
    """Small batches of the training split, of `FEW_TOGETHER` samples each."""
    collate: Callable[[list[Any]], Any] = job.collate or default_collate
    length = num_samples(dataset, "train")
    samples = _take(iter(dataset), _FEW) if length is None else [dataset[i] for i in range(min(_FEW, length))]
    starts = range(0, max(1, len(samples) - FEW_TOGETHER + 1), FEW_TOGETHER)
    groups = [samples[begin : begin + FEW_TOGETHER] for begin in starts]
    return [to_device(collate(group), device) for group in groups]


def repeated(batch: Any, samples: float) -> Any:
    """One of `few_samples` as large as about so many samples: tensors again and again, the rest as it is."""
    times = max(1, round(samples / FEW_TOGETHER))

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or len(tensor) != FEW_TOGETHER:
            return tensor
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))

    return map_tensors(batch, repeat)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; containers keep their type."""
    if device.type == "cpu":
        return batch
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The batch with `function` of every tensor in it; containers keep their type."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return type(batch)({key: map_tensors(value, function) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def _take(stream: Iterator[Any], count: int) -> list[Any]:
    taken = []
    for sample in stream:
        taken.append(sample)
        if len(taken) == count:
            break
    return taken
