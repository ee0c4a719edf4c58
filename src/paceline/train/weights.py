"""Trained weights on disk, as safetensors: no pickle, nothing in them can run."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_model
from torch import nn

FILE_NAME = "weights.safetensors"


def save_weights(model: nn.Module, directory: Path) -> str:
    """Write the model's parameters and buffers under their own names; the file's name.

    `safetensors.torch.load_model(model, path)` reads them back. The file appears whole or not at all.
    """
    path = directory / FILE_NAME
    partial = path.with_suffix(".partial")
    save_model(model, str(partial))
    os.replace(partial, path)
    return FILE_NAME
