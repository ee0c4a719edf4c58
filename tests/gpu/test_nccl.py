"""Collectives through NCCL itself. It takes one worker for each GPU, so that one GPU has a group of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from paceline.comm.pending import Patience
from paceline.comm.wire import nccl_link
from paceline.comm.wire_collectives import WireCollectives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def device():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.device("cuda", 0)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_collectives(device, dtype):
    group = WireCollectives(dist.group.WORLD, (0,), 0, device, Patience(0, 60.0))
    values = torch.arange(12, device=device).to(dtype)
    for start in (group.start_sum, group.start_all_gather, group.start_reduce_scatter):
        own = values.clone()
        start(own, "a test").wait()
        assert torch.equal(own, values)
    own = values.clone()
    group.start_broadcast(own, "a test", 0).wait()
    assert torch.equal(own, values)
    received = torch.zeros_like(values)
    group.start_all_to_all(received, values, "a test").wait()
    assert torch.equal(received, values)


def test_a_link_can_be_made_by_one_end(device):
    """They meet with their first message; a link is closed without one, too."""
    link = nccl_link("0-1/0/0-1", 0, 60.0)
    assert (link.rank(), link.size()) == (0, 2)
    link.shutdown()
