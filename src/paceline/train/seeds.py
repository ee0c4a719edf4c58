"""Randomness as a function of (seed, purpose, index), never of the rank."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed from a cryptographic hash (BLAKE2b) of what it is for."""
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def mix(base: int, index: int) -> int:
    """A 63-bit seed for element `index` of a sequence: SplitMix64 (Steele et al. 2014), a microsecond."""
    z = (base + (index + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1


def seed_everything(seed: int) -> None:
    """Seed torch on every device, numpy and Python: for building the model and the data sets."""
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`, quickly: before each micro-batch."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Afterwards torch's generators of the CPU and of `device` go on as if nothing had been drawn within."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
