"""Dividing a tensor, putting it together again, and following it through views."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.split.placement import Shard, evenly, follow_view, join, regroup, take


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
def test_pieces_put_together_are_the_whole(num_workers, parts, dim, seed):
    shard = Shard(dim, tuple(part * num_workers for part in parts))
    shape = [3, 3, 3]
    shape[dim] = shard.size
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pieces = [take(whole, shard, rank, num_workers) for rank in range(num_workers)]
    assert torch.equal(join(pieces, shard), whole)
    assert len({piece.shape for piece in pieces}) == 1


def test_fused_weights_give_each_worker_whole_heads():
    """Two heads of queries, keys and values, end to end: worker 0 has the first of each."""
    whole = torch.arange(6)
    assert take(whole, Shard(0, (2, 2, 2)), 0, 2).tolist() == [0, 2, 4]


shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=400)
@given(shapes, shapes, st.data())
def test_a_view_that_is_followed_is_the_view_of_the_pieces(before, after, data):
    """Whenever a division is carried through a view, piece and whole agree, element by element."""
    size = math.prod(before)
    if math.prod(after) != size:
        after = (*after, size // math.prod(after)) if size % math.prod(after) == 0 else (size,)
    dim = data.draw(st.integers(0, len(before) - 1))
    groups = data.draw(st.sampled_from([1, 2, 3]))
    if before[dim] % (2 * groups):
        return
    shard = evenly(dim, before[dim], groups)
    carried = follow_view(shard, before, after, 2)
    if carried is None:
        return
    whole = torch.arange(size).view(before)
    for rank in range(2):
        local = list(after)
        local[carried.dim] //= 2
        piece = take(whole, shard, rank, 2).reshape(local)
        assert torch.equal(piece, take(whole.view(after), carried, rank, 2))


def test_heads_are_found_in_a_view():
    assert follow_view(evenly(2, 32), (2, 5, 32), (2, 5, 4, 8), 2) == evenly(2, 4)
    assert follow_view(evenly(2, 4), (2, 5, 4, 8), (2, 5, 32), 2) == evenly(2, 32)
    # [t, b, width] as [t, b · heads, size]: each sample's heads are divided.
    assert follow_view(evenly(2, 32), (5, 3, 32), (5, 12, 8), 2) == Shard(1, (4, 4, 4))


@pytest.mark.parametrize("groups", [2, 3])
def test_more_parts_are_proposed_where_one_does_not_fit(groups):
    before, after = (2, 5, groups * 32), (2, 5, groups, 4, 8)
    shard = evenly(2, groups * 32)
    fits = follow_view(shard, before, after, 2)
    found = regroup(shard, before, after, 2)
    if groups == 3:
        assert fits is None
        assert found == Shard(2, (32, 32, 32))
        assert follow_view(found, before, after, 2) == evenly(3, 4)
    else:
        assert fits == evenly(2, 2)
