"""How fast hosts are, from the seconds of their workers."""

from __future__ import annotations

import pytest

from paceline.train.speeds import relative


def test_a_host_is_as_fast_as_its_slowest_worker_and_the_first_host_is_the_measure():
    assert relative([0.1, 0.1, 0.2, 0.25, 0.05], [2, 2, 1]) == pytest.approx((1.0, 0.4, 2.0))


def test_hosts_that_differ_by_noise_are_equally_fast():
    assert relative([0.100, 0.104, 0.097], [1, 1, 1]) == ()
    assert relative([0.100, 0.104, 0.110], [1, 1, 1]) == pytest.approx((1.0, 0.100 / 0.104, 0.100 / 0.110))
