"""`stillhouse submit` and `stillhouse manifest`: a job sent to a Ray cluster, or described for
KubeRay.

Only typer is imported here: the commands import what they need, so that help answers at once.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import OnlyOption, OverridesArgument, RedoOption, SpecArgument, UntilOption
from jobs.errors import SpecErrors

DONE = 0


class Environment(StrEnum):
    """What Python packages a job's processes have."""

    image = "image"
    lock = "lock"


def submit(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="http://HOST:8265",
            help="The dashboard of the cluster. Default: RAY_API_SERVER_ADDRESS.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show how it goes, until it ends.")
    ] = False,
    retries: Annotated[
        int,
        typer.Option(min=0, help="How often the run is started again after it failed or was lost."),
    ] = 2,
    environment: Annotated[
        Environment,
        typer.Option(
            help="image: the cluster has the packages; lock: Ray first installs them "
            "on each node, in the versions of requirements.lock."
        ),
    ] = Environment.image,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="A folder that this machine and all nodes mount at the same path: what lies below "
            "it may be named in the spec. Again for more.",
        ),
    ] = None,
    forward_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Send this variable along. Ray keeps its value in plain text: better give it to "
            "the nodes. Again for more.",
        ),
    ] = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    redo: RedoOption = None,
) -> int:
    """Send a run to a Ray cluster, as a Ray job.

    Sent again while it is live, it is joined; after a stop or a loss it continues.
    """
    url = _address(address)
    if until and only:
        raise SpecErrors(["--until and --only: may not be given together"])
    from jobs.spec.load import load_spec

    job_spec = load_spec(spec, overrides or [])
    from cluster.ray_jobs import RayJobs, Unreachable
    from jobs.pipeline.pipeline import prepare_job
    from jobs.submit.submit import How, forwarded
    from jobs.submit.submit import submit as send

    how = How(
        environment.value,
        retries,
        forwarded(forward_env or ()),
        tuple(shared or ()),
        *(stage.value if stage else None for stage in (until, only, redo)),
    )
    try:
        jobs = RayJobs(url)
    except Unreachable as error:
        raise SpecErrors([f"--address: {error}"]) from error
    job = prepare_job(job_spec, how.until, how.only, how.redo)
    name = job.spec.name
    if not job.selection.to_run:
        typer.echo(f"{name}: nothing is left to do; see stillhouse report {name}")
        return DONE
    for variable in how.forward:
        typer.echo(
            f"warning: {variable} is sent along; everyone who may look at the cluster's jobs can "
            "read its value",
            err=True,
        )
    try:
        sent = send(job, jobs, how, typer.echo)
    except Unreachable as error:
        raise SpecErrors([f"--address: {error}"]) from error
    does = "is live already, joined" if sent.joined else "sent"
    typer.echo(f"{sent.submission.id}: {does} ({url})")
    run = job.run.store
    if not follow:
        named = run.name if run.name else run.url
        typer.echo(f"stillhouse status {named}; stillhouse watch {named}; stillhouse stop {named}")
        return DONE
    from jobs.cli.runs import watch_run

    return watch_run(run)


def _address(address: str | None) -> str:
    from urllib.parse import urlsplit

    url = address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not url:
        raise SpecErrors(
            ["--address: missing; may be the dashboard of a cluster, e.g. http://HOST:8265"]
        )
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise SpecErrors(
            [
                "--address: has a user or password in it, which would be kept with the run; may be "
                "http://HOST:8265, with the token in RAY_AUTH_TOKEN_PATH"
            ]
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecErrors(
            [
                f"--address: got {url}; may be the dashboard of a cluster, e.g. http://HOST:8265 "
                "(a running Ray is joined with stillhouse run --address HOST:PORT)"
            ]
        )
    return url.rstrip("/")


def manifest(
    spec: SpecArgument,
    image: Annotated[
        str,
        typer.Option(
            metavar="IMAGE",
            help="Built from this checkout's Dockerfile, with a tag other than latest.",
        ),
    ],
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it. Default: stdout.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Worker pods. Default: as many as hold the GPU workers of resources, else 1.",
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            metavar="G", min=0, help="GPUs of a worker pod. Needed where resources says auto."
        ),
    ] = None,
    gpu_type: Annotated[
        str | None,
        typer.Option(
            metavar="[LABEL=]TYPE",
            help="Only nodes with this label. Default label: nvidia.com/gpu.product.",
        ),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="CPUs of a worker pod. Default: 8 per GPU; 4 without."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of a worker pod. Default: 64Gi per GPU; 32Gi without."),
    ] = None,
    shm: Annotated[
        str, typer.Option(metavar="SIZE", help="/dev/shm of a worker pod, part of its memory.")
    ] = "16Gi",
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENV=SECRET/KEY",
            help="A variable from a Kubernetes secret, by name; repeatable.",
        ),
    ] = None,
    pvc: Annotated[
        list[str] | None,
        typer.Option(metavar="CLAIM:/MOUNT", help="A volume that all pods share; repeatable."),
    ] = None,
    suspend: Annotated[
        bool, typer.Option("--suspend/--no-suspend", help="Apply it, but do not start it yet.")
    ] = False,
    queue: Annotated[
        str | None, typer.Option(metavar="QUEUE", help="A LocalQueue of Kueue.")
    ] = None,
    ttl: Annotated[
        int,
        typer.Option(
            metavar="SECONDS", min=0, help="The cluster is kept so long after the job's end."
        ),
    ] = 60,
    retries: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="New clusters after a failure; the run continues."),
    ] = 2,
    service_account: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the pods, e.g. one that may use a bucket."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: that of kubectl.")
    ] = None,
) -> int:
    """Print a KubeRay RayJob for SPEC.

    A ConfigMap with the resolved spec and a RayJob that runs it, for kubectl apply -f -.
    """
    from jobs.kubernetes.manifest import Options, build
    from jobs.kubernetes.pods import Asked
    from jobs.spec.load import load_spec

    job = load_spec(spec, overrides or [])
    text = build(
        job,
        Options(
            image=image,
            size=Asked(nodes, gpus_per_node, gpu_type, cpus, memory, shm),
            secrets=tuple(secret or ()),
            volumes=tuple(pvc or ()),
            suspend=suspend,
            queue=queue,
            ttl_s=ttl,
            retries=retries,
            service_account=service_account,
            namespace=namespace,
        ),
    )
    if out is None:
        typer.echo(text, nl=False)
        return DONE
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecErrors([f"--out: {out} cannot be written: {error.strerror}"]) from None
    typer.echo(f"wrote {out}; next: kubectl apply -f {out}")
    return DONE
