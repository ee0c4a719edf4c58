"""What all tests share: the folder of helpers on the path, loud skips, and which transport is the default."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "dist"))

from paceline.comm.world import AUTO, TRANSPORT_VARIABLE, TRANSPORTS
from paceline.measure import store

HAS_SHARED_MEMORY = (sys.platform, platform.machine()) == ("linux", "x86_64")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transport", choices=TRANSPORTS, default=AUTO, help="of every run that does not say its own"
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ[TRANSPORT_VARIABLE] = config.getoption("--transport")
    # No test reads, or leaves, anything in the user's cache.
    cache = tempfile.TemporaryDirectory(prefix="paceline-tests-cache-")
    config.add_cleanup(cache.cleanup)
    os.environ[store.VARIABLE] = cache.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    over_gloo = config.getoption("--transport") != AUTO
    for item in items:
        if item.get_closest_marker("shared_memory"):
            if not HAS_SHARED_MEMORY:
                item.add_marker(pytest.mark.skip(reason="shared memory is for Linux on x86-64"))
            elif over_gloo:
                item.add_marker(pytest.mark.skip(reason="about shared memory, and --transport is gloo"))


@pytest.fixture(scope="session")
def default_transport(request: pytest.FixtureRequest) -> str:
    """What carries tensors between the workers of this host where nothing is asked for."""
    is_auto = request.config.getoption("--transport") == AUTO
    return "shared memory" if is_auto and HAS_SHARED_MEMORY else "gloo"
