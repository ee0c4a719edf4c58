"""Five jobs on random data that any program can be asked to train: for comparing programs, not for learning.

    paceline train benchmarks/peer_jobs.py --set model=gpt-small

`--set model=` chooses one:

    gpt-small   a GPT of 1.2 M parameters, 16 windows of 64 tokens in a global batch, AdamW
    gpt-30m     a GPT of 29 M parameters, 8 windows of 64 tokens, AdamW
    conv        six convolutions with BatchNorm on 64 images 3×32×32, SGD with momentum
    mlp-tiny    a perceptron 20-64-64-2 on 64 rows, AdamW
    mlp-wide    four linear layers of 4096 (67 M parameters) on 16 rows, AdamW: mostly the optimizer's work

The data are a function of a fixed seed (random_jobs.py). No model has dropout, so that losses can be compared to the
last digits.
"""

from __future__ import annotations

import functools

from peer_models import GPT, MLP, ConvNet
from random_jobs import (
    adamw,
    class_loss,
    labelled,
    make,
    next_token_loss,
    regression,
    sgd,
    squared_loss,
    tokens,
)

import paceline

options = paceline.options(model="gpt-small")


JOBS = {
    "gpt-small": lambda: make(
        functools.partial(GPT, 128, 6, 4, 512, 64), functools.partial(tokens, 512, 64),
        next_token_loss, adamw, 16,
    ),
    "gpt-30m": lambda: make(
        functools.partial(GPT, 512, 6, 8, 20_000, 64), functools.partial(tokens, 20_000, 64),
        next_token_loss, adamw, 8,
    ),
    "conv": lambda: make(
        functools.partial(ConvNet, 24), functools.partial(labelled, (3, 32, 32), 10), class_loss, sgd, 64
    ),
    "mlp-tiny": lambda: make(
        functools.partial(MLP, (20, 64, 64, 2)), functools.partial(labelled, (20,), 2), class_loss, adamw, 64
    ),
    "mlp-wide": lambda: make(
        functools.partial(MLP, (4096,) * 5), functools.partial(regression, 4096), squared_loss, adamw, 16
    ),
}  # fmt: skip
if options.model not in JOBS:
    raise paceline.OptionError(f"option model={options.model!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.model]()
