"""What a proof compares, and what it has to switch off."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paceline.records import Difference, Layout, Proof
from paceline.split.determinism import deterministic
from paceline.train.comparison import Observed, compare


def observed(**changes: object) -> Observed:
    """A step of a model with one layer, `a`, and one running mean."""
    generator = torch.Generator().manual_seed(0)
    gradient, before = torch.randn(20, generator=generator), torch.randn(20, generator=generator)
    fields = {
        "loss": 1.5,
        "grad_norm": 2.0,
        "samples": 8,
        "gradients": {"a": gradient},
        "before": {"a": before},
        "parameters": {"a": before - 0.1 * gradient},
        "buffers": {"mean": torch.ones(3), "count": torch.tensor(2)},
    }
    return Observed(**{**fields, **changes})


def test_a_factor_that_clipping_hides_is_seen_in_the_norm():
    found = compare(1, observed(grad_norm=1.0), observed())
    (norm,) = [d for d in found if d.kind == "gradient norm"]
    assert norm.relative_error == pytest.approx(0.5)
    assert not [
        d for d in compare(1, observed(grad_norm=None), observed(grad_norm=None)) if d.kind == norm.kind
    ]


def worst(seen: Observed, wanted: Observed) -> Difference:
    return max(
        compare(1, seen, wanted), key=lambda d: float("inf") if d.relative_error is None else d.relative_error
    )


def test_the_same_step_has_no_difference():
    assert all(d.relative_error == 0 for d in compare(1, observed(), observed()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": 1.6}, "loss in step 1: relative error 0.067"),
        ({"gradients": {"a": observed().gradients["a"] * 2}}, "gradient of a in step 1: relative error 1"),
        ({"gradients": {"a": None}}, "gradient of a in step 1: no gradient"),
        ({"gradients": {"a": torch.full((20,), torch.nan)}}, "gradient of a in step 1: not finite"),
        ({"parameters": observed().before}, "parameter of a in step 1: relative error 1"),
        ({"buffers": {"mean": torch.ones(3), "count": torch.tensor(3)}}, "buffer of count in step 1"),
    ],
)  # fmt: skip
def test_each_kind_of_difference_is_found(changes, words):
    difference = worst(observed(**changes), observed())
    assert not difference.within_tolerance
    assert difference.describe().startswith(words)


def test_a_gradient_where_one_process_has_none():
    wanted = observed(gradients={"a": None})
    assert "a gradient where one process has none" in worst(observed(), wanted).describe()


def test_rounding_of_a_large_parameter_is_no_difference():
    """One unit in the last place of 1000 is half of an update of 1e-4."""
    before = {"a": torch.full((20,), 1000.0)}
    wanted = observed(before=before, parameters={"a": before["a"] - 1e-4})
    found = observed(before=before, parameters={"a": torch.nextafter(before["a"], torch.tensor(0.0))})
    assert all(d.within_tolerance for d in compare(1, found, wanted))


def test_a_proof_is_equal_only_if_all_differences_are_rounding():
    def proof(*errors: float) -> Proof:
        differences = tuple(Difference(kind="loss", name="", step=1, relative_error=e) for e in errors)
        return Proof(layout=Layout(), steps=1, samples=1, compared=2, worst=differences, proof_s=1.0)

    assert proof(1e-5, 0.0).status == "equal"
    rounding = {"in_float64": proof(1e-14).worst}
    assert proof(2e-5).model_copy(update=rounding).status == "equal"
    assert proof(2e-4).model_copy(update=rounding).status == "different", "the loss has to agree in float32"
    assert proof(0.0).model_copy(update={"parted": "the parameters differ"}).status == "different"
    assert proof(2e-5, 0.0).status == "different"
    assert Proof(layout=Layout(), steps=0, samples=0, compared=0, drawn_at_random=True, proof_s=1).status == (
        "not comparable"
    )


class Dropping(nn.Module):
    """Drops in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.module = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lstm(x)[0] + self.attention(x, x, x)[0] + self.layer(x) + self.module(x)
        x = (
            x
            + F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * self.training)
            + F.dropout(x, 0.5, self.training)
        )
        return x + torch.dropout(x, 0.5, self.training) + F.alpha_dropout(x, 0.5, self.training)


def test_dropout_is_switched_off_whoever_calls_it():
    model, x = Dropping(), torch.randn(2, 4, 8)
    with deterministic(model) as mode:
        results = [model(x) for _ in range(3)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    assert mode.switched_off >= {
        "dropout", "alpha_dropout", "scaled_dot_product_attention", "multi_head_attention_forward",
        "dropout of LSTM",
    }  # fmt: skip
    assert model.lstm.dropout == 0.5
    assert not torch.equal(model(x), model(x)), "and on again afterwards"


def test_nothing_is_switched_off_where_nothing_drops():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)).train()
    with deterministic(model) as mode:
        model(torch.randn(2, 8))
        with torch.no_grad():
            Dropping().eval()(torch.randn(2, 4, 8))
    assert not mode.switched_off
