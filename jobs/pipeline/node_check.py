"""What one node of a cluster says of itself; runs there, so it imports nothing heavy.

Ray brings it to a worker that has done nothing yet: importing torch on the way would cost seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.storage import Store, open_store
from cluster.storage.store import format_bytes

# Where these differ between driver and worker, results do, or nothing works.
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "hqq", "numpy", "safetensors", "pydantic")
MARGIN = 1.1  # of the bytes that a node has to have free


@dataclass(frozen=True)
class Model:
    """A model that nodes read. key: of the spec."""

    key: str
    name: str
    revision: str
    weights: bool = True


def look(
    told: tuple[Store, str, str, dict[str, str], int],
) -> tuple[list[str], str]:
    """On a node: (faults, name of the object that was written to show that it can be).

    Raises RuntimeError where the storage is another one, and what writing raises.
    """
    store, folder, nonce, wanted, scratch_bytes = told
    try:
        seen = store.read_text(f"{folder}/driver")
    except FileNotFoundError:
        raise RuntimeError("it does not see what the driver wrote there") from None
    if seen != nonce:
        raise RuntimeError("it sees another file than the driver wrote")
    name = uuid.uuid4().hex
    store.write_text(f"{folder}/{name}", nonce)
    own = versions()
    faults = [
        f"has {package} {own.get(package, 'not installed')}, the driver has {wanted[package]}; "
        "install requirements.lock there, or submit with --environment lock"
        for package in wanted
        if own.get(package) != wanted[package]
    ]
    return faults + disk_space(scratch_bytes), name


def versions() -> dict[str, str]:
    """Versions of what matters, of this process."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]  # 2.13.0+cpu is 2.13.0
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def disk_space(scratch_bytes: int) -> list[str]:
    """What this machine's disks lack for what is written to them."""
    faults = []
    scratch = Path(tempfile.gettempdir())
    free = shutil.disk_usage(scratch).free
    if free < MARGIN * scratch_bytes:
        faults.append(
            f"{scratch} has {format_bytes(free)} free, a checkpoint needs "
            f"{format_bytes(MARGIN * scratch_bytes)} there; free space, or set TMPDIR"
        )
    return faults


def fetch(models: Sequence[Model]) -> list[str]:
    """On a node: makes every model readable there, remote ones by fetching them; the faults.

    Processes of one machine fetch a model once: the others wait for the first.
    """
    from trainer.models.load import find_model

    faults = []
    for model in models:
        try:
            faults += [] if is_there(model) else _no_space(model)
            if not faults:
                find_model(model.key, model.name, model.revision, weights=model.weights)
        except ValueError as error:
            token = "set" if os.environ.get("HF_TOKEN") else "not set"
            hub = "" if "hub model" not in str(error) else f" (HF_TOKEN is {token} on that node)"
            faults.append(f"{error}{hub}")
    return faults


def is_there(model: Model) -> bool:
    """Whether a model is a local folder, which takes no more room."""
    return "://" not in model.name and Path(model.name).expanduser().is_dir()


def _no_space(model: Model) -> list[str]:
    """A line if this machine's cache has no room for a model at a URL."""
    if "://" not in model.name:
        return []  # the hub's client looks for itself
    from cluster.storage.store import cache_folder

    store = open_store(model.name)
    size = sum(store.sizes().values())
    home = cache_folder()
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free >= MARGIN * size or store.has_copy():
        return []
    return [
        f"{model.key}: {model.name} has {format_bytes(size)}, {home} has {format_bytes(free)} "
        "free; free space, or set STILLHOUSE_CACHE to a larger disk"
    ]
