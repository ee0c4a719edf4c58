"""paceline trains one model on many processors, and knows where more of them stop paying.

The public face is small: `Job` describes what to train, `options` declares what a command line may
change, `Session` is for a training loop of one's own, `register_shm` lets any program of torch.distributed talk through
shared memory, and every error is a `PacelineError`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from paceline import _version

if TYPE_CHECKING:
    from paceline.comm.process_group import register_shm
    from paceline.errors import (
        CollectiveError,
        DataError,
        JobError,
        JobFileError,
        LaunchError,
        LayoutError,
        LossError,
        OptionError,
        PacelineError,
        RunError,
        WorkerError,
    )
    from paceline.job import Job
    from paceline.load import load_job, options
    from paceline.records import Layout
    from paceline.train.session import Session

__version__ = _version.VERSION

__all__ = [
    "CollectiveError",
    "DataError",
    "Job",
    "JobError",
    "JobFileError",
    "LaunchError",
    "Layout",
    "LayoutError",
    "LossError",
    "OptionError",
    "PacelineError",
    "RunError",
    "Session",
    "WorkerError",
    "__version__",
    "load_job",
    "options",
    "register_shm",
]

_HOMES = {
    "Job": "paceline.job",
    "Layout": "paceline.records",
    "Session": "paceline.train.session",
    "load_job": "paceline.load",
    "options": "paceline.load",
    "register_shm": "paceline.comm.process_group",
}


def __getattr__(name: str) -> Any:
    """Load the named part of the public face on first use: `import paceline` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "paceline.errors")), name)
