"""Reading a data set's samples together, where they are rows of tensors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

import paceline
from paceline.errors import DataError
from paceline.train.data import ShareLoader, evaluation_parts, first_samples, tensors_of

ROWS = TensorDataset(torch.randn(40, 3), torch.arange(40))


class Derived(TensorDataset):
    """Its samples are not its rows."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 2 * x, y


class OneByOne(Dataset):
    """The same samples, and no tensors to be seen."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Stream(IterableDataset):
    """The same samples, one after the other."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


def job_of(dataset, collate=None):
    return paceline.Job(
        model=lambda: torch.nn.Linear(3, 1), data=lambda split: dataset, loss=lambda o, b: o.mean(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=16, collate=collate,
    )  # fmt: skip


def batches(dataset, collate=None):
    job = job_of(dataset, collate)
    loader = ShareLoader(job, dataset, seed=1, micro=2, size=2, rank=1, device=torch.device("cpu"))
    return [part.batch for epoch in (0, 1) for batch in loader.epoch(epoch) for part in batch.parts]


@pytest.mark.parametrize(
    "dataset", [ROWS, Subset(ROWS, range(5, 38)), Subset(Subset(ROWS, [9, 3, 8, 8]), [2, 1, 0])]
)
def test_rows_together_are_the_samples_one_by_one(dataset):
    assert tensors_of(dataset) is not None
    together, single = batches(dataset), batches(OneByOne(dataset))
    assert len(together) == len(single) > 0
    for a, b in zip(together, single, strict=True):
        assert type(a) is type(b) is list
        assert [t.dtype for t in a] == [t.dtype for t in b]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_may_do_more_than_give_rows_is_read_one_by_one():
    derived = Derived(*ROWS.tensors)
    assert tensors_of(derived) is None
    assert tensors_of(Subset(derived, [0])) is None
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(batches(derived), batches(OneByOne(derived)), strict=True)
    )


def test_a_collate_of_the_jobs_own_gets_samples():
    seen = []

    def collate(samples):
        seen.append(samples)
        return default_collate(samples)

    batches(ROWS, collate)
    assert all(isinstance(samples, list) and isinstance(samples[0], tuple) for samples in seen)


@pytest.mark.parametrize("dataset", [ROWS, Stream(ROWS)], ids=["map", "stream"])
def test_evaluations_see_every_sample_once_in_parts_of_micro_batches(dataset):
    job = job_of(dataset)
    found = []
    for rank in range(2):
        parts = list(evaluation_parts(job, dataset, micro=3, size=2, rank=rank, device=torch.device("cpu")))
        assert max(part.share.samples for part in parts) == 3
        found += [part.batch[1] for part in parts if not part.share.borrowed]
    assert sorted(torch.cat(found).tolist()) == list(range(40))


@pytest.mark.parametrize("dataset", [ROWS, Stream(ROWS)], ids=["map", "stream"])
def test_the_first_samples_are_a_data_set(dataset):
    assert [int(y) for _, y in first_samples(dataset, "test", 3)] == [0, 1, 2]
    assert len(first_samples(dataset, "test", 100)) == 40


class Noisy(OneByOne):
    """Some of its samples draw."""

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return (x + torch.randn(3), y) if y >= self.draws_from else (x, y)


class NoisyTogether(Noisy):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class NoisyTensor(NoisyTogether):
    def __getitems__(self, indices):
        return torch.stack([self[index][0] for index in indices])


@pytest.mark.parametrize("draws_from", [0, 30])
@pytest.mark.parametrize(
    "wrapped", [Noisy, NoisyTogether, lambda rows: Subset(Noisy(rows), range(len(rows)))]
)
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_what_a_sample_draws_depends_on_no_other_sample(wrapped, draws_from, loader_workers, monkeypatch):
    monkeypatch.setattr(Noisy, "draws_from", draws_from, raising=False)

    def samples(size, micro):
        dataset = wrapped(ROWS)
        job = dataclasses.replace(job_of(dataset), loader_workers=loader_workers)
        found = {}
        for rank in range(size):
            loader = ShareLoader(
                job, dataset, seed=1, micro=micro, size=size, rank=rank, device=torch.device("cpu")
            )
            for batch in itertools.chain(loader.epoch(0), loader.epoch(1)):
                for part in batch.parts:
                    x, y = part.batch
                    found |= {(batch.epoch, int(number)): row for row, number in zip(x, y, strict=True)}
        return found

    alone = samples(1, 1)
    assert len(alone) == 80
    for size, micro in ((2, 1), (3, 2)):
        divided = samples(size, micro)
        assert divided.keys() == alone.keys()
        assert all(torch.equal(divided[key], alone[key]) for key in alone)
    epochs_differ = [not torch.equal(alone[0, n], alone[1, n]) for n in range(40)]
    assert epochs_differ == [n >= draws_from for n in range(40)]
    drawn = torch.stack([alone[0, n] - ROWS[n][0] for n in range(draws_from, 40)])
    assert len(drawn.unique(dim=0)) == 40 - draws_from


def test_samples_that_draw_and_come_as_one_tensor_are_refused(monkeypatch):
    monkeypatch.setattr(Noisy, "draws_from", 0, raising=False)
    with pytest.raises(DataError, match="not a list of samples"):
        batches(NoisyTensor(ROWS), collate=lambda tensor: tensor)
