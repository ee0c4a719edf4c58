"""Trained weights on disk, as safetensors: no pickle, nothing in them can run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

FILE_NAME = "weights.safetensors"

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT_BYTES = _LENGTH_BYTES = 8


def save_weights(model: nn.Module, directory: Path) -> str:
    """Write the model's parameters and buffers under their own names; the file's name.

    `safetensors.torch.load_model(model, path)` reads them back. The file appears whole or not at all.
    """
    path = directory / FILE_NAME
    partial = path.with_suffix(".partial")
    save_model(model, str(partial))
    os.replace(partial, path)
    return FILE_NAME


def save_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    directory: Path,
) -> str:
    """The same, of tensors that come one after the other, in any order: no two of them need to be in memory at once.

    Args:
        described: name -> type and shape of all that come.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    offset = 0
    for name, (dtype, shape) in described.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        begins[name] = offset
        header[name] = {
            "dtype": _TYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    path = directory / FILE_NAME
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name, tensor in tensors:
            file.seek(_LENGTH_BYTES + len(text) + begins[name])
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
    os.replace(partial, path)
    return FILE_NAME


def load_weights(model: nn.Module, directory: Path) -> nn.Module:
    """Read into `model` what was saved in `directory`."""
    load_model(model, str(directory / FILE_NAME))
    return model
