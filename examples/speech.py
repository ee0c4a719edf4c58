"""Speech: tell nine speakers apart by one vowel, or write down what was said.

    paceline train examples/speech.py                      # JapaneseVowels: who is speaking
    paceline train examples/speech.py --set data=fillets   # Czech sentences: sound -> characters
    paceline train examples/speech.py --set size=small     # seconds, for a first look

**data=vowels.** 640 utterances of /ae/ by nine men, each 7 to 29 frames of 12 LPC cepstrum
coefficients (Kudo, Toyama and Shimbo 1999, CC BY 4.0), in the official split of 270 and 370. They come
inside the wheel of `pip install --no-deps sktime==1.2.0` (BSD-3), of which nothing is imported. A linear
classifier reaches 98.4 % of the test utterances; this small convolutional network 98.9 to 99.7 %.

**data=fillets.** The Czech dialogues of the game Fish Fillets: about 1,770 transcribed clips, 100
minutes, mostly two actors (GPL-2+, so fetched and never shipped with paceline). A
convolutional network reads log-mel frames and is trained with connectionist temporal classification
(Graves et al. 2006); the metric is the character error rate. One text in ten is held out, with all its
clips, by the hash of the text. `pip install soundfile`, and once, without root:

    apt-get download fillets-ng-data fillets-ng-data-cs
    for package in fillets-ng-data*.deb; do dpkg -x "$package" "${PACELINE_DATA:-data}"; done

Features are computed once and kept under $PACELINE_CACHE or ~/.cache/paceline.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import filelock  # comes with torch
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import paceline

options = paceline.options(size="full", data="vowels")
small = options.size == "small"
if options.size not in ("full", "small"):
    raise paceline.OptionError(f"option size={options.size!r}", next_step="use full or small")

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
            next_step="pip install --no-deps sktime==1.2.0",
        )
    path = Path(package.origin).parent / f"datasets/data/JapaneseVowels/JapaneseVowels_{split.upper()}.ts"
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != VOWELS_SHA256[split]:
        raise paceline.DataError(
            f"{path} is not the file that this example knows",
            cause="another version of sktime",
            next_step="pip install --no-deps sktime==1.2.0",
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
        # Mean and spread of each coefficient over the training frames.
        mean = [0.869, -0.555, 0.246, -0.267, 0.219, -0.211, -0.174, -0.052, -0.205, -0.181, -0.024, 0.086]
        spread = [0.488, 0.391, 0.301, 0.306, 0.269, 0.168, 0.161, 0.188, 0.188, 0.117, 0.098, 0.128]
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("spread", torch.tensor(spread))
        self.enter = nn.Linear(12, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(depth))
        self.leave = nn.Linear(2 * width, 9)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = inside(lengths, frames.shape[1])
        hidden = self.enter((frames - self.mean) / self.spread)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
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
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch["targets"][:, 0], label_smoothing=0.2),
        metrics={
            "accuracy": lambda outputs, batch: (outputs.argmax(1) == batch["targets"][:, 0]).float().mean()
        },
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.01),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 3e-3, total_steps=steps
        ),
        clip_norm=1.0,
        batch_size=30,
        epochs=3 if small else 40,
        evaluation_batch_size=128,
    )


# ---- data=fillets: what was said -------------------------------------------------------------------

LETTERS = " aábcčdďeéěfghiíjklmnňoópqrřsštťuúůvwxyýzž"  # class 0 is CTC's blank, then these
# Of every Czech script and transcribed sound, in order.
FILLETS_SHA256 = "66260bf55156cf7612adfa2b1e4de190265231471a23366e8f3d00037fc55cf9"
RATE, HOP, WINDOW, MELS = 22050, 220, 512, 40  # samples per second; 10 ms steps; 23 ms windows
DIALOGUE = re.compile(r'^\s*dialogId\(\s*"([^"]+)".*?\)\s*^\s*dialogStr\(\s*"((?:[^"\\]|\\.)*)"', re.M | re.S)


def spoken(text: str) -> str | None:
    """The letters that a subtitle stands for; None where it holds digits, codes or another script."""
    words = " ".join(re.sub(r"[.,:;!?'’‘\"„“”…–-]", " ", unicodedata.normalize("NFC", text).lower()).split())
    return words if words and set(words) <= set(LETTERS) else None


def held_out(text: str) -> bool:
    """One text in ten. By its hash, so that no sentence is in both splits, whoever says it."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def fillets_files() -> tuple[list[tuple[str, bytes]], str]:
    """(text, Ogg bytes) of every transcribed clip, and the digest of all that was read."""
    for root in (Path(os.environ.get("PACELINE_DATA", "data")), Path("/")):
        game = root / "usr/share/games/fillets-ng"
        if (game / "script").is_dir() and any(game.glob("sound/*/cs/*.ogg")):
            break
    else:
        raise paceline.DataError(
            "the recordings of fillets-ng cannot be found",
            cause="they come with the Debian packages fillets-ng-data (subtitles) and fillets-ng-data-cs (sound)",
            next_step="apt-get download fillets-ng-data fillets-ng-data-cs; for p in fillets-ng-data*.deb; "
            'do dpkg -x "$p" DIR; done; export PACELINE_DATA=DIR',
        )
    clips, digest = [], hashlib.sha256()
    for script in sorted(game.glob("script/*/*dialogs_cs.lua")):
        content = script.read_bytes()
        digest.update(content)
        for name, text in DIALOGUE.findall(content.decode()):
            sound = game / "sound" / script.parent.name / "cs" / f"{name}.ogg"
            if sound.exists():
                clips.append((text, sound.read_bytes()))
                digest.update(clips[-1][1])
    return clips, digest.hexdigest()


def mel_filters() -> torch.Tensor:
    """(frequencies, MELS) triangles, evenly spaced in mel = 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(sound: torch.Tensor) -> torch.Tensor:
    """(samples,) -> (frames, MELS), each channel with mean 0 and spread 1 over the clip."""
    spectrum = torch.stft(sound, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    mels = (spectrum.abs().square().T @ mel_filters() + 1e-6).log()
    return (mels - mels.mean(0)) / (mels.std(0) + 1e-3)


def fillets_arrays() -> Arrays:
    """All clips end to end: frames and targets, with the length of each and the split of each."""
    try:
        import io

        import soundfile
    except ImportError as error:
        raise paceline.DataError(
            f"Ogg sound cannot be read: {error}",
            cause="soundfile is not installed",
            next_step="pip install soundfile",
        ) from error
    clips, digest = fillets_files()
    if digest != FILLETS_SHA256:
        raise paceline.DataError(
            f"the recordings of fillets-ng are not those that this example knows (sha256 {digest})",
            cause="another version of the Debian packages",
            next_step="use version 1.0.1-1.1 of fillets-ng-data and fillets-ng-data-cs",
        )
    frames, targets, test = [], [], []
    for text, ogg in clips:
        words = spoken(text)
        if words is None or (small and len(test) == 48):
            continue
        sound, rate = soundfile.read(io.BytesIO(ogg), dtype="float32", always_2d=True)
        sound = sound.mean(1)
        if rate == 2 * RATE:
            sound = sound[: len(sound) // 2 * 2].reshape(-1, 2).mean(1)
        seconds = len(sound) / RATE
        if seconds <= 12 and 0.04 < seconds / len(words) < 0.3:  # longer: songs and sound effects
            frames.append(log_mel(torch.from_numpy(sound)).half().numpy())
            targets.append(np.array([LETTERS.index(letter) + 1 for letter in words], np.uint8))
            test.append(held_out(words))
    return {
        "frames": np.concatenate(frames),
        "frame_counts": np.array([len(f) for f in frames]),
        "targets": np.concatenate(targets),
        "target_counts": np.array([len(t) for t in targets]),
        "test": np.array(test),
    }


def fillets(split: str) -> list[Batch]:
    arrays = cached(f"fillets-1-{options.size}", fillets_arrays)
    frames = torch.from_numpy(arrays["frames"]).split(arrays["frame_counts"].tolist())
    targets = torch.from_numpy(arrays["targets"]).long().split(arrays["target_counts"].tolist())
    wanted = arrays["test"] == (split == "test")
    return [{"frames": f, "targets": t} for f, t, w in zip(frames, targets, wanted, strict=True) if w]


class Listen(nn.Module):
    """A residual block: each channel over time (440 ms), then the channels among themselves."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.over_time = nn.Conv1d(width, width, 11, padding=5, groups=width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heard = self.over_time((self.norm(hidden) * mask).transpose(1, 2)).transpose(1, 2)
        return hidden + self.mix(heard)


class Transcriber(nn.Module):
    """Log-mel frames -> log-probabilities of characters, one for every four frames (40 ms).

    Inside, the clips of a batch are laid end to end with a short silence between them: with clips of
    half a second to twelve, padding all to the longest would cost three times the arithmetic.
    """

    SILENCE = 24  # frames, a multiple of four: wider than any convolution reaches

    def __init__(self, width: int = 192, depth: int = 8) -> None:
        super().__init__()
        self.mask_channels = nn.Dropout1d(0.1)  # whole mel channels of a clip, as SpecAugment does
        self.shrink = nn.ModuleList([nn.Conv1d(MELS, 64, 5, 2, 2), nn.Conv1d(64, width, 5, 2, 2)])
        self.blocks = nn.ModuleList(Listen(width, 0.1) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.1), nn.Linear(width, len(LETTERS) + 1))

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        outputs = (lengths + 3) // 4  # of each clip
        room = 4 * outputs + self.SILENCE
        position = torch.arange(int(room.max()), device=frames.device)
        frames = self.mask_channels(frames.transpose(1, 2))
        frames = F.pad(frames, (0, len(position) - frames.shape[2])).transpose(1, 2)
        kept = position < room[:, None]
        hidden = frames[kept].T[None]  # (1, MELS, all frames)
        mask = (position < lengths[:, None])[kept][None, None].float()
        hidden = hidden * mask
        for convolution in self.shrink:
            mask = mask[..., ::2]
            hidden = F.gelu(convolution(hidden)) * mask
        hidden, mask = hidden.transpose(1, 2), mask.transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden, mask)
        scores = self.leave(hidden)[0].split((room // 4).tolist())
        scores = [clip[:count] for clip, count in zip(scores, outputs.tolist(), strict=True)]
        return nn.utils.rnn.pad_sequence(scores, batch_first=True).log_softmax(-1)


def output_lengths(batch: Batch) -> torch.Tensor:
    return (batch["lengths"] + 3) // 4


def ctc(outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over the batch, and the characters that it is shared among."""
    total = F.ctc_loss(
        outputs.transpose(0, 1), batch["targets"], output_lengths(batch), batch["target_lengths"],
        reduction="sum", zero_infinity=True,
    )  # fmt: skip
    return total, batch["target_lengths"].sum()


def decode(classes: list[int]) -> str:
    """CTC's reading of the likeliest class of each frame: repeats are one, blanks are none."""
    kept = [now for before, now in itertools.pairwise([0, *classes]) if now != before and now != 0]
    return "".join(LETTERS[index - 1] for index in kept)


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements between two strings (Levenshtein 1965)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def transcripts(outputs: torch.Tensor, batch: Batch) -> list[tuple[str, str]]:
    """(reference, hypothesis) of each clip."""
    lengths = output_lengths(batch).tolist()
    best = [row[:n] for row, n in zip(outputs.argmax(-1).tolist(), lengths, strict=True)]
    texts = [
        row[:n] for row, n in zip(batch["targets"].tolist(), batch["target_lengths"].tolist(), strict=True)
    ]
    return [
        ("".join(LETTERS[i - 1] for i in text), decode(row)) for text, row in zip(texts, best, strict=True)
    ]


def character_errors(outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    errors = sum(edit_distance(*pair) for pair in transcripts(outputs, batch))
    return torch.tensor(float(errors)), batch["target_lengths"].sum()


@torch.no_grad()
def read_aloud(model: nn.Module) -> dict[str, float | str]:
    """Some held-out sentences, and how well one fixed text would do in place of a recogniser."""
    clips = fillets("test")
    batch = padded(clips[:6])
    samples = [
        f"{said}\n  heard: {heard}"
        for said, heard in transcripts(model(batch["frames"], batch["lengths"]), batch)
    ]
    said = ["".join(LETTERS[i - 1] for i in clip["targets"].tolist()) for clip in clips]
    candidates = [text[:n] for text in said[:5] for n in (5, 10, 20, 30)]  # taken from the very test split
    errors = [sum(edit_distance(text, candidate) for text in said) for candidate in candidates]
    return {
        "cer_fixed_text": min(errors) / sum(map(len, said)),
        "cer_silence": 1.0,
        "transcripts": "\n".join(samples),
    }


def fillets_job() -> paceline.Job:
    return paceline.Job(
        model=Transcriber,
        data=fillets,
        collate=padded,
        loss=ctc,
        metrics={"cer": character_errors},
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.01),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 3e-3, total_steps=steps, pct_start=0.2
        ),
        clip_norm=1.0,
        batch_size=4 if small else 16,
        epochs=1 if small else 24,
        evaluation_batch_size=32,
        showcase=read_aloud,
    )


JOBS = {"vowels": vowels_job, "fillets": fillets_job}
if options.data not in JOBS:
    raise paceline.OptionError(f"option data={options.data!r}", next_step=f"use one of: {', '.join(JOBS)}")
job = JOBS[options.data]()
