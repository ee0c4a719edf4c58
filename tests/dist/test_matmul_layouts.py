"""What multiplies matrices is found out once, and holds in every layout, which trains the same."""

from __future__ import annotations

import pytest
from groups import run_group
from matmul_worker import agree, train_layouts

from paceline.train.matmul import is_available

pytestmark = pytest.mark.skipif(
    not is_available(), reason="this build of torch has no oneDNN to multiply with"
)

LAYOUTS = ["dp_replicate=2", "dp_shard=2,zero=3", "pp=2,micro=2", "pp=2,micro=2,schedule=zb-h1", "tp=2"]


def run(*args, **kwargs):
    return run_group(*args, timeout_s=60.0, limit_s=300.0, **kwargs)


@pytest.fixture(scope="module")
def runs():
    return {
        wanted: run(train_with_onednn if wanted else train_with_torch, 2, LAYOUTS) for wanted in (False, True)
    }


def train_with_onednn(world, layouts):
    return train_layouts(world, layouts, with_onednn=True)


def train_with_torch(world, layouts):
    return train_layouts(world, layouts, with_onednn=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_multiplies_with_it_and_trains_the_same(layout, runs):
    for rank in range(2):
        losses, num_products = runs[True][rank][layout]
        assert num_products > 0
        assert losses == pytest.approx(runs[False][rank][layout][0], rel=1e-5)
        assert runs[False][rank][layout][1] == 0


def test_all_workers_take_what_the_first_finds():
    found = run(agree, 2)
    assert found[0] == found[1] == [None, 0.25, None]
