"""All tests: what was imported is not searched for garbage again and again."""

from __future__ import annotations

import gc

import pytest

# Collecting tests imports a hundred thousand objects for life. Looking through them took a third of
# the collection, and a sixth of the tests of quantizers after it.
gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """From here on only what tests make is looked at."""
    gc.freeze()
    gc.enable()
