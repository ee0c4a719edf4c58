"""Reading a data set's samples together, where they are rows of tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

import paceline
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
