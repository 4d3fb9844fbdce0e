"""Which Ray jobs a run was sent as: kept with the run, and here to find the run again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.storage import Store, open_store

FOLDER = "state/submissions"


@dataclass(frozen=True)
class Submission:
    """One sending. address: of the dashboard; spec: as it was sent, to compare another with.

    attempt: the newest of the run when it was sent; the job's own have higher numbers.
    """

    number: int
    attempt: int
    id: str
    address: str
    fingerprint: str
    sent_at: float
    spec: dict[str, Any]


def last_submission(run: Store) -> Submission | None:
    """The newest sending of a run."""
    names = run.list(FOLDER)
    return Submission(**run.read_json(f"{FOLDER}/{names[-1]}")) if names else None


def record(run: Store, submission: Submission) -> bool:
    """Keeps a sending with its run, and remembers where that run is; False if there is one of
    its number."""
    body = json.dumps(asdict(submission), indent=2).encode()
    made = run.create(f"{FOLDER}/{submission.number:04d}.json", body)
    remember(run)
    return made


def take_back(run: Store, submission: Submission) -> None:
    """Forgets a sending that failed."""
    run.delete(f"{FOLDER}/{submission.number:04d}.json")


def job_id(name: str, fingerprint: str, number: int) -> str:
    """The id under which a sending is known to Ray: the same job sent twice is one."""
    return f"{name}-{fingerprint[:8]}-{number}"


def registry() -> Path:
    """Where this machine remembers runs whose storage is elsewhere."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "stillhouse" / "runs"


def remember(run: Store) -> None:
    """Remembers a run, so that its name is enough from any folder of this machine."""
    folder = registry()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest = hashlib.blake2b(run.url.encode(), digest_size=8).hexdigest()
    path = folder / f"{digest}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"url": run.url, "name": run.name, "t": time.time()}))
    os.replace(temporary, path)


def remembered() -> list[Store]:
    """The runs that this machine remembers, the newest first."""
    found = []
    for path in registry().glob("*.json"):
        try:
            told = json.loads(path.read_text())
            found.append((float(told["t"]), str(told["url"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half a file of a process that was killed
    return [open_store(url) for _, url in sorted(found, reverse=True)]
