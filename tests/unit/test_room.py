"""Whether a model fits one process is known before it is built."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from torch import nn

from paceline.train import room

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from jobs import plain


def test_what_a_model_needs_is_held_against_what_is_free(monkeypatch):
    job = dataclasses.replace(plain, model=lambda: nn.Linear(1024, 1024, bias=False))
    monkeypatch.setattr(room, "available_memory_bytes", lambda device: 16 << 20)
    assert room.why_no_room(job, "cpu", room.TRAINING_BYTES) == ""
    assert room.why_no_room(job, "cpu", 17) == "it takes about 0.0 GiB, and one process has 0.0 GiB"
    monkeypatch.setattr(room, "available_memory_bytes", lambda device: 0)
    assert room.why_no_room(job, "cpu", 17) == "", "nobody knows"


def test_memory_that_is_free_is_less_than_all_of_it():
    assert 0 < room.available_memory_bytes("cpu") < 1 << 50
