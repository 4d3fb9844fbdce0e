"""One projection of a run directory into W&B, once or for as long as the job runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.storage import Attempt, EventTail, Store
from jobs.report.source import RunData, load_run
from jobs.tracking.plan import plan, run_id
from jobs.tracking.writers import Index, OfflineWriter, OnlineWriter, Target, isolate


def target(project: str, entity: str | None, tags: list[str]) -> Target:
    """Where runs go; WANDB_PROJECT and WANDB_ENTITY win, WANDB_TAGS are added."""
    added = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    return Target(
        project=os.environ.get("WANDB_PROJECT") or project,
        entity=os.environ.get("WANDB_ENTITY") or entity,
        tags=tuple(dict.fromkeys([*tags, *added])),
    )


def publish(
    store: Store,
    mode: str,
    where: Target,
    out_dir: Path,
    *,
    init_timeout: float = 30.0,
    follow: Callable[[], bool] | None = None,
    attempt: int = 0,
) -> str:
    """Bring W&B up to date with a run directory; returns what was done, in one line.

    `mode` is online or offline. With `follow` it goes on until the run ends: live curves online,
    finished cells and stages offline. `follow()` waits a while and returns False once nothing
    more will come (the driver is gone). `attempt` is the one whose end is waited for; 0 is the
    newest. Raises what wandb or the storage raises.
    """
    isolate()
    began = time.monotonic()
    name = run_id(store.url, store.name, "index") + ("" if mode == "offline" else "-online")
    with Index.locked(out_dir, name) as index:
        writer: OfflineWriter | OnlineWriter
        if mode == "offline":
            writer = OfflineWriter(out_dir, where, index)
        else:
            writer = OnlineWriter(out_dir, where, index, init_timeout)
        try:
            abandoned = False
            if follow is not None:
                abandoned = not _follow(store, writer, follow, attempt or Attempt.latest(store))
            for tracked in plan(load_run(store), _page(store)):
                failed = tracked.failed or (abandoned and not tracked.complete)
                writer.sync(replace(tracked, complete=True, failed=failed))
        finally:
            writer.close()
    seconds = time.monotonic() - began
    return (
        f"W&B {mode}: {len(writer.written)} runs written, "
        f"{len(writer.unchanged - writer.written)} unchanged ({seconds:.1f} s), project "
        f"{where.project}" + (f", in {out_dir}" if mode == "offline" else "")
    )


def _page(store: Store) -> str | None:
    return store.read_text("report/index.html") if store.exists("report/index.html") else None


def _follow(
    store: Store, writer: OfflineWriter | OnlineWriter, wait: Callable[[], bool], attempt: int
) -> bool:
    """Sync again at every news; True when the attempt's run_end came, False when abandoned."""
    tail = EventTail(store)
    events: list[dict[str, Any]] = []
    data: RunData | None = None
    going = True
    while True:
        news = tail.poll()
        events += news
        if news:
            if data is None or any(event.get("event") != "step" for event in news):
                data = load_run(store, list(events))
            else:
                data = replace(data, events=list(events))
            for tracked in plan(data):
                if tracked.table is None:
                    writer.sync(tracked)
        if any(e.get("event") == "run_end" and e.get("attempt", 0) >= attempt for e in events):
            return True
        if not going:
            return False
        going = wait()  # one more poll follows: what the driver wrote last is still read
