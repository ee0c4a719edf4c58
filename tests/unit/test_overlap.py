"""Gradients that travel during the backward pass, by hand."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from paceline.plan.overlap import bucket_bytes, exposed_s

BLOCKS = [(2.0, 4.0), (2.0, 4.0), (2.0, 4.0)]


def test_all_but_the_last_bucket_is_hidden_by_a_quick_network():
    # Buckets are there after 2, 4 and 6 s, and take 1 s each: the last is through at 7.
    assert exposed_s(BLOCKS, 4, whole_s=3.0) == pytest.approx(1.0)


def test_a_slow_network_hides_what_the_backward_pass_takes_after_the_first_bucket():
    # From 2 s on 12 s without a pause, and the backward pass ends at 6.
    assert exposed_s(BLOCKS, 4, whole_s=12.0) == pytest.approx(8.0)


def test_a_bucket_is_full_before_the_block_ends_whose_first_gradients_fill_it():
    # A bucket of 6 is full after 3 s, and the next after 6; each takes 1 s.
    assert exposed_s(BLOCKS, 6, whole_s=2.0) == pytest.approx(1.0)
    # The first 6 of 12 bytes take 6 s, from 3 s on; then the others.
    assert exposed_s(BLOCKS, 6, whole_s=12.0) == pytest.approx(9.0)
    # Of 11 the last byte is sent by itself: 5.5 s from 5.5 s on, and half a second more.
    assert exposed_s(BLOCKS, 11, whole_s=6.0) == pytest.approx(5.5)


def test_what_is_larger_than_a_bucket_is_there_at_its_end():
    # 1 byte goes when the 8 come that do not fit with it; these are there at 4 s and take 8.
    assert exposed_s([(2.0, 1.0), (2.0, 8.0)], 4, whole_s=9.0) == pytest.approx(8.0)


def test_in_one_bucket_nothing_is_hidden():
    assert exposed_s(BLOCKS, 100, whole_s=3.0) == pytest.approx(3.0)


def test_workers_of_a_host_send_all_in_the_end():
    assert bucket_bytes("cpu", over_network=False) is None
    assert bucket_bytes("cpu", over_network=True) is not None
    assert bucket_bytes("cpu", over_network=False, sharers=2) is None
    assert bucket_bytes("cuda", over_network=False) is not None


def test_workers_that_share_parameters_send_their_shares_together():
    assert bucket_bytes("cpu", over_network=True, sharers=4) == 2 * bucket_bytes(
        "cpu", over_network=True, sharers=2
    )


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 100)), min_size=1, max_size=8),
    st.integers(1, 200),
    st.floats(0, 50),
    st.floats(0, 50),
)
def test_a_faster_network_never_takes_longer_and_no_more_is_hidden_than_there_is(
    blocks, bucket, one_s, more_s
):
    assume(any(num_bytes for _, num_bytes in blocks))
    quick_s, slow_s = exposed_s(blocks, bucket, one_s), exposed_s(blocks, bucket, one_s + more_s)
    assert quick_s <= slow_s + 1e-9
    assert 0 <= quick_s <= one_s + 1e-9
    assert quick_s >= one_s - sum(seconds for seconds, _ in blocks) - 1e-9
