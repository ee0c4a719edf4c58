"""Random numbers that depend on nothing but what they are for."""

from __future__ import annotations

import pytest
import torch

from paceline.train.seeds import generators_kept, seed_torch

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_what_is_drawn_within_is_not_missed_afterwards(kind):
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    seed_torch(7, device)
    torch.rand(3, device=device)
    wanted = torch.rand(3, device=device)
    seed_torch(7, device)
    torch.rand(3, device=device)
    with generators_kept(device):
        seed_torch(8, device)
        torch.rand(5, device=device)
    assert torch.equal(torch.rand(3, device=device), wanted)
