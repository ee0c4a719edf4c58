"""A worker of `paceline train --replan` that notices, times and decides in a few steps; nothing is forecast.

Rank 0 has worker 1 slow down after some steps; and, once it trains alone, itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import slowed

from paceline.launch import choosing, replanning
from paceline.launch.spec import RunSpec
from paceline.launch.worker import Worker
from paceline.train import watch
from paceline.train.loop import TrainingLoop

WINDOW = 5
FIRST_S = 1.0


def main() -> None:
    directory, steps = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ["RANK"])
    slower = directory / "slower"
    watch._WINDOW = WINDOW
    choosing._TRIAL_S = FIRST_S
    replanning.REST_STEPS, replanning.REST_TRIALS = 2 * WINDOW, 0.0
    nothing = SimpleNamespace(
        found=SimpleNamespace(fastest=[]),
        of=lambda _: SimpleNamespace(step_s=None, error_s=None),
        steps_s=lambda _: {},
        why_not=lambda _: "",
        by_turns=lambda layouts: [layouts],
    )
    choosing.Choosing._forecast = lambda self: nothing if self._world.rank == 0 else None  # type: ignore
    record = TrainingLoop._record

    def record_and_slow_down(self: Any, session: Any, result: Any) -> None:
        record(self, session, result)
        if rank == 0 and self.tally.steps == 3 * WINDOW:
            if session.layout.workers == 2 and not slower.exists():
                slowed.slow_down(slower, "1 6")
            elif session.layout.workers == 1:
                slowed.slow_down(slower, "3 1")

    TrainingLoop._record = record_and_slow_down  # type: ignore
    out = directory / f"rank{rank}"
    out.mkdir()
    Worker(
        RunSpec(
            job_file=str(Path(slowed.__file__)),
            settings={"slower": str(slower)},
            out=str(out),
            seed=3,
            steps=steps,
            precision="fp32",
            replan=True,
            timeout_s=60,
        )
    ).run()


if __name__ == "__main__":
    main()
