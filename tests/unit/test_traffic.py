"""Bytes over the network, against formulas written out."""

from __future__ import annotations

import pytest
from planning_examples import linked, profile, sending

from paceline.plan.forecast import Forecaster
from paceline.plan.traffic import Traffic
from paceline.records import Layout

JOB = profile((1.0,) * 4, 16)
GRADIENTS = 4 * 4e7


@pytest.mark.parametrize(
    ("hosts", "per_host", "layout", "sent"),
    [
        (1, 4, "dp_replicate=4", 0.0),
        (2, 1, "dp_replicate=2", GRADIENTS),
        # A ring: each sends 2 (h-1)/h.
        (4, 1, "dp_replicate=4", 1.5 * GRADIENTS),
        # Within a host first: a byte crosses once, whatever the number of workers.
        (2, 2, "dp_replicate=4", GRADIENTS),
        # Parameters before and after, gradients once: half of each.
        (2, 1, "dp_shard=2,zero=3", 3 * GRADIENTS / 2),
        (2, 1, "dp_shard=2,zero=1", 2 * GRADIENTS / 2),
        (2, 1, "dp_shard=2,micro=2,zero=3", 2 * 3 * GRADIENTS / 2),
        # Two all-reduces of 1e5 a sample, forward and backward, in each of four blocks.
        (2, 1, "tp=2", 16 * 4 * 4 * 1e5),
        # Each host has a pair: within it the model is divided, and gradients of halves travel.
        (2, 2, "dp_replicate=2,tp=2", GRADIENTS),
        (2, 1, "pp=2,micro=4", 16 * 1e5),
        # The hosts in the middle send forwards and back.
        (4, 1, "pp=4,micro=4", 2 * 16 * 1e5),
        (2, 2, "pp=2,dp_replicate=2,micro=4", 16 * 1e5),
        (2, 2, "pp=4,micro=4", 16 * 1e5),
    ],
)
def test_what_a_host_sends(hosts, per_host, layout, sent):
    traffic = Traffic(JOB, linked(hosts, per_host))
    assert traffic.sent_bytes(Layout.parse(layout)) == pytest.approx(sent)


def test_a_pipeline_sends_what_crosses_where_it_is_cut():
    """2 MB a sample between the middle blocks, 10 kB after the third, where it is cut over this cable."""
    job, target = sending(profile((1.0,) * 4, 16), 1e6, 2e6, 1e4, 1e4), linked(2, 1)
    layout = Layout(pp=2, micro=4)
    assert Forecaster(job, target).cuts_of(layout) == (0, 3, 4)
    assert Traffic(job, target).sent_bytes(layout) == pytest.approx(16 * 1e4)
