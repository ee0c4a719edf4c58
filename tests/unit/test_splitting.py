"""What is found in a model before it is split: pieces, where to cut, what to divide."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from paceline.comm.group import Group
from paceline.errors import LayoutError
from paceline.plan.cuts import partition, partitions
from paceline.split import rules  # noqa: F401 - fills the tables
from paceline.split.finding import _nearest_tp, find_stages
from paceline.split.pieces import find_pieces, pieces_for
from paceline.split.placement import Shard
from paceline.split.recompute import recomputed
from paceline.split.stages import CutBy, PieceCalls, cut_in_balance, plan_stages, steady_pieces
from paceline.split.tensor_mode import shard_of
from paceline.split.tensor_plan import plan_tensor_split

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from split_jobs import SPLIT_JOBS, Shared, Transformer, UNet, torch_encoder

CPU = torch.device("cpu")
TOKENS = torch.randint(1, 16, (2, 8), generator=torch.Generator().manual_seed(0))


def names(model: nn.Module, at_least: int = 1) -> list[str]:
    return [piece.name for piece in find_pieces(model, at_least)]


def test_blocks_of_lists_and_what_stands_beside_them_are_pieces():
    assert names(Transformer()) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm"]
    assert names(UNet()) == ["down1.0", "down1.1", "down1.2", "down2.0", "down2.1", "down2.2", "up.0", "up.1", "up.2",
                             "head"]  # fmt: skip


def test_a_piece_that_outweighs_the_rest_is_opened():
    model = nn.ModuleDict(
        {"small": nn.Linear(2, 2), "large": nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Linear(9, 9)})}
    )
    assert names(model, at_least=3) == ["small", "large.a", "large.b"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=7), st.integers(1, 4))
def test_stages_are_the_quickest_of_those_that_are_not_too_large(calls, num_parts):
    if num_parts > len(calls):
        return
    seconds, sizes = [float(t) for t, _ in calls], [float(n) for _, n in calls]

    def largest(parts: list[int], costs: list[float]) -> float:
        return max(
            sum(c for c, p in zip(costs, parts, strict=True) if p == part) for part in range(num_parts)
        )

    cuts = [
        [sum(begin >= cut for cut in where) for begin in range(len(calls))]
        for where in itertools.combinations(range(1, len(calls)), num_parts - 1)
    ]
    allowed = 1.1 * min(largest(cut, sizes) for cut in cuts)
    quickest = min(largest(cut, seconds) for cut in cuts if largest(cut, sizes) <= allowed)
    found = cut_in_balance(seconds, sizes, num_parts)
    assert largest(found, sizes) <= allowed
    assert largest(found, seconds) == quickest


def test_where_one_piece_has_most_of_the_weights_the_rest_is_cut_by_time():
    sizes = [1000.0, *[1.0] * 12]
    assert cut_in_balance([0.0, *[1.0] * 12], sizes, 3) == [0] * 5 + [1] * 4 + [2] * 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 4))
def test_the_cut_is_the_best_of_all(costs, num_parts):
    if num_parts > len(costs):
        return
    found = cut_in_balance([float(c) for c in costs], [0.0] * len(costs), num_parts)
    assert found == sorted(found)
    assert set(found) == set(range(num_parts))

    def slowest(parts: list[int]) -> int:
        return max(
            sum(c for c, p in zip(costs, parts, strict=True) if p == part) for part in range(num_parts)
        )

    def of(cuts: tuple[int, ...]) -> list[int]:
        return [sum(place >= cut for cut in cuts) for place in range(len(costs))]

    every = itertools.combinations(range(1, len(costs)), num_parts - 1)
    assert slowest(found) == min(slowest(of(cuts)) for cuts in every)


def test_stages_know_who_holds_tied_and_loose_parameters():
    model = Transformer()
    calls = PieceCalls(model, find_pieces(model, 4))
    stages = plan_stages(model, calls, lambda: model(TOKENS), 2)
    assert stages.holders["embedding.weight"] == (0, 1)
    assert stages.holders["place"] == (0,)
    assert stages.holders["scale"] == (1,)
    assert sum(map(len, stages.holders.values())) == len(list(model.parameters())) + 1


def test_a_block_that_is_called_several_times_may_lie_in_several_stages():
    model = Shared()
    calls = PieceCalls(model, find_pieces(model))
    stages = plan_stages(model, calls, lambda: model(torch.randn(2, 12)), 6)
    assert sorted(stages.calls.values()) == [0, 1, 2, 3, 4, 5]
    assert stages.holders["block.0.weight"] == (1, 2, 3, 4)


class Pooled(nn.Module):
    """Equal layers on many rows, and then on one."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.together = (
            nn.ModuleList(nn.Linear(64, 64) for _ in range(number)) for number in (3, 6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.each:
            x = layer(x)
        x = x.mean(1)
        for layer in self.together:
            x = layer(x)
        return x


def test_equal_blocks_of_different_inputs_do_not_cost_the_same():
    model = Pooled()
    calls = PieceCalls(model, find_pieces(model))
    stages = plan_stages(model, calls, lambda: model(torch.randn(2, 4000, 64)), 2, room=1e9)
    assert stages.calls["each.0", 0] == 0
    assert stages.calls["each.2", 0] == 1


def test_a_model_that_is_cut_again_is_not_timed_again():
    number = 0

    def cut() -> dict[tuple[str, int], int]:
        model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6)))
        calls = PieceCalls(model, find_pieces(model))

        def run() -> torch.Tensor:
            nonlocal number
            number += 1
            return model(torch.randn(3, 24))

        return dict(plan_stages(model, calls, run, 3).calls)

    first = cut()
    timed = number
    assert cut() == first
    assert timed > 1
    assert number == timed + 1


def cut_of_six(by: CutBy) -> tuple[list[int], str]:
    """Of six equal layers over two workers: the stage of each, and why they are cut so."""
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    calls = PieceCalls(model, find_pieces(model))
    run = lambda: model(torch.randn(30, 40))  # noqa: E731
    stages, why = find_stages(Group.alone(CPU), model, calls, run, [0, 1], by)
    return list(stages.calls.values()), why


def stage_of_each(by: CutBy) -> list[int]:
    return cut_of_six(by)[0]


def test_a_faster_worker_gets_more_of_the_model():
    def cut(*speeds: float) -> list[int]:
        return stage_of_each(CutBy(room=1e9, speeds=speeds))

    assert cut() == cut(1.0, 0.9) == [0, 0, 0, 1, 1, 1]
    assert cut(1.0, 0.5) == [0, 0, 0, 0, 1, 1]
    assert cut(0.4, 2.0) == [0, 1, 1, 1, 1, 1]


def test_a_model_is_cut_where_its_forecast_has_it_if_that_is_of_its_pieces():
    def cut(*cuts: int) -> tuple[list[int], str]:
        return cut_of_six(CutBy(room=1e9, cuts=cuts))

    assert cut(0, 1, 6) == ([0, 1, 1, 1, 1, 1], "")
    assert cut(0, 5, 6) == ([0, 0, 0, 0, 0, 1], "")
    assert cut() == ([0, 0, 0, 1, 1, 1], "")
    for cuts, planned in (((0, 1, 7), "7 pieces into 2"), ((0, 1, 2, 6), "6 pieces into 3")):
        stages, why = cut(*cuts)
        assert stages == cut()[0]
        assert why == (
            f"Stages were not cut as planned: the plan cuts {planned} stages, and the model calls 6, for 2. "
            "Measure the job again."
        )


def test_where_the_planner_has_cut_the_model_nothing_is_timed():
    def timed() -> None:
        raise AssertionError("a batch as large as a micro-batch was run")

    assert cut_of_six(CutBy(timed, cuts=(0, 2, 6))) == ([0, 0, 1, 1, 1, 1], "")


@given(st.data())
def test_ways_to_cut_send_ever_less(data):
    """The first as the best cut of all; of each other, none that sends as little has a faster slowest part by more than
    the steps in which they are looked for."""
    costs = data.draw(st.lists(st.integers(1, 20).map(float), min_size=1, max_size=7))
    sends = data.draw(st.lists(st.integers(1, 9).map(float), min_size=len(costs), max_size=len(costs)))
    number = data.draw(st.integers(1, len(costs)))
    every = [[0, *where, len(costs)] for where in itertools.combinations(range(1, len(costs)), number - 1)]

    def slowest(cuts: list[int]) -> float:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(cuts))

    def sent(cuts: list[int]) -> float:
        return sum(sends[end - 1] for end in cuts[1:-1])

    found = partitions(costs, number, sends=sends)
    assert found[0] == partition(costs, number, sends=sends)
    assert all(cuts in every for cuts in found)
    assert all(sent(b) < sent(a) for a, b in itertools.pairwise(found))
    least_s = min(map(slowest, every))
    for cuts in found[1:]:
        best_s = min(slowest(other) for other in every if sent(other) <= sent(cuts))
        assert slowest(cuts) <= max(2 * best_s, 1.1 * least_s)
    near = [cuts for cuts in every if slowest(cuts) <= 2.6 * least_s * (1 - 1e-9)]
    assert sent(found[-1]) <= min(map(sent, near))


def test_more_stages_than_pieces_are_refused_with_what_works():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    calls = PieceCalls(model, find_pieces(model))
    with pytest.raises(LayoutError, match="2 pieces to cut between, and 3 pipeline stages") as error:
        plan_stages(model, calls, lambda: model(torch.randn(2, 2)), 3)
    assert error.value.next_step == "use at most pp=2"


def test_where_small_batches_cannot_be_put_together_a_small_one_is_timed_and_the_reason_kept():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    calls = PieceCalls(model, find_pieces(model))

    def large() -> None:
        raise RuntimeError("shape mismatch\nand more")

    def find(run):
        small = lambda: model(torch.randn(2, 4))  # noqa: E731
        return find_stages(Group.alone(CPU), model, calls, small, [0, 1], CutBy(run, room=1.0))

    stages, why = find(large)
    assert stages.num_stages == 2
    assert why.endswith("the model does not take small ones put together: RuntimeError: shape mismatch.")
    for run in (None, lambda: model(torch.randn(8, 4))):
        assert find(run)[1] == ""


def test_experts_that_the_data_choose_are_not_steady():
    model = SPLIT_JOBS["unused"][0].model()
    calls = PieceCalls(model, find_pieces(model))
    batches = [torch.full((2, 12), value) for value in (0.0, 1.5)]
    pieces, _ = steady_pieces(model, calls, [lambda b=b: model(b) for b in batches])
    assert pieces == []


def split_of(model: nn.Module, inputs: torch.Tensor, num_workers: int) -> dict[str, Shard]:
    return dict(plan_tensor_split(model, lambda: F.cross_entropy(model(inputs).flatten(0, -2), torch.zeros(
        inputs.shape[0] * (inputs.shape[1] if inputs.dtype == torch.int64 else 1), dtype=torch.long
    )), num_workers)[0])  # fmt: skip


def test_columns_rows_heads_and_vocabulary_are_found():
    model = Transformer()
    found = split_of(model, TOKENS, 2)
    assert found["embedding.weight"] == Shard(0, (16,)), "by vocabulary, tied to the output"
    for block in range(4):
        prefix = f"blocks.{block}"
        assert found[f"{prefix}.attention.qkv.weight"] == Shard(0, (16, 8, 8)), "whole heads of each"
        assert found[f"{prefix}.attention.qkv.bias"] == Shard(0, (16, 8, 8))
        assert found[f"{prefix}.attention.out.weight"] == Shard(1, (16,))
        assert found[f"{prefix}.gate.weight"] == found[f"{prefix}.up.weight"] == Shard(0, (32,))
        assert found[f"{prefix}.down.weight"] == Shard(1, (32,))
        assert f"{prefix}.attention.head_norm.weight" not in found
        assert f"{prefix}.down.bias" not in found
    assert all(shard_of(p) is None for p in model.parameters()), "thinking leaves no trace"


def test_torchs_own_attention_is_divided_by_heads():
    found = split_of(torch_encoder(), torch.randn(2, 12), 2)
    assert found["2.layers.0.self_attn.in_proj_weight"] == Shard(0, (16, 16, 16))
    assert found["2.layers.0.self_attn.out_proj.weight"] == Shard(1, (16,))


def test_what_cannot_be_divided_is_left_whole_and_the_nearest_is_named():
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    assert split_of(model, torch.randn(2, 12), 5) == {}
    assert (
        _nearest_tp(model, lambda: model(torch.randn(2, 12)), 5) == "use tp=4, or another axis (dp_shard, pp)"
    )


@pytest.mark.parametrize(("how", "times"), [("none", 1), ("selective", 2), ("full", 2)])
def test_recomputation_computes_again_and_counts_statistics_once(how, times):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    calls = 0

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(x)

    x = torch.randn(3, 4, requires_grad=True)
    recomputed(forward, how, model)(x).sum().backward()
    assert calls == times
    assert int(model[1].num_batches_tracked) == 1


def test_pipelines_cut_where_the_planner_has_measured_while_there_are_enough_pieces():
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    # The last has a third and more of all weights.
    model = nn.Sequential(*(Block(width) for width in (4, 4, 4, 6)))
    assert [piece.name for piece in pieces_for(model, 3)] == ["0", "1", "2", "3"]
    assert [piece.name for piece in pieces_for(model, 4)] == ["0", "1", "2", "3"]
    assert len(pieces_for(model, 5)) >= 5
