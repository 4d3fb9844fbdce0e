"""The entry point of a submitted job: the run, again where its driver was lost or it failed.

    python -m jobs.submit.retry TRIES run SPEC --address auto

Each try is a process of its own and a new attempt of the run, so whatever lives on of an older one
can publish nothing. What the user got wrong (2), a stop (130), and a newer attempt from elsewhere
(4) are not tried again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from jobs.run.heartbeat import TRIES_LEFT

FINAL = (0, 2, 4)
INTERRUPTED = 130
REST_SECONDS = 5.0
# `stillhouse stop` tells Ray to stop the job once the run has: until then it must not have ended,
# or Ray would call it failed.
STOPPED_SECONDS = 30.0


def main(arguments: list[str]) -> int:
    """Runs `stillhouse ARGUMENTS` at most TRIES times; returns the last exit code."""
    tries, command = int(arguments[0]), [sys.executable, "-m", "jobs", *arguments[1:]]
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping  # Ray sends the signal to the run too
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for number in range(1, tries + 1):
        # What is left is told to who asks how the run is: a failure of the last try is the end.
        code = subprocess.call(command, env={**os.environ, TRIES_LEFT: str(tries - number)})
        if code == INTERRUPTED and not stopping:
            ends = time.monotonic() + STOPPED_SECONDS
            while time.monotonic() < ends and not stopping:
                time.sleep(0.2)
        if code in (*FINAL, INTERRUPTED) or stopping or number == tries:
            return code if code >= 0 else 128 - code
        print(f"the run ended with {code}; try {number + 1} of {tries}", flush=True)
        time.sleep(REST_SECONDS)
        if stopping:
            return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
