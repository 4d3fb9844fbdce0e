"""What must hold on every machine, looked at before workers take their GPUs.

On each node: the storage is the same and can be written, the packages are those of the driver, the
models can be read (remote ones are fetched now, once per node), and there is room on the disk.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.everywhere import Answer, Silent, on_every_node
from cluster.session import Cluster, refresh
from cluster.storage import Store, open_store
from cluster.workers import NotEnough, fit_group
from jobs.cells.needs import cell_resources
from jobs.errors import Interrupted, SpecErrors
from jobs.rundir import RunDir
from jobs.spec import JobSpec

FOLDER = "state/preflight"
# A node that has not said so long that it sees the storage is given up on.
LOOK_SECONDS = 120.0
SAY_SECONDS = 30.0
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


def resources(spec: JobSpec, todo: Sequence[str], cluster: Cluster) -> None:
    """Raises SpecErrors, with the numbers, for stages that the cluster could never run."""
    asked = spec.resources
    faults: list[str] = []
    answers = spec.responses is not None and spec.responses.origin == "teacher"
    if "capture" in todo or ("prepare" in todo and answers):
        faults += _fits("capture", asked.capture, cluster)
    if "distill" in todo:
        faults += _fits("distill", asked.distill, cluster)
    if "sweep" in todo:
        # Only what was asked for: what `auto` becomes, the model decides.
        try:
            cell_resources(asked.sweep, cluster, weights=0)
        except SpecErrors as error:
            faults += error.faults
    if faults:
        raise SpecErrors(faults)


def _fits(key: str, asked: object, cluster: Cluster) -> list[str]:
    try:
        fit_group(key, asked, cluster)  # type: ignore[arg-type]
    except NotEnough as error:
        return [str(error)]
    return []


def wait_for_resources(
    spec: JobSpec,
    todo: Sequence[str],
    cluster: Cluster,
    stopped: Callable[[], bool],
    tell: Callable[[str], None],
) -> Cluster:
    """The cluster, once it is large enough: it may take `resources.growth_minutes` to grow.

    Raises SpecErrors when it is not by then, Interrupted if `stopped()`.
    """
    ends = time.monotonic() + 60.0 * spec.resources.growth_minutes
    while True:
        try:
            resources(spec, todo, cluster)
            return cluster
        except SpecErrors as error:
            if time.monotonic() >= ends or cluster.embedded:
                raise
            tell(f"waiting for the cluster to grow: {error.faults[0]}")
        if stopped():
            raise Interrupted("stopped while the cluster was too small")
        time.sleep(2.0)
        cluster = refresh(cluster)


def nodes(
    spec: JobSpec,
    run: RunDir,
    cluster: Cluster,
    scratch_bytes: int,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Looks at every node. Raises SpecErrors with a line per fault, Interrupted if `stopped()`.

    scratch_bytes: what a node writes to its disk at once, e.g. of a checkpoint.
    """
    if cluster.embedded:
        faults = _room(scratch_bytes)
        if faults:
            raise SpecErrors([f"this machine: {fault}" for fault in faults])
        return
    attempt = run.current()
    folder = f"{FOLDER}/{attempt.number:04d}"
    nonce = uuid.uuid4().hex
    run.store.write_text(f"{folder}/driver", nonce)
    try:
        looked = on_every_node(
            look,
            (run.store, folder, nonce, versions(), scratch_bytes),
            limit_s=LOOK_SECONDS,
            should_stop=stopped,
        )
        faults = _storage_faults(spec, run.store, looked, folder)
        faults += [f"node {a.node}: {fault}" for a in looked for fault in (a.value or ([], ""))[0]]
        if faults:
            raise SpecErrors(faults)
        models = _models(spec)
        if models:
            word = _Word(say)
            fetched = on_every_node(fetch, models, should_stop=stopped, on_wait=word.waiting)
            faults = [f"node {a.node}: {a.error}" for a in fetched if a.error]
            faults += [f"node {a.node}: {fault}" for a in fetched for fault in a.value or []]
            if faults:
                raise SpecErrors(faults)
    except Silent:
        raise Interrupted("stopped before work started") from None
    finally:
        run.store.delete(folder, recursive=True)


def _storage_faults(spec: JobSpec, store: Store, looked: list[Answer], folder: str) -> list[str]:
    """Nodes that do not see what the driver wrote, cannot write, or whose writes are not seen."""
    faults = []
    there = set(store.list(folder))
    for answer in looked:
        why = answer.error
        if why is None and answer.value[1] not in there:
            why = "what it writes there is not seen here"
        if why is None:
            continue
        if store.local() is not None:
            faults.append(
                f"storage: {spec.storage} is a folder of this machine that the node {answer.node} "
                f"does not share ({why}); may be a shared folder or a URL such as "
                "s3://bucket/prefix"
            )
        else:
            faults.append(
                f"storage: {spec.storage} cannot be used on the node {answer.node} ({why}); give "
                "that machine the credentials and the driver (s3fs, gcsfs) of the storage"
            )
    return faults


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
    return faults + _room(scratch_bytes), name


def versions() -> dict[str, str]:
    """Versions of what matters, of this process."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]  # 2.13.0+cpu is 2.13.0
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _room(scratch_bytes: int) -> list[str]:
    """What this machine's disks lack for what is written to them."""
    faults = []
    scratch = Path(tempfile.gettempdir())
    free = shutil.disk_usage(scratch).free
    if free < MARGIN * scratch_bytes:
        faults.append(
            f"{scratch} has {free / 1e9:.1f} GB free, a checkpoint needs "
            f"{MARGIN * scratch_bytes / 1e9:.1f} GB there; free space, or set TMPDIR"
        )
    return faults


def _models(spec: JobSpec) -> list[Model]:
    """The models that workers read."""
    found = []
    if spec.teacher is not None:
        found.append(Model("teacher.model", spec.teacher.model, spec.teacher.revision))
    student = spec.student
    if student.model is not None:
        weights = student.init == "pretrained"
        found.append(Model("student.model", student.model, student.revision, weights))
    for extra in spec.sweep.extra if spec.sweep is not None else ():
        found.append(Model("sweep.extra", extra.path, "main"))
    return found


def fetch(models: Sequence[Model]) -> list[str]:
    """On a node: makes every model readable there, remote ones by fetching them; the faults.

    Processes of one machine fetch a model once: the others wait for the first.
    """
    from trainer.models import find_model

    faults = []
    for model in models:
        try:
            faults += [] if is_there(model) else _no_room(model)
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


def _no_room(model: Model) -> list[str]:
    """A line if this machine's cache has no room for a model at a URL."""
    if "://" not in model.name:
        return []  # the hub's client looks for itself
    from cluster.storage.fetched import cache_folder

    store = open_store(model.name)
    size = sum(store.sizes().values())
    home = cache_folder()
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free >= MARGIN * size or store.has_copy():
        return []
    return [
        f"{model.key}: {model.name} has {size / 1e9:.1f} GB, {home} has {free / 1e9:.1f} GB free; "
        "free space, or set STILLHOUSE_CACHE to a larger disk"
    ]


class _Word:
    """Tells now and then which nodes still fetch."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._next = say, time.monotonic() + SAY_SECONDS

    def waiting(self, waiting: list[str], count: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SAY_SECONDS
            done = count - len(waiting)
            self._say(f"models: {done} of {count} nodes have them, {waiting[0]} fetches")
