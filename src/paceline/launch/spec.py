"""What a run was asked to do: written by the launcher, read by its workers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from paceline.job import Job
from paceline.plan.kept import CLUSTER_FILE, PROFILE_FILE
from paceline.records import Record
from paceline.train.target import Length, plan_length

AUTO = "auto"
MEASURED_FILES = (PROFILE_FILE, CLUSTER_FILE)
"""What workers that measure for the planner leave in the run's directory: a `Profile` and a `LinkedCluster`."""

KEPT_FILE = "kept"
"""Is there where they have measured nothing, but found it kept."""


class RunSpec(Record):
    """One run, as the command line asked for it."""

    purpose: Literal["train", "verify", "plan", "measure"] = "train"
    job_file: str
    """Empty: there is none, and what is measured are the hosts."""
    settings: dict[str, str] = {}
    """Values of the job's own options, as text."""
    layout: str = AUTO
    """`auto`, or the text of a `Layout`."""
    out: str
    """The run's directory."""
    seed: int = 0
    steps: int | None = None
    epochs: int | None = None
    until: str | None = None
    precision: str = "auto"
    remeasure: bool = False
    """Measure the job for its plan, even if what was measured in the last week is kept."""
    budget_s: float | None = None
    """About how long measuring may take; None: as long as it takes to be good."""
    replan: bool = False
    """Reconsider the layout while training, when steps part from what was expected."""
    verify: bool = True
    """Prove a layout of several workers before training in it."""
    transport: str = AUTO
    """What carries tensors between workers on CPUs: `auto` or `gloo`."""
    timeout_s: float = 300.0
    """The limit of every wait for another worker."""
    store_port: int | None = None
    """Port of 127.0.0.1 for the workers' store; None under a launcher with a rendezvous of its own."""
    command: list[str] = []

    @property
    def directory(self) -> Path:
        return Path(self.out)

    def length(self, job: Job, batches_per_epoch: int | None) -> Length:
        """How long the run is; one that does not train, and whose job does not say, is an epoch long.

        Raises:
            RunError: as of `plan_length`.
        """
        epochs = self.epochs
        if self.purpose != "train" and not any((self.steps, epochs, job.steps, job.epochs)):
            epochs = 1
        return plan_length(job, steps=self.steps, epochs=epochs, batches_per_epoch=batches_per_epoch)

    def write(self) -> Path:
        """Write `run.json` into the run's directory."""
        path = self.directory / "run.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        os.replace(partial, path)
        return path
