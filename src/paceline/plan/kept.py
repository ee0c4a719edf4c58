"""What `paceline plan --out` has kept of a measurement, read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from paceline.errors import ClusterError
from paceline.plan.profile import LinkedCluster, Profile
from paceline.records import Record

PROFILE_FILE, CLUSTER_FILE = "profile.json", "cluster.json"

_Kept = TypeVar("_Kept", bound=Record)


def read_kept(path: Path) -> tuple[Profile, LinkedCluster | None]:
    """A kept profile; and the machine that was measured, where its file lies beside it.

    Args:
        path: the directory, or its profile.json.

    Raises:
        ClusterError: there is none, or it cannot be read.
    """
    file = path / PROFILE_FILE if path.is_dir() else path
    profile = read_record(file, Profile)
    beside = file.parent / CLUSTER_FILE
    return profile, read_record(beside, LinkedCluster) if beside.exists() else None


def check_fits(profile: Profile, path: Path, job: str, batch_size: int) -> None:
    """Raise `ClusterError` where a profile was measured of another job, or with another batch.

    Args:
        job: its name, as the profile would have it.
    """
    for what, kept, wanted in (("job", profile.job, job), ("batch_size", profile.batch_size, batch_size)):
        if kept != wanted:
            raise ClusterError(
                f"{path} was measured with {what} {kept}, and this is {wanted}",
                cause="it belongs to another job, or to other settings of this one",
                next_step="give the same job and settings, or measure again without --profile",
            )


def read_record(file: Path, kind: type[_Kept]) -> _Kept:
    """A record that was written as JSON.

    Raises:
        ClusterError: it cannot be read, or is none of this kind.
    """
    try:
        return kind.from_json(json.loads(file.read_text()))
    except OSError as error:
        raise ClusterError(
            f"{file} cannot be read: {error.strerror}",
            next_step="give the directory that `paceline plan JOB --out DIR` has made, or its profile.json",
        ) from error
    except (ValidationError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ClusterError(
            f"{file} is no {kind.__name__.lower()} of this version: {first}",
            cause="it was written by another version, or changed by hand",
            next_step="measure again: `paceline plan JOB --out DIR`",
        ) from error
