"""Sharded data parallelism trains what one process of plain PyTorch trains, in a part of the memory. Real processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from groups import run_group
from sharding_models import (
    MAX_WORKERS,
    MODELS,
    NUM_MICRO,
    NUM_STEPS,
    Chain,
    build,
    loss_of,
    make_optimizer,
    train_plainly,
)
from sharding_worker import KINDS, train_all
from torch import nn

from paceline.comm.group import Group
from paceline.errors import SplitError
from paceline.split.deferred import DeferredParameters
from paceline.split.sharding import KEEPS, ShardedParameters

ON_FOUR = ("chain", "tied", "experts", "constant_expert", "frozen", "twice", "checkpoint", "structured")
MODELS_ON = {2: tuple(MODELS), 4: ON_FOUR}
PAIRS = [(size, name) for size, names in MODELS_ON.items() for name in names]
SIZES = tuple(MODELS_ON)
TOLERANCE = 1e-6
TOLERANCE_FLOAT32 = 1e-5
RECOMPUTES_ITSELF = {"checkpoint_reentrant", "checkpoint_together"}
"""Models that call an earlier block again while a later one is whole for its backward pass."""

Results = dict[str, dict[str, torch.Tensor]]
plain = functools.cache(train_plainly)


@pytest.fixture(scope="module")
def results_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """What so many workers made of their models, in every way: one launch for each number."""

    @functools.cache
    def launch(size: int) -> Results:
        path = tmp_path_factory.mktemp("sharding") / "results.pt"
        run_group(train_all, size, MODELS_ON[size], path, timeout_s=20.0, limit_s=120.0)
        return torch.load(path, weights_only=True)

    return launch


def trained(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in result.items() if key.startswith(("gradient.", "parameter."))}


def largest_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest ‖found − wanted‖ / ‖wanted‖; the same names must be there, so that absent gradients agree too."""
    assert set(found) == set(wanted)
    floor = 1e-12
    return max(float((found[k] - w).norm() / w.norm().clamp(min=floor)) for k, w in wanted.items())


@pytest.mark.parametrize(("keep", "kind"), [(keep, kind) for keep in KEEPS for kind in KINDS[keep]])
@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_gradients_and_parameters_are_those_of_one_process(name, keep, kind, size, results_on):
    results = results_on(size)
    wanted = plain(name, kind)
    assert any(key.startswith(f"gradient.{NUM_STEPS - 1}.") for key in wanted)
    assert largest_error(trained(results[f"{name}/{keep}/{kind}"]), wanted) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", KEEPS)
def test_float32_through_gloo_and_replicated_shards(keep, size, results_on):
    results = results_on(size)
    wanted = plain("chain", "sgd", torch.float32)
    assert largest_error(trained(results[f"float32/{keep}"]), wanted) < TOLERANCE_FLOAT32
    assert largest_error(trained(results[f"gloo/{keep}"]), plain("experts", "sgd")) < TOLERANCE
    if size == 4:
        assert largest_error(trained(results[f"hybrid/{keep}"]), plain("experts", "sgd")) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", KEEPS)
def test_a_forgotten_reduction_is_seen(keep, size, results_on):
    results = results_on(size)
    assert largest_error(trained(results[f"planted/{keep}"]), plain("chain", "sgd")) > 1000 * TOLERANCE


def test_what_nobody_uses_has_no_gradient_and_what_one_uses_has():
    gradients = {key for key in plain("experts", "sgd") if key.startswith("gradient.0.blocks.0.")}
    assert "gradient.0.blocks.0.experts.1.weight" in gradients
    assert "gradient.0.blocks.0.experts.2.weight" not in gradients


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_evaluation_sees_the_trained_parameters(name, keep, size, results_on):
    results = results_on(size)
    result = results[f"{name}/{keep}/{KINDS[keep][0]}"]
    model = build(name).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(result[f"parameter.{key}"])
        assert float(loss_of(model, NUM_STEPS, 0)) == pytest.approx(float(result["evaluation"]), rel=1e-9)


@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_memory_is_given_back(name, size, results_on):
    results = results_on(size)
    whole_bytes = sum(p.nbytes for p in build(name).parameters())
    num_blocks = len(build(name).blocks)
    for keep, most in (("nothing", 2 if name in RECOMPUTES_ITSELF else 1), ("within_step", num_blocks)):
        result = results[f"{name}/{keep}/{KINDS[keep][0]}"]
        assert int(result["bytes.after_finish"]) == int(result["bytes.after_evaluation"]) == 0
        assert int(result["blocks.whole_at_once"]) == most
    assert int(results[f"{name}/always/sgd"]["bytes.after_finish"]) >= whole_bytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["chain", "structured"])
def test_a_step_communicates_as_often_as_is_claimed(name, size, results_on):
    """All of it in each worker's last step: what an earlier evaluation or step left over would show."""
    results = results_on(size)
    num_blocks, num_micro = len(build(name).blocks), NUM_MICRO * MAX_WORKERS // size
    wanted = {
        "nothing": [1 + 2 * num_blocks * num_micro, 1 + num_blocks * num_micro],
        "within_step": [1 + num_blocks, 1 + num_blocks * num_micro],
        "always": [0, 1 + num_blocks],
    }
    found = {keep: results[f"{name}/{keep}/{KINDS[keep][0]}"]["calls"].tolist() for keep in KEEPS}
    assert found == wanted


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["chain", "frozen"])
def test_each_worker_keeps_its_part(name, size, results_on):
    results = results_on(size)
    model = build(name)
    trained_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    share_bytes = math.ceil((2 * trained_bytes + frozen_bytes) / size)
    # At most one element is added to a worker's part of each flat tensor: two a unit, and gradients.
    padding_bytes = 8 * 4 * (len(model.blocks) + 1)
    for keep in ("nothing", "within_step"):
        kept_bytes = int(results[f"bytes/{name}"][keep])
        assert share_bytes - padding_bytes <= kept_bytes <= share_bytes + padding_bytes
    assert int(results[f"bytes/{name}"]["always"]) >= trained_bytes + frozen_bytes


def shard_alone(model: Chain, keep: str = "nothing") -> ShardedParameters:
    group = Group.alone(torch.device("cpu"))
    return ShardedParameters(model, list(model.blocks), (), group, group, DeferredParameters(), keep=keep)


@pytest.mark.parametrize("keep", KEEPS)
def test_names_shapes_and_objects_stay_the_users(keep):
    model = build("tied")
    before = {name: (id(p), p.shape, p.dtype) for name, p in model.named_parameters()}
    optimizer = make_optimizer("adamw", list(model.parameters()))
    shard_alone(model, keep)
    assert {name: (id(p), p.shape, p.dtype) for name, p in model.named_parameters()} == before
    assert model.first.weight is model.last.weight
    assert [p.ndim >= 2 for p in optimizer.param_groups[0]["params"]]


def test_a_part_of_a_block_that_is_called_by_itself_is_an_error():
    model = build("chain")
    sharded = shard_alone(model)
    sharded.begin_step()
    with pytest.raises(
        SplitError, match=r"Linear was called while .* \(the block of blocks\.1\.norm\.weight\)"
    ):
        model.blocks[1].up(torch.zeros(1, 5, dtype=torch.float64))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_sparse_gradient_is_an_error(keep):
    model = build("leading")
    model.blocks[0].embedding = nn.Embedding(11, 5, sparse=True).double()
    sharded = shard_alone(model, keep)
    sharded.begin_step()
    loss_of(model, 0, 0).backward()
    with pytest.raises(SplitError, match=r"blocks\.0\.embedding\.weight has a sparse gradient"):
        sharded.finish()
