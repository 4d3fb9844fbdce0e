"""What must hold on every machine, looked at before workers take their GPUs.

On each node: the storage is the same and can be written, the packages are those of the driver, the
models can be read (remote ones are fetched now, once per node), and there is room on the disk.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress

from cluster.capacity import NotEnough, fit_group, fit_task
from cluster.nodes import Answer, Silent, install_seconds, run_on_every_node
from cluster.session import Cluster, ask_to_grow, refresh
from cluster.spec import CellResources, WorkerResources
from cluster.storage import Store
from jobs.errors import Interrupted, SpecErrors
from jobs.forecast.place import Core, this_core
from jobs.pipeline.node_check import Model, disk_space, fetch, look, versions
from jobs.run.directory import RunDir
from jobs.spec.job import JobSpec
from jobs.stages import STAGES

FOLDER = "state/preflight"
# A node that has not said so long that it sees the storage is given up on.
LOOK_SECONDS = 120.0
SAY_SECONDS = 30.0


class NodesSilent(RuntimeError):
    """Nodes that live could not be asked; another try may find them well."""


def resources(spec: JobSpec, to_run: Sequence[str], cluster: Cluster) -> None:
    """Raises SpecErrors, with the numbers, for stages that the cluster could never run."""
    faults: list[str] = []
    for stage in to_run:
        for key, asked in STAGES[stage].resources(spec).items():
            faults += [line for line in _fits(key, asked, cluster) if line not in faults]
    if faults:
        raise SpecErrors(faults)


def _fits(key: str, asked: WorkerResources | CellResources, cluster: Cluster) -> list[str]:
    try:
        if isinstance(asked, WorkerResources):
            fit_group(key, asked, cluster)
        else:  # only what was asked for: what `auto` becomes, the model decides
            fit_task(asked, cluster, wants_gpu=False)
    except NotEnough as error:
        return [str(error)]
    return []


def wait_for_resources(
    spec: JobSpec,
    to_run: Sequence[str],
    cluster: Cluster,
    stopped: Callable[[], bool],
    notify: Callable[[str], None],
) -> Cluster:
    """The cluster, once it is large enough: it may take `resources.growth_minutes` to grow.

    What an autoscaler was asked for then holds until `ask_to_grow([])`. Raises SpecErrors when it
    is not by then, Interrupted if `stopped()`.
    """
    ends = time.monotonic() + 60.0 * spec.resources.growth_minutes
    asked = False
    while True:
        try:
            resources(spec, to_run, cluster)
            return cluster
        except SpecErrors as error:
            if time.monotonic() >= ends or cluster.embedded:
                raise
            notify(f"waiting for the cluster to grow: {error.faults[0]}")
        if not asked:
            ask_to_grow(_largest_group(spec, to_run))
            asked = True
        if stopped():
            raise Interrupted("stopped while the cluster was too small")
        time.sleep(2.0)
        cluster = refresh(cluster)


def _largest_group(spec: JobSpec, to_run: Sequence[str]) -> list[dict[str, float]]:
    """The resources of every worker of the stage that wants the most."""
    groups = []
    for asked in (each for stage in to_run for each in STAGES[stage].resources(spec).values()):
        if not isinstance(asked, WorkerResources):
            continue
        count = asked.workers[0] if isinstance(asked.workers, tuple) else asked.workers
        if count != "auto":
            one = {"CPU": 1.0 if asked.cpus_per_worker == "auto" else float(asked.cpus_per_worker)}
            if asked.gpus_per_worker not in ("auto", 0):
                one["GPU"] = float(asked.gpus_per_worker)
            groups.append([one] * count)
    return max(groups, key=len, default=[])


def cores(
    cluster: Cluster,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    notify: Callable[[str], None],
) -> list[Core]:
    """A core of every node, measured there; of this machine where Ray is embedded.

    The first that nodes are asked: before it Ray installs packages on them, if it is to. Raises
    NodesSilent, and Interrupted if `stopped()`. tell: says what is waited for.
    """
    if cluster.embedded:
        return [this_core()]
    notify("looking at the nodes")
    install_s = install_seconds()
    word = _Word(say, notify, "packages", "installs")
    try:
        answers = run_on_every_node(
            this_core,
            limit_s=install_s or LOOK_SECONDS,
            should_stop=stopped,
            **({"on_wait": word.waiting} if install_s else {}),
        )
    except Silent:
        raise Interrupted("stopped before work started") from None
    refuse_silent(answers)
    return [answer.value for answer in answers if answer.value is not None]


def nodes(
    spec: JobSpec,
    run: RunDir,
    cluster: Cluster,
    scratch_bytes: int,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    notify: Callable[[str], None],
) -> None:
    """Looks at every node. Raises SpecErrors with a line per fault, Interrupted if `stopped()`.

    Also NodesSilent. scratch_bytes: what a node writes to its disk at once, e.g. of a checkpoint.
    tell: says what is waited for.
    """
    if cluster.embedded:
        faults = disk_space(scratch_bytes)
        if faults:
            raise SpecErrors([f"this machine: {fault}" for fault in faults])
        return
    attempt = run.current()
    folder = f"{FOLDER}/{attempt.number:04d}"
    nonce = uuid.uuid4().hex
    run.store.write_text(f"{folder}/driver", nonce)
    try:
        notify("looking at the nodes")
        looked = run_on_every_node(
            look,
            (run.store, folder, nonce, versions(), scratch_bytes),
            limit_s=LOOK_SECONDS,
            should_stop=stopped,
        )
        refuse_silent(looked)
        faults = _storage_faults(spec, run.store, looked, folder)
        faults += [f"node {a.node}: {fault}" for a in looked for fault in (a.value or ([], ""))[0]]
        if faults:
            raise SpecErrors(faults)
        models = _models(spec)
        if models:
            word = _Word(say, notify, "models", "fetches")
            fetched = run_on_every_node(fetch, models, should_stop=stopped, on_wait=word.waiting)
            refuse_silent(fetched)
            faults = [f"node {a.node}: {a.error}" for a in fetched if a.error]
            faults += [f"node {a.node}: {fault}" for a in fetched for fault in a.value or []]
            if faults:
                raise SpecErrors(faults)
    except Silent:
        raise Interrupted("stopped before work started") from None
    finally:
        with suppress(Exception):  # what is left over is a few bytes
            run.store.delete(folder, recursive=True)


def refuse_silent(answers: Sequence[Answer]) -> None:
    """Raises NodesSilent for nodes that live and do not answer; what is gone does not matter."""
    silent = [f"node {each.node} {each.lost}" for each in answers if each.lost and each.alive]
    if silent:
        raise NodesSilent("; ".join(silent))


def _storage_faults(spec: JobSpec, store: Store, looked: list[Answer], folder: str) -> list[str]:
    """Nodes that do not see what the driver wrote, cannot write, or whose writes are not seen."""
    faults = []
    there = set(store.list(folder))
    for answer in looked:
        why = answer.error
        if answer.lost:
            continue
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


class _Word:
    """Tells which nodes are still at it, and says so now and then."""

    def __init__(
        self, say: Callable[[str], None], notify: Callable[[str], None], what: str, does: str
    ) -> None:
        self._say, self._notify, self._what, self._does = say, notify, what, does
        self._next = time.monotonic() + SAY_SECONDS

    def waiting(self, waiting: list[str], count: int) -> None:
        done = count - len(waiting)
        word = f"{self._what}: {done} of {count} nodes have them, {waiting[0]} {self._does}"
        self._notify(word)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SAY_SECONDS
            self._say(word)
