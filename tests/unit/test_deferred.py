"""A model that is built in parts has, bit for bit, the numbers of one that is built whole."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paceline.errors import JobError
from paceline.split import deferred as deferred_module
from paceline.split import rules  # noqa: F401 - fills the tables
from paceline.split.deferred import DeferredParameters, build_deferred
from paceline.split.pieces import find_pieces
from paceline.split.recording import CannotRecordError, Recording
from paceline.split.stages import PieceCalls
from paceline.split.tensor_plan import plan_tensor_split
from paceline.train.build import build_model, build_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from split_jobs import SPLIT_JOBS, Transformer

CPU = torch.device("cpu")


def many_inits() -> nn.Module:
    """What users do to weights."""
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(8)))
    nn.init.trunc_normal_(model[0].weight, std=0.5)  # draws again what lies outside
    nn.init.orthogonal_(model[1].weight)
    nn.init.xavier_uniform_(model[2].weight, gain=2.0)
    with torch.no_grad():
        model[3].weight[:, ::2] = torch.sin(torch.arange(12.0))
        model[3].weight[0].fill_(0)
        model[4].weight.copy_(torch.eye(24) * 0.5)
        model[5].weight.mul_(model[2].weight.norm()).add_(model[4].weight.T)
        if model[6].weight.max() > 0.1:  # depends on a value
            model[6].weight.sub_(torch.rand(24, 24, generator=torch.Generator().manual_seed(5)))
        model[2].weight.zero_()  # after it was read
    model[7].weight.data = torch.randn(24, 24) * 0.1
    model[7].weight.no_decay = True
    return model


def views_and_buffers() -> nn.Module:
    model = nn.Module()
    model.embedding = nn.Embedding(32, 24, padding_idx=3)
    model.head = nn.Linear(24, 32, bias=False)
    model.head.weight = model.embedding.weight
    model.register_buffer("mask", torch.ones(40, 40, dtype=torch.bool).tril())
    model.table = torch.randn(40, 40).cumsum(0)
    model.encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 4, 48), 2, enable_nested_tensor=False
    )
    model.recurrent = nn.LSTM(24, 24)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(24, 24, 3))
    model.half = nn.Linear(24, 24, dtype=torch.bfloat16)
    model.frozen = nn.Parameter(torch.rand(30, 30), requires_grad=False)
    return model


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "many_inits": many_inits,
    "views_and_buffers": views_and_buffers,
    **{
        name: SPLIT_JOBS[name][0].model
        for name in ("transformer", "unet", "torch_encoder", "batch_norm", "tied")
    },
}


def built(
    make: Callable[[], nn.Module], dtype: torch.dtype | None = None
) -> tuple[nn.Module, DeferredParameters]:
    torch.manual_seed(3)
    return build_deferred(make, CPU, dtype, least_bytes=64)


def values(model: nn.Module, deferred: DeferredParameters) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        with deferred.filled([tensor]):
            found[name] = tensor.detach().clone()
    return found


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("cache_bytes", [0, 5000, 1 << 30])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_number_is_that_of_a_plain_build(name, cache_bytes, dtype, monkeypatch):
    monkeypatch.setattr(Recording.__init__, "__kwdefaults__", {"least_bytes": 64, "cache_bytes": cache_bytes})
    torch.manual_seed(3)
    plain = PROGRAMS[name]().to(dtype)
    after = torch.rand(1)
    model, deferred = built(PROGRAMS[name], dtype)
    assert torch.equal(torch.rand(1), after), "the program has drawn as many random numbers"
    assert len(deferred) > 1
    found, wanted = values(model, deferred), values(plain, DeferredParameters())
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].dtype == tensor.dtype


def test_what_was_attached_and_shared_stays():
    model, deferred = built(views_and_buffers)
    assert model.head.weight is model.embedding.weight
    assert not model.frozen.requires_grad
    assert torch.equal(model.table, views_and_buffers_table())
    other, _ = built(many_inits)
    assert other[7].weight.no_decay
    assert type(other[7].weight) is nn.Parameter
    deferred.settle(model.parameters())
    outputs, _ = model.recurrent(torch.randn(2, 3, 24))
    assert outputs.isfinite().all()


def views_and_buffers_table() -> torch.Tensor:
    torch.manual_seed(3)
    table: Any = views_and_buffers().table
    return table


def test_parameters_take_no_memory_until_they_are_filled():
    model, deferred = built(lambda: nn.Linear(100, 100))
    weight = model.weight
    assert weight in deferred
    assert weight.untyped_storage().nbytes() == 0
    with deferred.filled([weight]):
        assert weight.untyped_storage().nbytes() == 40_000
    assert weight.untyped_storage().nbytes() == 0
    deferred.settle([weight])
    assert weight.untyped_storage().nbytes() == 40_000
    assert len(deferred) == 0


def test_never_are_all_values_in_memory_at_once():
    """Ten layers of 4 MB each, and a cache of 5 MB."""
    largest = 0

    class Watched(Recording):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = super().__torch_dispatch__(func, types, args, kwargs)
            largest = max(largest, sum(storage.nbytes() for storage in self._cache.values()))
            return result

    with Watched(cache_bytes=5_000_000):
        nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(10)))
    assert 4_000_000 <= largest <= 8_000_000


def test_pieces_are_lent_their_values_one_at_a_time():
    model, deferred = built(SPLIT_JOBS["transformer"][0].model)
    torch.manual_seed(3)
    plain = SPLIT_JOBS["transformer"][0].model()
    pieces = find_pieces(model)
    calls = PieceCalls(model, pieces)
    tokens = torch.randint(1, 16, (2, 8))
    held: list[int] = []

    def look(piece: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        held.append(sum(any(p.untyped_storage().nbytes() for p in other.module.parameters() if p in deferred)
                        for other in pieces if other.name.startswith("blocks")))  # fmt: skip
        return forward(*args, **kwargs)

    calls.on_call = look
    with deferred.lending() as calls.around:
        found = model(tokens)
    assert torch.equal(found, plain(tokens))
    assert max(held) == 1
    assert not any(p.untyped_storage().nbytes() for p in model.parameters() if p in deferred)


def test_what_is_divided_is_the_same_as_in_a_plain_model():
    """Lending is no reading: a small weight that seems to be gathered would be left whole."""

    def make() -> nn.Module:
        return Transformer(blocks=12, width=32)

    def planned(model: nn.Module) -> Any:
        tokens = torch.randint(1, 16, (2, 8), generator=torch.Generator().manual_seed(0))
        return plan_tensor_split(model, lambda: model(tokens).logsumexp(-1).sum(), 2)

    model, deferred = built(make)
    calls = PieceCalls(model, find_pieces(model))
    with deferred.lending() as calls.around:
        found = planned(model)
    assert found == planned(make())
    assert "blocks.11.attention.out.weight" in found[0]


class KeepsAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)
        self.keep = [self.linear.weight.detach()[0]]


def numpy_build() -> nn.Module:
    linear = nn.Linear(24, 24)
    linear.weight.detach().numpy()[:] = 1.0
    return linear


def uninitialised() -> nn.Module:
    linear = nn.Linear(24, 24)
    linear.extra = nn.Parameter(torch.empty(24, 24))
    return linear


HELD: list[torch.Tensor] = []


def held_elsewhere() -> nn.Module:
    linear = nn.Linear(24, 24)
    HELD.append(linear.weight)
    return linear


def same_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model[1].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize("make", [numpy_build, uninitialised, held_elsewhere, same_memory, KeepsAView])
def test_what_cannot_be_built_in_parts_is_built_whole(make, monkeypatch):
    monkeypatch.setattr(deferred_module, "LEAST_BYTES", 64)
    # Whatever goes wrong sends `build_model` the other way.
    with pytest.raises((CannotRecordError, RuntimeError)):
        built(make)
    job = dataclasses.replace(SPLIT_JOBS["transformer"][0], model=make)
    whole, nothing = build_model(job, 7, CPU, None, in_parts=False)
    model, deferred = build_model(job, 7, CPU, None, in_parts=True)
    assert len(deferred) == len(nothing) == 0
    for (name, tensor), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert name == "extra" or torch.equal(tensor, other), name


def test_a_view_of_another_storage_is_not_taken_for_the_weight():
    """`set_` gives a tensor other memory behind the program's back."""
    with pytest.raises(CannotRecordError, match="set_"), Recording(least_bytes=64):
        nn.Linear(24, 24).weight.detach().set_(torch.zeros(24, 24))


def test_no_module_is_said():
    job = dataclasses.replace(SPLIT_JOBS["transformer"][0], model=lambda: 3)
    with pytest.raises(JobError, match="returned int"):
        build_model(job, 7, CPU, None, in_parts=True)


def test_workers_whose_programs_differ_have_other_digests():
    def depends(scale: float) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            linear = nn.Linear(24, 24)
            with torch.no_grad():
                linear.weight.mul_(torch.tensor(scale))
            return linear

        return make

    one, again, other = (built(depends(scale))[1].digest for scale in (1.0, 1.0, 2.0))
    assert one == again != other


class ReadsValues(torch.optim.SGD):
    """Remembers where it started."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["start"] = p.detach().clone()


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
        lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.5),
        ReadsValues,
        lambda params: torch.optim.SGD(
            [{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1}], lr=0.1
        ),
    ],
)
def test_an_optimizer_is_built_without_values(make, monkeypatch):
    monkeypatch.setattr(deferred_module, "LEAST_BYTES", 64)
    old = SPLIT_JOBS["transformer"][0]
    job = dataclasses.replace(old, model=lambda: nn.Linear(24, 24), optimizer=make)
    updated = []
    for in_parts in (False, True):
        model, deferred = build_model(job, 7, CPU, None, in_parts=in_parts)
        assert bool(len(deferred)) == in_parts
        optimizer = build_optimizer(job, list(model.parameters()), deferred)
        deferred.settle(model.parameters())
        for _ in range(2):
            F.mse_loss(model(torch.ones(2, 24)), torch.zeros(2, 24)).backward()
            optimizer.step()
        assert all(p in set(model.parameters()) for g in optimizer.param_groups for p in g["params"])
        updated.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(updated[0][name], updated[1][name]) for name in updated[0])


def test_a_deep_copy_of_a_recorded_module_is_another_module():
    def make() -> nn.Module:
        layer = nn.Linear(24, 24)
        return nn.Sequential(layer, copy.deepcopy(layer))

    model, deferred = built(make)
    assert model[0].weight is not model[1].weight
    found = values(model, deferred)
    assert torch.equal(found["0.weight"], found["1.weight"])
