"""Which library multiplies matrices on a CPU: the one that torch takes, or oneDNN.

torch's builds for x86-64 multiply float32 matrices with Intel's MKL, which on an AMD EPYC with AVX-512 is as fast as
instructions of 256 bits are. oneDNN is in the same builds, and takes half of the time there (docs/decisions/0020). A
call of it costs more, though, and so does every small product, which then passes through Python. So both are tried out
on the job, once, and oneDNN stays where it pays: for products of at least `LEAST_FLOP`, forward and backward,
everywhere in the process.

Sums are taken in another order: results differ in the last bits, as they do between two versions of a library.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

from paceline.errors import OptionError
from paceline.train.data import map_tensors

VARIABLE = "PACELINE_MATMUL"
AUTO, TORCH, ONEDNN = "auto", "torch", "onednn"
LEAST_FLOP = 8e6
"""Of a product [m, k] × [k, n], 2mkn: smaller ones are left to torch, whose calls take less time."""
MOST_RATIO = 0.95
"""oneDNN must take at most this share of the time."""
_ROUNDS = 4
_ENOUGH_S = 2.0
_TOLERANCE = 1e-5
_LARGE = 1024
"""Rows and columns of what stands for the products of a model that is too large to be tried out."""


class Matmul:
    """What multiplies matrices in this process, once that has been found. One for all layouts of a job."""

    def __init__(self) -> None:
        self.is_decided = False
        self.ratio: float | None = None
        """Time of a forward and a backward pass with oneDNN, over that without, where it is taken; else None."""

    @property
    def library(self) -> str:
        """`onednn` or `torch`."""
        return TORCH if self.ratio is None else ONEDNN

    def describe(self) -> str:
        """A sentence about it, where it is not what torch takes; else nothing."""
        if self.ratio is None:
            return ""
        why = (
            f"as {VARIABLE} says"
            if wanted_library() == ONEDNN
            else f"a forward and a backward pass took {self.ratio:.2f} of the time"
        )
        return f"oneDNN multiplied large matrices in place of the library that torch takes: {why}."

    def measure(
        self, run: Callable[[], float], clock: Callable[[], float] = time.process_time
    ) -> float | None:
        """The ratio, from forward and backward passes by turns; None where it does not pay, or is not possible.

        Args:
            run: a forward and a backward pass; gives the loss, which must not change by more than a relative 1e-5.
                What it raises is left to the step that comes after: some models only train in one way.
            clock: of processor time, since a process that has to stop now and then would be judged by chance.
        """
        if not is_available():
            return None
        ratios: list[float] = []
        begin_s = clock()
        try:
            for number in range(_ROUNDS):
                seconds: list[float] = []
                losses: list[float] = []
                for wanted in (True, False):
                    use_onednn(wanted)
                    start_s = clock()
                    losses.append(run())
                    seconds.append(clock() - start_s)
                    if wanted and num_products() == 0:
                        return None
                if not abs(losses[0] - losses[1]) <= _TOLERANCE * abs(losses[1]):
                    return None
                is_late = clock() - begin_s > _ENOUGH_S
                if number > 0 or is_late:  # the first round warms up, if there is time for that
                    ratios.append(seconds[0] / seconds[1])
                if is_late:
                    break
        except Exception:
            return None
        finally:
            use_onednn(False)
        ratio = median(ratios)
        return ratio if ratio <= MOST_RATIO else None

    def measure_large(self) -> float | None:
        """As `measure`, for a model that has no room to be tried out whole: such a model's products are large."""
        left, right = torch.rand(_LARGE, _LARGE), torch.rand(_LARGE, _LARGE)
        return self.measure(lambda: float(torch.mm(left, right).sum()))

    def decide(self, ratio: float | None) -> None:
        """Take what was found, here or by another worker."""
        self.is_decided, self.ratio = True, ratio
        use_onednn(ratio is not None)


def may_be_large(model: nn.Module, batch: Any) -> bool:
    """Whether a weight matrix of the model may be in a product that is large, as far as sizes tell.

    A matrix meets no more rows than a batch has numbers, mostly far fewer.
    """
    numbers = [0]
    map_tensors(batch, lambda tensor: numbers.append(tensor.numel()) or tensor)  # type: ignore[func-returns-value]
    weights = max((p.numel() for p in model.parameters() if p.dim() == 2), default=0)
    return 2.0 * weights * max(numbers) >= LEAST_FLOP


def wanted_library() -> str:
    """What the environment's PACELINE_MATMUL says: `auto`, if it says nothing.

    Raises:
        OptionError: it is none of `auto`, `torch` and `onednn`.
    """
    wanted = os.environ.get(VARIABLE, AUTO)
    if wanted not in (AUTO, TORCH, ONEDNN):
        raise OptionError(
            f"{VARIABLE} of the environment is {wanted!r}", next_step=f"use {AUTO}, {TORCH} or {ONEDNN}"
        )
    return wanted


def is_available() -> bool:
    """Whether this build of torch has what it takes."""
    accepted = inspect.signature(torch.library.Library.impl).parameters
    has_linear = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return bool(torch.backends.mkldnn.is_available() and has_linear and "allow_override" in accepted)


def use_onednn(wanted: bool) -> None:
    """Let oneDNN multiply large float32 matrices in this process from now on, or torch again.

    It is `torch.mm` and `torch.addmm` on CPUs that change, which is what `F.linear`, `@` of matrices and their
    backward passes call; not products in batches, and not what attention and compiled code do inside.
    """
    global _kernels
    if wanted and _kernels is None:
        _kernels = _Kernels()
    elif not wanted and _kernels is not None:
        _kernels.remove()
        _kernels = None


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """Within, torch multiplies all matrices with what it takes by itself."""
    was_onednn = _kernels is not None
    use_onednn(False)
    try:
        yield
    finally:
        use_onednn(was_onednn)


def num_products() -> int:
    """How many products oneDNN has carried out since `use_onednn`."""
    return 0 if _kernels is None else _kernels.num_products


class _Kernels:
    """torch's kernels of `mm` and `addmm` for CPUs, replaced until `remove`."""

    def __init__(self) -> None:
        self.num_products = 0
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        # Their own implementations, reached by the forms that were left as they are.
        self._mm, self._addmm = torch.ops.aten.mm.out, torch.ops.aten.addmm.out
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden is what is wanted
            self._library.impl("mm", self._product, "CPU", allow_override=True)
            self._library.impl("addmm", self._sum_and_product, "CPU", allow_override=True)

    def remove(self) -> None:
        """Let torch's own be called again."""
        self._library._destroy()

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if _is_large(left, right):
            self.num_products += 1
            return self._multiply(left, right.t(), None, "none", [], "")  # type: ignore[no-any-return]
        out = left.new_empty((left.shape[0], right.shape[1]))
        return self._mm(left, right, out=out)  # type: ignore[no-any-return]

    def _sum_and_product(
        self, added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> torch.Tensor:
        is_bias = beta == 1 and alpha == 1 and added.dtype is torch.float32 and added.dim() == 1
        if is_bias and added.shape[0] == right.shape[1] and added.is_contiguous() and _is_large(left, right):
            self.num_products += 1
            return self._multiply(left, right.t(), added, "none", [], "")  # type: ignore[no-any-return]
        out = left.new_empty((left.shape[0], right.shape[1]))
        return self._addmm(added, left, right, beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]


_kernels: _Kernels | None = None


def _is_large(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether oneDNN is to multiply them: large float32 matrices that fit, whose rows or columns lie in one piece."""
    rows, inner = left.shape
    columns = right.shape[1]
    return (
        2.0 * rows * inner * columns >= LEAST_FLOP
        and left.dtype is torch.float32
        and right.dtype is torch.float32
        and right.shape[0] == inner
        and _is_plain(left)
        and _is_plain(right)
    )


def _is_plain(matrix: torch.Tensor) -> bool:
    """Whether its rows, or its columns, lie one after the other: not views into others, nor one row said many times."""
    rows, columns = matrix.shape
    return matrix.stride() in ((columns, 1), (1, rows))
