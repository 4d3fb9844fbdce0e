"""Commands as a user types them, and what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import main

WIDTHS = "8, 6, 5, 4, 3, 2, 1"


def run(command: str) -> int:
    """The exit code of a command of words."""
    return main(command.split())


def told(capsys: pytest.CaptureFixture[str], command: str) -> list[str]:
    """The lines on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert run(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(line.startswith("error: ") for line in err.splitlines())
    return [line.removeprefix("error: ") for line in err.splitlines()]


def sizes(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
