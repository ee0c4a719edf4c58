"""Three jobs on random data, of a size that keeps a GPU busy, and one that does not.

    paceline train benchmarks/gpu_jobs.py --set model=gpt

`--set model=` chooses one:

    gpt      a GPT of 218 M parameters, 32 windows of 512 tokens in a global batch, AdamW
    conv     six convolutions of up to 512 channels with BatchNorm on 256 images 3×64×64, SGD with momentum
    mlp      eight linear layers of 4096 (134 M parameters) on 2,048 rows, AdamW
    launches gpt-small of peer_jobs.py (1.2 M parameters): hundreds of small kernels, which run faster than the
             processor launches them
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

options = paceline.options(model="gpt")
_MODELS = {
    "gpt": lambda: make(
        functools.partial(GPT, 1024, 16, 16, 16_384, 512), functools.partial(tokens, 16_384, 512),
        next_token_loss, adamw, 32,
    ),
    "conv": lambda: make(
        functools.partial(ConvNet, 128), functools.partial(labelled, (3, 64, 64), 10), class_loss, sgd, 256
    ),
    "mlp": lambda: make(
        functools.partial(MLP, (4096,) * 9), functools.partial(regression, 4096), squared_loss, adamw, 2048
    ),
    "launches": lambda: make(
        functools.partial(GPT, 128, 6, 4, 512, 64), functools.partial(tokens, 512, 64), next_token_loss, adamw, 16
    ),
}  # fmt: skip
if options.model not in _MODELS:
    raise paceline.OptionError(
        f"option model={options.model!r}", next_step=f"use one of: {', '.join(_MODELS)}"
    )
job = _MODELS[options.model]()
