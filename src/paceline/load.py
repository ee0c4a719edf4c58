"""Loading a job from a file, and the options that the file declares."""

from __future__ import annotations

import contextvars
import dataclasses
import difflib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paceline.errors import JobFileError, OptionError, PacelineError
from paceline.job import Job

OptionValue = bool | int | float | str

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


@dataclasses.dataclass
class _Request:
    """What a job file that is being loaded was asked for, and what it declared."""

    settings: Mapping[str, str]
    declared: dict[str, OptionValue] = dataclasses.field(default_factory=dict)


_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("paceline_request", default=None)


@dataclasses.dataclass(frozen=True)
class LoadedJob:
    """A job, the file that it came from, and the values of the options that the file declares."""

    job: Job
    path: Path
    options: dict[str, OptionValue]

    @property
    def name(self) -> str:
        return self.job.name or self.path.stem


def options(**defaults: OptionValue) -> SimpleNamespace:
    """Declare the job's own options with their defaults; return the values of this run as attributes.

    `paceline train FILE --set width=128` changes one; its text is read as the type of the default
    (bool, int, float or str).

    Raises:
        OptionError: a default of another type, or a setting that its type cannot read.
    """
    for key, default in defaults.items():
        if not isinstance(default, bool | int | float | str):
            raise OptionError(
                f"option {key!r} has a default of type {type(default).__name__}",
                next_step="give it a bool, an int, a float or a str",
            )
    request = _request.get()
    values = dict(defaults)
    if request is not None:
        for key, default in defaults.items():
            if key in request.settings:
                values[key] = _read(key, request.settings[key], default)
        request.declared.update(values)
    return SimpleNamespace(**values)


def load_job_file(path: Path | str, settings: Mapping[str, str] | None = None) -> LoadedJob:
    """Import the job file at `path` with `settings` for its options.

    Raises:
        JobFileError: no such file, an error while it ran, or no `Job` under the name `job`.
        OptionError: a setting that the file does not declare, or of the wrong type.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise JobFileError(
            f"there is no job file {path}",
            next_step="check the path; it is relative to the current directory",
        )
    request = _Request(dict(settings or {}))
    token = _request.set(request)
    try:
        module = _import(path)
    finally:
        _request.reset(token)
    job = getattr(module, "job", None)
    if not isinstance(job, Job):
        found = "has no name 'job'" if job is None else f"has a 'job' of type {type(job).__name__}"
        raise JobFileError(
            f"{path.name} {found}",
            cause="a job file describes its training in one name",
            next_step="write `job = paceline.Job(model=..., data=..., loss=..., optimizer=..., batch_size=...)`",
        )
    _refuse_undeclared(path, request)
    return LoadedJob(job=job, path=path, options=request.declared)


def load_job(path: Path | str, settings: Mapping[str, str] | None = None) -> Job:
    """The job in the file at `path`; see `load_job_file`."""
    return load_job_file(path, settings).job


def _import(path: Path) -> Any:
    name = f"paceline_job_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise JobFileError(f"{path.name} is no Python file", next_step="give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except PacelineError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(path, error)
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        raise JobFileError(
            f"{path.name} does not import: {type(error).__name__}: {error}{line}",
            cause=f"the package {missing!r} is not installed here"
            if missing
            else "an error in the file itself",
            next_step=f"run `python {path.name}` alone to see the whole traceback",
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> str:
    """`" (line 12)"`: where in the job file the error arose, if it did."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    return f" (line {lines[-1]})" if lines else ""


def _read(key: str, text: str, default: OptionValue) -> OptionValue:
    if isinstance(default, bool):
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
    else:
        try:
            return type(default)(text)
        except ValueError:
            pass
    raise OptionError(
        f"option {key}={text!r} cannot be read as {type(default).__name__}",
        next_step=f"give a value like its default, {key}={default}",
    )


def _refuse_undeclared(path: Path, request: _Request) -> None:
    unknown = [key for key in request.settings if key not in request.declared]
    if not unknown:
        return
    key = unknown[0]
    near = difflib.get_close_matches(key, request.declared, n=1)
    known = ", ".join(f"{k}={v}" for k, v in request.declared.items())
    raise OptionError(
        f"{path.name} has no option {key!r}",
        cause=f"perhaps {near[0]!r} was meant" if near else "",
        next_step=f"its options are: {known}" if known else "it declares none (see paceline.options)",
    )
