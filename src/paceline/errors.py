"""Every error that a user can meet.

```
PacelineError
├── JobError                the job itself
│   ├── JobFileError        the file does not import, or lacks `job`
│   ├── OptionError         an unknown or ill-typed `--set key=value`, or an unknown setting
│   ├── DataError           an empty data set, a bad sample, data that cannot be found
│   └── LossError           the loss is not a scalar, not finite, or cannot be differentiated
├── ClusterError            a described cluster, or what was measured before, that cannot be used
├── LayoutError             a layout that cannot be parsed, or that the job or cluster cannot take
│   └── SplitError          the model cannot be split in this way
├── RunError                the run's directory, its target, its length
├── LaunchError             workers could not be started (a port in use, too few processors)
├── ProofError              a layout does not train what one process trains
├── CollectiveError         a collective timed out or lost a peer; carries rank and operation
└── WorkerError             a worker raised or died; carries the rank
```

Each message says what failed (with the value), the likely cause, and the next step.
"""

from __future__ import annotations

LOOK_FOR_THE_FIRST = (
    "look for the first worker that failed (its log is in the run's directory); "
    "a worker may have run out of memory, or be much slower than the others (--timeout)"
)


class PacelineError(Exception):
    """Base of all errors raised on purpose.

    `what` failed, its likely `cause`, and the `next_step`: three plain sentences.
    """

    def __init__(self, what: str, *, cause: str = "", next_step: str = "") -> None:
        self.what = what
        self.cause = cause
        self.next_step = next_step
        parts = [what]
        if cause:
            parts.append(f"Likely cause: {cause}")
        if next_step:
            parts.append(f"Next step: {next_step}")
        super().__init__("\n".join(parts))


class JobError(PacelineError):
    """The job itself is wrong."""


class JobFileError(JobError):
    """A job file that does not import, or that lacks the name `job`."""


class OptionError(JobError):
    """An unknown or ill-typed option of the job."""


class DataError(JobError):
    """A data set that is empty, cannot be read, or cannot be found."""


class LossError(JobError):
    """A loss that is not a scalar, not finite, or has no gradient."""


class LayoutError(PacelineError):
    """A layout that cannot be parsed, or that the job or the cluster cannot take."""


class SplitError(LayoutError):
    """The model cannot be split in this way."""


class ClusterError(PacelineError):
    """A cluster that is described in a file, or a kept measurement, that cannot be used for a plan."""


class RunError(PacelineError):
    """The run's directory, its length or its target is unusable."""


class LaunchError(PacelineError):
    """Workers could not be started."""


class ProofError(PacelineError):
    """A layout does not compute what one process computes."""


class CollectiveError(PacelineError):
    """A collective operation timed out or lost a peer.

    `rank` is the worker that noticed; `operation` is what it waited for; `timed_out` tells a peer that
    is silent from one that is gone.
    """

    def __init__(
        self, rank: int, operation: str, *, timed_out: bool, cause: str, next_step: str = LOOK_FOR_THE_FIRST
    ) -> None:
        self.rank = rank
        self.operation = operation
        self.timed_out = timed_out
        super().__init__(f"rank {rank}: {operation} failed", cause=cause, next_step=next_step)


class WorkerError(PacelineError):
    """A worker raised an error or died; `rank` names it (-1 where it is not known)."""

    def __init__(self, rank: int, what: str, *, cause: str = "", next_step: str = "") -> None:
        self.rank = rank
        super().__init__(what, cause=cause, next_step=next_step)
