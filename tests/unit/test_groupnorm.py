"""Group norms whose backward pass is asked for their parameters' gradients alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paceline.split.groupnorm import GroupNorms


@pytest.mark.parametrize(
    ("needs_gradient", "in_parts", "stays"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_channels_stay_last_where_the_gradient_of_the_input_is_computed_with_the_others(
    monkeypatch, needs_gradient, in_parts, stays
):
    seen: list[torch.Tensor] = []
    group_norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: seen.append(x) or group_norm(x, *rest))
    model = nn.Sequential(nn.Identity(), nn.GroupNorm(4, 8))
    norms = GroupNorms(model)
    assert norms.names == ["1"]
    norms.in_parts = in_parts
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_(needs_gradient)
    torch.testing.assert_close(model(x), group_norm(x, 4, model[1].weight, model[1].bias))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == stays
    with torch.no_grad():
        model(x)
    assert seen[-1] is x


_PASS = """
import torch
from torch import nn
from paceline.split.groupnorm import GroupNorms

x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
for needs_gradient in (False, True):
    model = nn.GroupNorm(4, 8)
    norms = GroupNorms(model)
    norms.in_parts = needs_gradient
    given = x.detach().requires_grad_(needs_gradient)
    (found,) = torch.autograd.grad((model(given) ** 2).sum(), [model.weight])
    plain = nn.GroupNorm(4, 8)
    (wanted,) = torch.autograd.grad((plain(x.contiguous()) ** 2).sum(), [plain.weight])
    torch.testing.assert_close(found, wanted)
print("passed")
"""


def test_the_process_survives():
    """In one of its own: where it does not, nothing could tell."""
    process = subprocess.run(
        [sys.executable, "-c", _PASS], capture_output=True, text=True, timeout=100, check=False
    )
    assert (process.returncode, process.stdout) == (0, "passed\n"), process.stderr
