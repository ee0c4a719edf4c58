"""torch's compiler is loaded when something compiles, not because an optimizer says that it is not to be compiled."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAME = "torch._dynamo"
_CONFIG = f"{_NAME}.config"
_CHECKPOINT = "torch.utils.checkpoint"
_DISABLED = "__dynamo_disable"
"""Under which torch keeps, on a function, the form of it that is never compiled."""


class _NotLoaded(types.ModuleType):
    """Stands for `torch._dynamo`: while nothing is compiled, nothing has to be kept from being compiled.

    Whoever asks for anything else gets the real module, which then takes this one's place.
    """

    def __init__(self) -> None:
        super().__init__(_NAME, self.__doc__)
        self.__spec__ = importlib.util.find_spec(_NAME)
        self._left_as_they_are: list[Callable[..., Any]] = []
        self.trace_rules = _NoRules(self._load)
        self.config = _config_alone(self.__spec__)

    def graph_break(self, msg: str = "") -> None:
        """What every optimizer asks for around its step."""

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """What torch asks for when one of its own functions runs first, such as `Optimizer.add_param_group`."""
        if getattr(fn, "__module__", None) == _CHECKPOINT and not options:
            return fn  # a hook that is made anew each time
        if fn is None or options != {"wrapping": False}:
            return self._load().disable(fn, recursive, **options)
        self._left_as_they_are.append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            # Whoever looks through all modules, as `inspect` does, wants nothing from this one.
            raise AttributeError(name)
        return getattr(self._load(), name)

    def _load(self) -> types.ModuleType:
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            for function in self._left_as_they_are:
                vars(function).pop(_DISABLED, None)
        module = importlib.import_module(_NAME)
        module.config = self.config  # type: ignore[attr-defined]
        return module


def _config_alone(package: Any) -> types.ModuleType:
    """`torch._dynamo.config` without the package that it is in: tensors without memory (`FakeTensorMode`) read it."""
    file = Path(package.submodule_search_locations[0]) / "config.py"
    spec = importlib.util.spec_from_file_location(_CONFIG, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_CONFIG] = module
    spec.loader.exec_module(module)
    return module


class _NoRules:
    """Of `torch._dynamo.trace_rules` what `init_process_group` asks for."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def clear_lru_cache(self) -> None:
        """Nothing was kept."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load().trace_rules, name)


def put_off_compiler() -> None:
    """From now on this process loads torch's compiler only when something uses it.

    torch (2.13) loads it in the first `Optimizer.__init__`: 1.2 s of a core in each worker and in the launcher,
    two fifths of their start, and some 30 MiB of each. It is for processes of our own: it changes what
    `import torch._dynamo` gives until that is used.
    """
    if _NAME not in sys.modules:
        sys.modules[_NAME] = _NotLoaded()
