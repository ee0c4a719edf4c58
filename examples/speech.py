"""Speech: tell nine speakers apart by one vowel, or write down what was said.

    paceline train examples/speech.py                      # JapaneseVowels: who is speaking
    paceline train examples/speech.py --set data=fillets   # Czech sentences: sound -> characters
    paceline train examples/speech.py --set size=small     # seconds, for a first look

**data=vowels.** 640 utterances of /ae/ by nine men, each 7 to 29 frames of 12 LPC cepstrum
coefficients (Kudo, Toyama and Shimbo 1999, CC BY 4.0), in the official split of 270 and 370. They come
inside the wheel of `pip install sktime==1.2.0` (BSD-3), of which nothing is imported. A linear
classifier reaches 98.4 % of the test utterances; this small convolutional network 99.2 to 99.7 %.

**data=fillets.** The Czech dialogues of the game Fish Fillets: about 1,770 transcribed clips, 100
minutes, mostly two actors (GPL-2+, so fetched and never shipped with paceline). Convolutions and
bidirectional recurrent layers read log-mel frames and are trained with connectionist temporal classification
(Graves et al. 2006); the metric is the character error rate. One text in ten is held out, with all its
clips, by the hash of the text. `pip install soundfile`, and once, without root:

    apt-get download fillets-ng-data fillets-ng-data-cs
    for package in fillets-ng-data*.deb; do dpkg -x "$package" "${PACELINE_DATA:-data}"; done

Features are computed once and kept under $PACELINE_CACHE or ~/.cache/paceline.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock  # comes with torch
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import paceline

options = paceline.options(size="full", data="vowels")
small = options.size == "small"

Arrays = dict[str, np.ndarray]
Batch = dict[str, torch.Tensor]


def cached(name: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays kept under `name`, built by whichever worker comes first while the others wait."""
    folder = Path(os.environ.get("PACELINE_CACHE", Path.home() / ".cache/paceline")) / "speech"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npz"
    if not path.exists():
        try:
            with filelock.FileLock(f"{path}.lock", timeout=900):
                if not path.exists():
                    part = path.with_suffix(f".{os.getpid()}.npz")
                    np.savez(part, **build())
                    os.replace(part, path)
        except filelock.Timeout as error:
            raise paceline.DataError(
                f"{path} was not there after 15 minutes",
                cause="another process that was building it is stuck",
                next_step="end it, or set PACELINE_CACHE to another folder",
            ) from error
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def padded(samples: list[Batch]) -> Batch:
    """Frames (batch, longest, channels), zero beyond each utterance's `lengths`; targets likewise."""
    return {
        "frames": nn.utils.rnn.pad_sequence([s["frames"].float() for s in samples], batch_first=True),
        "lengths": torch.tensor([len(s["frames"]) for s in samples]),
        "targets": nn.utils.rnn.pad_sequence([s["targets"] for s in samples], batch_first=True),
        "target_lengths": torch.tensor([len(s["targets"]) for s in samples]),
    }


def inside(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """(batch, longest, 1): one within an utterance, zero in its padding."""
    return (torch.arange(longest, device=lengths.device) < lengths[:, None]).unsqueeze(-1).float()


# ---- data=vowels: who is speaking ------------------------------------------------------------------

VOWELS_SHA256 = {
    "train": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "test": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}


def vowels(split: str) -> list[Batch]:
    """The utterances of one split: frames (7 to 29, 12) and the speaker, 0 to 8."""
    # Called by every worker: 0.1 s for all of it, so nothing is cached.
    package = importlib.util.find_spec("sktime")
    if package is None or package.origin is None:
        raise paceline.DataError(
            "the JapaneseVowels recordings cannot be found",
            cause="they come with the package sktime, which is not installed",
            next_step="pip install sktime==1.2.0",
        )
    path = Path(package.origin).parent / f"datasets/data/JapaneseVowels/JapaneseVowels_{split.upper()}.ts"
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != VOWELS_SHA256[split]:
        raise paceline.DataError(
            f"{path} is not the file that this example knows",
            cause="another version of sktime",
            next_step="pip install sktime==1.2.0",
        )
    samples = []
    for line in content.decode().split("@data\n")[1].splitlines():
        *channels, speaker = line.split(":")
        frames = torch.tensor([[float(value) for value in channel.split(",")] for channel in channels]).T
        samples.append({"frames": frames, "targets": torch.tensor([int(speaker) - 1])})
    return samples


class SpeakerNet(nn.Module):
    """Residual convolutions over time, then the mean and the maximum over an utterance's own frames."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        # Rough scale of each coefficient over the training frames.
        self.register_buffer("scale", torch.tensor([0.55, 0.36, 0.28, 0.22, 0.17, 0.18, 0.17, 0.15, 0.13, 0.13, 0.11, 0.09]))
        self.enter = nn.Linear(12, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(depth))
        self.leave = nn.Linear(2 * width, 9)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = inside(lengths, frames.shape[1])
        hidden = self.enter(frames / self.scale)
        for norm, convolution in zip(self.norms, self.convolutions):
            # Masked before each convolution: an utterance's last frames must not see its padding.
            update = convolution((norm(hidden) * mask).transpose(1, 2)).transpose(1, 2)
            hidden = hidden + F.gelu(update)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        maximum = hidden.masked_fill(mask == 0, -math.inf).amax(1)
        return self.leave(torch.cat([mean, maximum], 1))


def vowels_job() -> paceline.Job:
    return paceline.Job(
        model=SpeakerNet,
        data=lambda split: vowels(split)[:: 4 if small else 1],
        collate=padded,
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch["targets"][:, 0], label_smoothing=0.1),
        metrics={"accuracy": lambda outputs, batch: (outputs.argmax(1) == batch["targets"][:, 0]).float().mean()},
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.01),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps),
        clip_norm=1.0,
        batch_size=30,
        epochs=3 if small else 40,
        evaluation_batch_size=128,
    )
