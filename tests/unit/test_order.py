"""Invariant 2: which samples make up a global batch depends on (seed, epoch, index) alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.train.order import batches_per_epoch, cut, epoch_order, shares

counts = st.integers(1, 200)
few = st.integers(1, 9)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), num_samples=counts)
def test_an_epoch_uses_each_sample_once(seed, epoch, num_samples):
    assert sorted(epoch_order(seed, epoch, num_samples)) == list(range(num_samples))


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_is_the_same_on_every_machine_and_for_good():
    """Golden: a change of this order breaks the reproduction of every run made before."""
    assert epoch_order(0, 0, 10).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [9, 7, 5, 2, 1, 8, 6, 0, 3, 4]


@given(num_samples=st.integers(0, 200), num_parts=few)
def test_parts_are_contiguous_and_differ_by_at_most_one(num_samples, num_parts):
    bounds = cut(num_samples, num_parts)
    sizes = [end - begin for begin, end in bounds]
    assert sum(sizes) == num_samples
    assert [b for b, _ in bounds[1:]] == [e for _, e in bounds[:-1]]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(batch_samples=counts, micro=few, size=few)
def test_the_shares_of_all_workers_are_the_batch(batch_samples, micro, size):
    everyone = [shares(batch_samples, micro, size, rank) for rank in range(size)]
    assert len({len(mine) for mine in everyone}) == 1, "every worker has as many micro-batches as the others"
    used = [
        position
        for mine in everyone
        for share in mine
        if not share.borrowed
        for position in range(share.begin, share.end)
    ]
    assert sorted(used) == list(range(batch_samples))


@given(batch_samples=counts, micro=few, size=few)
def test_a_micro_batch_is_the_same_samples_on_any_number_of_workers(batch_samples, micro, size):
    alone = shares(batch_samples, micro, 1, 0)
    split = [shares(batch_samples, micro, size, rank) for rank in range(size)]
    for number, whole in enumerate(alone):
        parts = [mine[number] for mine in split]
        positions = sorted(p for s in parts if not s.borrowed for p in range(s.begin, s.end))
        assert positions == list(range(whole.begin, whole.end))
        assert all(whole.begin <= s.begin < s.end <= whole.end for s in parts), (
            "borrowed from its own micro-batch"
        )


@given(num_samples=counts, batch_size=counts)
def test_batches_per_epoch_counts_the_last_short_one(num_samples, batch_size):
    assert batches_per_epoch(num_samples, batch_size) == int(np.ceil(num_samples / batch_size))
