"""Latency and bandwidth, fitted piece by piece."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.plan.fits import fit

SIZES = [4.0 * 4**power for power in range(12)]


def line(latency_s: float, bytes_per_s: float, num_bytes: float) -> float:
    return latency_s + num_bytes / bytes_per_s


def test_one_line_is_found_again():
    found = fit([(size, line(2e-6, 5e9, size)) for size in SIZES])
    (piece,) = found.pieces
    assert piece.latency_s == pytest.approx(2e-6)
    assert piece.bytes_per_s == pytest.approx(5e9)
    assert (piece.least_bytes, piece.most_bytes) == (SIZES[0], SIZES[-1])
    assert found.error == pytest.approx(0, abs=1e-9)


def test_small_messages_that_go_another_way_have_a_line_of_their_own():
    points = [(s, line(2e-6, 1e9, s) if s <= 4096 else line(5e-5, 4e9, s)) for s in SIZES]
    found = fit(points)
    small, large = found.pieces
    assert (small.most_bytes, large.least_bytes) == (4096, 16384)
    assert (small.latency_s, small.bytes_per_s) == (pytest.approx(2e-6), pytest.approx(1e9))
    assert (large.latency_s, large.bytes_per_s) == (pytest.approx(5e-5), pytest.approx(4e9))
    for size, seconds in points:
        assert found.seconds(size) == pytest.approx(seconds)


def test_noise_makes_no_further_pieces_and_moves_the_line_little():
    drawn = random.Random(1)
    points = [(s, line(1e-5, 1e9, s) * drawn.uniform(0.98, 1.02)) for s in SIZES]
    (piece,) = fit(points).pieces
    assert piece.latency_s == pytest.approx(1e-5, rel=0.03)
    assert piece.bytes_per_s == pytest.approx(1e9, rel=0.03)


def test_what_does_not_grow_has_no_bandwidth_and_no_latency_is_negative():
    (flat,) = fit([(size, 1e-3) for size in SIZES]).pieces
    assert (flat.latency_s, flat.bytes_per_s) == (pytest.approx(1e-3), None)
    (steep,) = fit([(100.0, 1e-7), (200.0, 4e-7), (300.0, 7e-7)]).pieces
    assert steep.latency_s == 0
    assert fit([(4.0, 1e-6)]).seconds(1e6) == pytest.approx(1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=12))
def test_pieces_cover_all_that_was_measured_in_order(times):
    points = list(zip(SIZES, sorted(times), strict=False))
    pieces = fit(points).pieces
    covered = [size for p in pieces for size, _ in points if p.least_bytes <= size <= p.most_bytes]
    assert covered == [size for size, _ in points]
    assert all(piece.latency_s >= 0 for piece in pieces)
