"""System tests: the helpers beside the tests are importable however pytest is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fixtures.ranks import warm_up  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Ranks are forked from a process whose imports go on while tests are collected.

    The process that only hands tests to others (pytest-xdist) forks none.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        warm_up()
