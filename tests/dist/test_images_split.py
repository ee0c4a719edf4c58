"""How images lie in memory is found out once, and holds in every layout; nothing else comes of it."""

from __future__ import annotations

import functools

import pytest
import torch
from groups import run_group
from images_worker import agree, group_norm, train_layouts, turned_network

LAYOUTS = [
    "dp_replicate=2",
    "dp_replicate=2,micro=2",
    "dp_shard=2,zero=1",
    "dp_shard=2,zero=3",
    "pp=2,micro=2",
    "pp=2,micro=4,schedule=zb-h1",
    "tp=2",
]


def run(*args, **kwargs):
    return run_group(*args, timeout_s=60.0, limit_s=300.0, **kwargs)


@pytest.fixture(scope="module")
def runs():
    return {is_turned: run(train_turned if is_turned else train_plain, 2, LAYOUTS) for is_turned in (False, True)}


def train_turned(world, layouts):
    return train_layouts(world, layouts, is_turned=True)


def train_plain(world, layouts):
    return train_layouts(world, layouts, is_turned=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_convolution_gets_channels_last(layout, runs):
    for rank in range(2):
        _, num_seen, num_turned = runs[True][rank][layout]
        assert num_seen == num_turned > 0
        _, num_seen, num_turned = runs[False][rank][layout]
        assert num_turned < num_seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_training_is_the_same(layout, runs):
    assert runs[True][0][layout][0] == pytest.approx(runs[False][0][layout][0], rel=1e-4)


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-3),
}


def train_in_one_pass(world, name):
    """In one process by a pass for each operation, and in every layout as it comes: by one pass where that is the same."""
    plain = functools.partial(OPTIMIZERS[name], fused=False)
    found = train_layouts(world, ["dp_replicate=1"], is_turned=True, model=turned_network, optimizer=plain)
    found |= train_layouts(world, LAYOUTS, is_turned=True, model=turned_network, optimizer=OPTIMIZERS[name])
    return {layout: losses for layout, (losses, _, _) in found.items()}


@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_with_their_channels_last_are_updated_in_one_pass_as_in_many(name, transport):
    """A fused step of torch's takes it that a gradient lies as its parameter does."""
    found = run(train_in_one_pass, 2, name, transport=transport)[0]
    for layout in LAYOUTS:
        assert found[layout] == pytest.approx(found["dp_replicate=1"], rel=1e-4), layout


APART = ["dp_replicate=2", "pp=2,micro=4,schedule=zb-h1", "pp=2,micro=4,schedule=zbv"]


def train_with_group_norms(world, is_turned):
    return train_layouts(world, APART, is_turned=is_turned, norm=group_norm)


def test_group_norms_whose_weights_get_their_gradients_later_train_the_same():
    """torch's kernel would write the gradient of the input to address 0."""
    turned, plain = (run(train_with_group_norms, 2, is_turned)[0] for is_turned in (True, False))
    for layout in APART:
        assert turned[layout][0] == pytest.approx(plain[layout][0], rel=1e-4)
        assert turned[layout][0] == pytest.approx(turned[APART[0]][0], rel=1e-4)
        assert turned[layout][2] > 0


def test_all_workers_take_what_the_first_finds():
    found = run(agree, 2)
    assert found[0] == found[1]
    small, large = found[0]
    assert small is None
    assert large > 0
