"""Whether a model fits one process is known before it is built."""

from __future__ import annotations

import dataclasses
import subprocess
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


COUNT = """
import sys
from torch import nn
import paceline
from paceline.train import room

def model():
    linear = nn.Linear(8, 8)
    nn.init.trunc_normal_(linear.weight)
    nn.init.kaiming_normal_(linear.weight)
    return nn.Sequential(nn.Embedding(8, 8), linear, nn.GRU(8, 8))

job = paceline.Job(model=model, data=list, loss=print, optimizer=print, batch_size=1)
room.available_memory_bytes = lambda device: 1
number = 8 * 8 + 9 * 8 + 2 * 3 * 9 * 8
assert f"{number << 20:.1f} GiB" in room.why_no_room(job, "cpu", 2**50), room.why_no_room(job, "cpu", 2**50)
assert "sympy" not in sys.modules, "a computer algebra system was imported"
"""


def test_random_numbers_are_not_drawn_where_only_parameters_are_counted():
    """Which would take a second, and tens of MiB, in each worker."""
    subprocess.run([sys.executable, "-c", COUNT], check=True, timeout=100)
