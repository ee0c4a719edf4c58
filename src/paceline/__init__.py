"""paceline trains one model on many processors, and knows where more of them stop paying.

The public face is small: `Job` describes what to train, `options` declares what a command line may
change, `Session` is for a training loop of one's own, and every error is a `PacelineError`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
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
    from paceline.load import options
    from paceline.records import Cluster, Host, Layout, Plan, Trial
    from paceline.train.session import Session

_HOME = {
    "Job": "paceline.job",
    "options": "paceline.load",
    "Session": "paceline.train.session",
    **{name: "paceline.records" for name in ("Cluster", "Host", "Layout", "Plan", "Trial")},
    **{
        name: "paceline.errors"
        for name in (
            "CollectiveError",
            "DataError",
            "JobError",
            "JobFileError",
            "LaunchError",
            "LayoutError",
            "LossError",
            "OptionError",
            "PacelineError",
            "RunError",
            "WorkerError",
        )
    },
}

__all__ = [
    "Cluster",
    "CollectiveError",
    "DataError",
    "Host",
    "Job",
    "JobError",
    "JobFileError",
    "LaunchError",
    "Layout",
    "LayoutError",
    "LossError",
    "OptionError",
    "PacelineError",
    "Plan",
    "RunError",
    "Session",
    "Trial",
    "WorkerError",
    "__version__",
    "options",
]


def __getattr__(name: str) -> Any:
    """Load the named part of the public face on first use, so that `import paceline` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
