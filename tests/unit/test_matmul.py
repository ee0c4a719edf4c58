"""oneDNN in the place of what torch multiplies matrices with: right numbers, only where it pays, and back again."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline
from paceline.errors import OptionError
from paceline.train import matmul
from paceline.train.matmul import (
    Matmul,
    by_torch,
    is_available,
    may_be_large,
    num_products,
    use_onednn,
    wanted_library,
)

pytestmark = pytest.mark.skipif(
    not is_available(), reason="this build of torch has no oneDNN to multiply with"
)


@pytest.fixture(autouse=True)
def left_to_torch(monkeypatch):
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    yield
    use_onednn(False)


def matrix(rows, columns, *, by_columns=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + 7 * columns)
    drawn = torch.randn(rows, columns, generator=generator).to(dtype)
    return drawn.t().contiguous().t() if by_columns else drawn


def with_onednn(function):
    """What it gives, and how many products oneDNN carried out for it."""
    use_onednn(True)
    try:
        return function(), num_products()
    finally:
        use_onednn(False)


def exact(left, right, bias=0.0):
    return left.double() @ right.double() + (bias.double() if isinstance(bias, torch.Tensor) else bias)


def distance(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("by_columns", "other_by_columns"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(128, 256, 512), (16, 1024, 1024), (1000, 67, 101), (64, 3000, 30)]
)
def test_products_are_right_however_the_matrices_lie(rows, inner, columns, by_columns, other_by_columns):
    left = matrix(rows, inner, by_columns=by_columns)
    right = matrix(inner, columns, by_columns=other_by_columns)
    bias = torch.randn(columns)
    product, num = with_onednn(lambda: left @ right)
    assert num == 1
    assert distance(product, exact(left, right)) < 1e-6
    assert product.is_contiguous()
    with_bias, num = with_onednn(lambda: torch.addmm(bias, left, right))
    assert num == 1
    assert distance(with_bias, exact(left, right, bias)) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 256), (4, 16, 256)])
def test_a_linear_layer_and_its_gradients(bias, shape):
    layer = nn.Linear(256, 512, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    doubled = nn.Linear(256, 512, bias=bias).double()
    doubled.load_state_dict(layer.state_dict())
    y = x.detach().double().requires_grad_()

    def train():
        F.gelu(layer(x)).square().mean().backward()

    _, num = with_onednn(train)
    assert num == 3
    F.gelu(doubled(y)).square().mean().backward()
    pairs = [(x, y), *zip(layer.parameters(), doubled.parameters(), strict=True)]
    assert max(distance(mine.grad, wanted.grad) for mine, wanted in pairs) < 1e-6


LARGE = matrix(256, 256)
LEFT_TO_TORCH = {
    "small": lambda: matrix(8, 8) @ matrix(8, 8),
    "doubles": lambda: LARGE.double() @ LARGE.double(),
    "bfloat16": lambda: LARGE.bfloat16() @ LARGE.bfloat16(),
    "one row said many times": lambda: LARGE[:1].expand(256, 256) @ LARGE,
    "columns of a wider matrix": lambda: matrix(256, 300)[:, :256] @ LARGE,
    "every second row": lambda: LARGE @ matrix(512, 256)[::2],
    "nothing": lambda: torch.zeros(0, 300) @ matrix(300, 300),
    "an empty sum": lambda: torch.zeros(300, 0) @ torch.zeros(0, 300),
    "a scaled sum": lambda: torch.addmm(LARGE[0], LARGE, LARGE, beta=0.5, alpha=2.0),
    "a sum of matrices": lambda: torch.addmm(LARGE, LARGE, LARGE),
    "a sum with one number": lambda: torch.addmm(LARGE[0, :1], LARGE, LARGE),
    "in batches": lambda: torch.bmm(LARGE.view(4, 64, 256), LARGE.view(4, 256, 64)),
    "into a place": lambda: torch.mm(LARGE, LARGE, out=torch.empty(256, 256)),
}


@pytest.mark.parametrize("kind", LEFT_TO_TORCH)
def test_all_else_is_torchs_own_to_the_bit(kind):
    function = LEFT_TO_TORCH[kind]
    wanted = function()
    found, num = with_onednn(function)
    assert num == 0
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_what_does_not_fit_is_torchs_error():
    with pytest.raises(RuntimeError) as wanted:
        matrix(256, 256) @ matrix(255, 256)
    with pytest.raises(RuntimeError) as found:
        with_onednn(lambda: matrix(256, 256) @ matrix(255, 256))
    assert str(found.value) == str(wanted.value)


def test_it_comes_and_goes_without_a_trace(recwarn):
    wanted = LARGE @ LARGE
    for _ in range(3):
        use_onednn(True)
        use_onednn(True)
        assert num_products() == 0
        LARGE @ LARGE
        assert num_products() == 1
        use_onednn(False)
        use_onednn(False)
        assert num_products() == 0
        assert torch.equal(LARGE @ LARGE, wanted)
    assert not recwarn.list


class Ticking:
    """A pass that takes as long as is said with each library."""

    def __init__(self, torch_s, onednn_s, losses=(1.0, 1.0)):
        self.now_s, self.seconds, self.losses, self.runs = 0.0, (torch_s, onednn_s), losses, 0

    def __call__(self):
        return self.now_s

    def run(self):
        before = num_products()
        LARGE @ LARGE
        by_onednn = num_products() > before
        self.runs += 1
        self.now_s += self.seconds[by_onednn]
        return self.losses[by_onednn]


@pytest.mark.parametrize(("onednn_s", "ratio"), [(0.05, 0.5), (0.094, 0.94), (0.097, None), (0.2, None)])
def test_it_is_taken_where_it_saves_a_twentieth(onednn_s, ratio):
    clock = Ticking(0.1, onednn_s)
    assert Matmul().measure(clock.run, clock) == (ratio and pytest.approx(ratio))
    assert num_products() == 0


def test_long_passes_are_not_repeated():
    clock = Ticking(10.0, 5.0)
    assert Matmul().measure(clock.run, clock) == pytest.approx(0.5)
    assert clock.runs == 2


def test_a_model_without_large_products_is_tried_once():
    runs = []
    assert Matmul().measure(lambda: runs.append(1) or float((matrix(8, 8) @ matrix(8, 8)).sum())) is None
    assert len(runs) == 1


def test_a_large_product_stands_for_a_model_without_room(monkeypatch):
    seen = []

    def measure(self, run, clock=None):
        use_onednn(True)
        run()
        seen.append(num_products())
        use_onednn(False)
        return 0.5

    monkeypatch.setattr(Matmul, "measure", measure)
    assert Matmul().measure_large() == 0.5
    assert seen == [1]


@pytest.mark.parametrize("losses", [(1.0, 1.0001), (1.0, float("nan"))])
def test_another_loss_is_no_gain(losses):
    clock = Ticking(0.1, 0.05, losses)
    assert Matmul().measure(clock.run, clock) is None


def test_an_error_of_the_model_leaves_torch_as_it_was():
    def run():
        LARGE @ LARGE
        raise ValueError("the user's")

    assert Matmul().measure(run) is None
    assert num_products() == 0
    LARGE @ LARGE
    assert num_products() == 0


@pytest.mark.parametrize(
    ("model", "shape", "wanted"),
    [
        (nn.Linear(256, 512), (64, 256), True),
        (nn.Linear(8, 8), (64, 256), False),
        (nn.Conv2d(64, 64, 3), (64, 64, 32, 32), False),
        (nn.LSTM(64, 64), (128, 16, 64), True),
        (nn.Tanh(), (64, 256), False),
    ],
)
def test_models_without_large_matrices_are_not_tried(model, shape, wanted):
    assert may_be_large(model, {"x": [torch.zeros(shape)]}) == wanted


def job():
    return paceline.Job(
        model=lambda: nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)),
        data=lambda split: TensorDataset(matrix(128, 256), matrix(128, 256)),
        loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=64, steps=2,
    )  # fmt: skip


def train():
    with paceline.Session(job()) as session:
        losses = [session.step(batch).loss for batch in session.batches()]
        return session.datasets.matmul, num_products(), losses


@pytest.mark.parametrize(("wanted", "num"), [("torch", 0), ("onednn", 10)])
def test_a_session_takes_what_the_environment_says_and_gives_it_back(wanted, num, monkeypatch):
    monkeypatch.setenv(matmul.VARIABLE, wanted)
    found, products, _ = train()
    assert found.library == wanted
    assert products == num
    assert num_products() == 0
    assert ("as PACELINE_MATMUL says" in found.describe()) == (wanted == "onednn")


def test_a_session_finds_out_in_its_first_step_and_trains_the_same(monkeypatch):
    results = {}
    for ratio in (None, 0.5):
        monkeypatch.setattr(Matmul, "measure", lambda self, run, ratio=ratio: (run(), ratio)[1])
        found, products, results[ratio] = train()
        assert found.is_decided
        assert (products > 0) == (ratio is not None)
    assert results[0.5] == pytest.approx(results[None], rel=1e-5)
    assert "took 0.50 of the time" in found.describe()


def test_bf16_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(Matmul, "measure", lambda self, run: pytest.fail("it was tried"))
    with paceline.Session(job(), precision="bf16") as session:
        session.step(next(session.batches()))
        assert session.datasets.matmul.library == "torch"


def test_an_unknown_library(monkeypatch):
    monkeypatch.setenv(matmul.VARIABLE, "blas")
    with pytest.raises(OptionError, match="PACELINE_MATMUL of the environment is 'blas'"):
        wanted_library()


def test_within_a_block_all_is_left_to_torch():
    def fail_within():
        with by_torch():
            LARGE @ LARGE
            assert num_products() == 0
            raise ValueError("of the block")

    use_onednn(True)
    with pytest.raises(ValueError, match="of the block"):
        fail_within()
    LARGE @ LARGE
    assert num_products() == 1
    use_onednn(False)
    with by_torch():
        pass
    LARGE @ LARGE
    assert num_products() == 0
