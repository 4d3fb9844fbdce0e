"""`stillhouse manifest`: a job as a KubeRay RayJob."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.arguments import OverridesArgument, SpecArgument
from jobs.errors import SpecErrors

DONE = 0


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
    from jobs.load import load_spec
    from jobs.manifests.build import Options, build
    from jobs.manifests.sizing import Asked

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
