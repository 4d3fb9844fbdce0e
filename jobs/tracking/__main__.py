"""Project a run directory into W&B: ``python -m jobs.tracking ./runs/my-run --mode offline``.

Prints one line that says what was done. Exit code 0 when W&B is up to date, 1 when it could not
be brought up to date (nothing in the run directory is ever changed).
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import threading
import time
from pathlib import Path

from cluster.storage import open_store
from jobs.tracking.launch import MODES, default_folder, resolve


def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's docstring."""
    args = _parser().parse_args(arguments)
    again = f"again with: python -m jobs.tracking {args.run}"
    try:
        mode = resolve(args.mode)
        if mode == "disabled":
            print("W&B disabled: nothing written")
            return 0
        try:
            import wandb  # noqa: F401  (that it is there at all)
        except ImportError as error:
            print(f"W&B: not tracked, wandb cannot be imported ({error}); pip install wandb")
            return 1
        from jobs.tracking import writers as projection

        def wait() -> bool:
            if _waited(args.poll, args.parent):
                return True
            _give_up_after(args.timeout, again)
            return False

        if not args.follow:
            _give_up_after(args.timeout, again)
        print(
            projection.publish(
                open_store(args.run),
                mode,
                projection.target(args.project, args.entity, args.tag),
                Path(args.out_dir or default_folder()).expanduser().absolute(),
                init_timeout=max(1.0, min(30.0, args.timeout / 3)),
                follow=wait if args.follow else None,
                attempt=args.attempt,
            )
        )
        return 0
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"W&B: not up to date ({type(error).__name__}: {text[:300]}); {again}")
        return 1


def _waited(seconds: float, parent: int) -> bool:
    """Wait before the next look; False once the process that started this one wants the end.

    `parent` is its id (0: nobody's child). It closes this process's stdin when the job is over.
    """
    if not parent:
        time.sleep(seconds)
        return True
    closed, _, _ = select.select([sys.stdin], [], [], seconds)
    return not closed and os.getppid() == parent


def _give_up_after(seconds: float, again: str) -> None:
    def stop() -> None:
        print(f"W&B: given up after {seconds:g} s; {again}", flush=True)
        os._exit(1)  # threads of wandb may hang for ever

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.tracking", description=__doc__)
    parser.add_argument("run", help="path or URL of the run directory")
    parser.add_argument("--mode", choices=MODES, default="auto")
    parser.add_argument("--project", default="stillhouse")
    parser.add_argument("--entity")
    parser.add_argument("--tag", action="append", default=[], help="may be given several times")
    parser.add_argument(
        "--out-dir", help="folder of the offline-run-* folders; default $WANDB_DIR/wandb or ./wandb"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds, then it gives up")
    parser.add_argument(
        "--follow", action="store_true", help="go on until the run ends or its driver is gone"
    )
    parser.add_argument("--attempt", type=int, default=0, help="attempt to follow; 0: the newest")
    parser.add_argument("--poll", type=float, default=5.0, help="seconds between looks at the run")
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # wandb's atexit hooks may wait for a service that is not there
