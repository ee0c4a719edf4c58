"""Made-up runs: the events that real ones would write."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Event = dict[str, Any]
START_S = 1_760_000_000.0
UNIT = {"label": "1 worker × 1 thread", "workers": 1, "threads": 1}
PAIR = {"label": "2 workers × 1 thread", "workers": 2, "threads": 1}
WIDE = {"label": "1 worker × 2 threads", "workers": 1, "threads": 2}


def layout(workers: int = 1, threads: int = 1) -> dict[str, int]:
    return {
        "pp": 1, "dp_replicate": workers, "dp_shard": 1, "cp": 1, "ep": 1, "tp": 1,
        "micro": 1, "threads": threads,
    }  # fmt: skip


def run_event(**changes: Any) -> Event:
    return {
        "event": "run", "time_s": START_S, "schema": 1, "name": "shakespeare", "job_file": "examples/text.py",
        "seed": 7, "batch_size": 64, "options": {"width": 256, "depth": 6, "context": 128, "lr": 3e-4},
        "total_steps": 800, "epochs": 4, "until": None, "train_samples": 12_800, "test_samples": 1_024,
        "tokens_per_sample": 128, "parameters": 4_821_504, "precision": "fp32",
        "precision_reason": "bf16 is slower than fp32 on this processor",
        "cluster": {"hosts": [{
            "name": "birch", "device": "cpu", "device_name": "AMD EPYC 7B13", "cores": 2,
            "memory_bytes": 24 * 2**30, "workers": 2,
        }]},
        "versions": {"paceline": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"},
        "command": ["paceline", "train", "examples/text.py", "--set", "width=256"],
        **changes,
    }  # fmt: skip


def trial_event(
    names: Event, step_s: list[float], parts: tuple[float, float, float, float] | None, **changes: Any
) -> Event:
    compute_s, communication_s, data_s, optimizer_s = parts or (None,) * 4
    return {
        "event": "trial", "time_s": START_S + 5, "layout": layout(names["workers"], names["threads"]),
        **names,
        "step_s": step_s, "compute_s": compute_s, "communication_s": communication_s, "data_s": data_s,
        "optimizer_s": optimizer_s, "error": None, **changes,
    }  # fmt: skip


def trials() -> list[Event]:
    return [
        trial_event(UNIT, [0.400, 0.412, 0.396, 0.400, 0.421], (0.380, 0.0, 0.004, 0.012)),
        trial_event(PAIR, [0.235, 0.234, 0.231, 0.238, 0.233], (0.200, 0.021, 0.002, 0.010)),
        trial_event(WIDE, [0.281, 0.290, 0.279, 0.302, 0.284], (0.262, 0.0, 0.004, 0.012)),
    ]


def forecasts_event(**changes: Any) -> Event:
    def forecast(names: Event, compute_s: float, others_s: float) -> Event:
        return {
            "layout": layout(names["workers"], names["threads"]), "samples": 64, "error_s": 0.02,
            "terms": {"compute_s": compute_s, "gradients_s": others_s}, "memory": {"base": 300 << 20, "state": 8 << 20},
        }  # fmt: skip

    return {
        "event": "forecasts", "time_s": START_S + 4, "source": "measured", "measuring_s": 11.5, "possible": 1098,
        "forecasts": [forecast(PAIR, 0.225, 0.025), forecast(WIDE, 0.290, 0.0)], **changes,
    }  # fmt: skip


def plan_event(names: Event = PAIR, **changes: Any) -> Event:
    return {
        "event": "plan", "time_s": START_S + 9, "layout": layout(names["workers"], names["threads"]),
        "label": names["label"],
        "reason": f"{names['label']} is the fastest of the three layouts that were timed on this job.",
        "chosen_by": "trial", "forecast_step_s": 0.234, "planned_step_s": 0.25,
        "planned_error_s": 0.02, **changes,
    }  # fmt: skip


def training(total: int, *, every: int = 100, nan_from: int | None = None, seed: int = 1) -> list[Event]:
    """Steps whose loss falls from 4.2, and evaluations before, every so many steps, and at the end."""
    rng, elapsed_s, now_s = random.Random(seed), 0.0, START_S + 10
    events = [_evaluation(0, 0.0, now_s)]
    for step in range(1, total + 1):
        step_s = 0.237 * rng.lognormvariate(0, 0.03)
        elapsed_s += step_s
        now_s += step_s
        loss: float | str = 1.45 + 2.75 * math.exp(-step / 130) + rng.gauss(0, 0.07)
        broken = nan_from is not None and step >= nan_from
        events.append({
            "event": "step", "time_s": now_s, "step": step, "epoch": (step - 1) // 200,
            "loss": "NaN" if broken else loss, "lr": [3e-4], "grad_norm": "Infinity" if broken else 0.8,
            "samples": 64, "step_s": step_s, "compute_s": 0.845 * step_s, "communication_s": 0.09 * step_s,
            "data_s": 0.01 * step_s, "optimizer_s": 0.04 * step_s, "elapsed_s": elapsed_s,
        })  # fmt: skip
        if step % every == 0 or step == total:
            now_s += 2
            events.append(_evaluation(step, elapsed_s, now_s))
    return events


def _evaluation(step: int, elapsed_s: float, now_s: float) -> Event:
    loss = 1.52 + 2.68 * math.exp(-step / 125)
    return {
        "event": "evaluation", "time_s": now_s, "step": step, "elapsed_s": elapsed_s, "evaluation_s": 2.0,
        "samples": 1024, "metrics": {
            "loss": loss, "accuracy": 0.57 - 0.555 * math.exp(-step / 170),
            "bits_per_byte": loss / math.log(2),
        },
    }  # fmt: skip


def ending(events: list[Event], status: str = "finished", **changes: Any) -> list[Event]:
    """`ranks` and `end` after the steps in `events`."""
    steps = [event for event in events if event["event"] == "step"]
    train_s = steps[-1]["elapsed_s"]
    ranks = []
    for rank in range(2):
        compute_s = train_s * (0.845 if rank == 0 else 0.875)
        communication_s = train_s * (0.09 if rank == 0 else 0.06)
        ranks.append({
            "rank": rank, "host": "birch", "pid": 4200 + rank, "cores": [rank], "threads": 1, "device": "cpu",
            "steps": len(steps), "train_s": train_s,
            "compute_s": compute_s, "communication_s": communication_s,
            "data_s": 0.01 * train_s, "optimizer_s": 0.04 * train_s, "peak_memory_bytes": 812 * 2**20,
        })  # fmt: skip
    metrics = dict(next(event["metrics"] for event in reversed(events) if event["event"] == "evaluation"))
    for event in events:
        if event["event"] == "showcase":
            metrics |= event["numbers"]
    end = {
        "event": "end", "time_s": events[-1]["time_s"] + 1, "status": status, "steps": len(steps),
        "train_s": train_s, "evaluation_s": 18.0, "total_s": train_s + 33, "samples": 64 * len(steps),
        "samples_per_s": 64 * len(steps) / train_s, "metrics": metrics, "weights": "weights.safetensors",
        "forecast_step_s": 0.234, "measured_step_s": sorted(s["step_s"] for s in steps)[len(steps) // 2],
        "error": None, **changes,
    }  # fmt: skip
    return [{"event": "ranks", "time_s": events[-1]["time_s"], "ranks": ranks}, end]


def finished() -> list[Event]:
    """Three layouts timed, two workers trained."""
    events = [run_event(), forecasts_event(), *trials(), plan_event()]
    events.append({
        "event": "message", "time_s": START_S + 9.5, "level": "info",
        "text": "2 workers compute the same loss and gradients as one: largest difference 3e-7.",
    })  # fmt: skip
    events += training(800)
    events.append({
        "event": "message", "time_s": START_S + 50, "level": "warning",
        "text": "Other programs keep 12 % of the cores busy: times may vary.",
    })  # fmt: skip
    texts = {
        "sample": (
            "KING.\n  What say you, cousin, to this heavy news\n  That comes so late upon the northern wind?"
            "\n\nDUKE.\n  My lord, I say the wind hath told it wrong."
        )
    }
    events.append({
        "event": "showcase", "time_s": events[-1]["time_s"], "texts": texts,
        "numbers": {"distinct_words": 0.731},
    })  # fmt: skip
    return events + ending(events)


def explicit() -> list[Event]:
    """The user gave the layout: nothing was timed beforehand."""
    events = [
        run_event(total_steps=40, epochs=None, tokens_per_sample=None),
        plan_event(
            chosen_by="user", reason="The layout was given on the command line.", forecast_step_s=None
        ),
        *training(40, every=40),
    ]
    return events + ending(events, forecast_step_s=None)


def failed() -> list[Event]:
    """Died half-way: no ranks, an error at the end."""
    events = [run_event(total_steps=200), *trials(), plan_event(), *training(90)]
    error = "rank 1 died with signal 9\nLikely cause: out of memory\nNext step: use a smaller batch_size"
    events.append(ending(events, "failed", error=error, weights=None, steps=90)[1])
    return events


def not_finite() -> list[Event]:
    """The loss is NaN from step 61 on."""
    events = [run_event(total_steps=120), *trials(), plan_event(), *training(120, every=30, nan_from=61)]
    return events + ending(events, metrics={"loss": "NaN", "accuracy": 0.02})


EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" ]]> --> $\\frac{1$'


def hostile() -> list[Event]:
    """Markup wherever a run may put text of its own."""
    events = [
        run_event(
            name=EVIL,
            job_file=EVIL,
            options={EVIL: EVIL},
            total_steps=4,
            precision_reason=EVIL,
            command=[EVIL],
        ),
        trial_event(UNIT, [0.4, 0.4], (0.372, 0.0, 0.004, 0.01)),
        trial_event({**PAIR, "label": EVIL}, [0.234, 0.234], (0.199, 0.021, 0.002, 0.01)),
        trial_event(WIDE, [], None, error=EVIL),
        plan_event({**PAIR, "label": EVIL}),
        *training(4, every=2),
        {"event": "message", "time_s": START_S, "level": "warning", "text": EVIL},
        {"event": "showcase", "time_s": START_S, "texts": {EVIL: EVIL}, "numbers": {EVIL: 1.0}},
    ]
    for event in events:
        if event["event"] == "evaluation":
            event["metrics"][EVIL] = 0.5
    return events + ending(events, "failed", error=EVIL)


def one_step() -> list[Event]:
    events = [run_event(total_steps=1, epochs=None), *trials(), plan_event(), *training(1)]
    return events + ending(events)


RUNS: dict[str, Callable[[], list[Event]]] = {
    "finished": finished, "explicit": explicit, "failed": failed, "not_finite": not_finite,
    "hostile": hostile, "one_step": one_step,
}  # fmt: skip


def write(path: Path, events: list[Event]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event, allow_nan=False) + "\n" for event in events), encoding="utf-8")
    return path


@pytest.fixture
def run_events() -> Callable[[str], list[Event]]:
    """The events of a made-up run, by its name."""
    return lambda name: RUNS[name]()


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[str | list[Event]], Path]:
    """Write a made-up run, given by name or as events, and return the path of its `events.jsonl`."""

    def write_run(run: str | list[Event]) -> Path:
        return write(tmp_path / "run" / "events.jsonl", RUNS[run]() if isinstance(run, str) else run)

    return write_run


@pytest.fixture(scope="session")
def all_runs() -> dict[str, Callable[[Path], Path]]:
    """Every made-up run by its name: what writes its events to a path."""
    return {name: functools.partial(_write_to, make) for name, make in RUNS.items()}


def _write_to(make: Callable[[], list[Event]], path: Path) -> Path:
    return write(path, make())
