"""A spec and the options of `stillhouse manifest` as the text of its manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

from cluster.manifest import SPEC_FILE, SPEC_FOLDER, Job, Secret, Volume, config_map, ray_job
from jobs.errors import SpecErrors
from jobs.load import dump_spec
from jobs.manifests.options import (
    kept,
    kubernetes_name,
    read_image,
    read_label,
    read_secrets,
    read_volumes,
)
from jobs.manifests.reach import reach_faults
from jobs.manifests.sizing import Asked, size
from jobs.manifests.text import COMMENTS, render
from jobs.spec import JobSpec

ENTRYPOINT = f"python -m jobs run {SPEC_FOLDER}/{SPEC_FILE} --address auto"


@dataclass(frozen=True)
class Options:
    """The options as they were given."""

    image: str
    size: Asked = field(default_factory=Asked)
    secrets: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    suspend: bool = False
    queue: str | None = None
    ttl_s: int = 60
    retries: int = 2
    service_account: str | None = None
    namespace: str | None = None


def build(spec: JobSpec, options: Options) -> str:
    """The manifest; the same spec and options give the same text.

    Raises SpecErrors, one line for everything that is wrong.
    """
    faults: list[str] = []
    image = kept(faults, partial(read_image, options.image), "")
    secrets: tuple[Secret, ...] = ()
    volumes: tuple[Volume, ...] = ()
    secrets = kept(faults, partial(read_secrets, options.secrets), secrets)
    volumes = kept(faults, partial(read_volumes, options.volumes), volumes)
    names = {
        option: kept(faults, partial(read_label, option, value), None)
        for option, value in (
            ("--queue", options.queue),
            ("--service-account", options.service_account),
            ("--namespace", options.namespace),
        )
    }
    misfits: list[str] = []
    pods = size(spec, options.size, misfits)
    faults += misfits
    if not any(fault.startswith(("--pvc", "--secret")) for fault in faults):
        faults += reach_faults(spec, volumes, secrets)
    if faults:
        raise SpecErrors(faults)
    job = Job(
        name=kubernetes_name(spec.name),
        image=image,
        entrypoint=ENTRYPOINT,
        spec=dump_spec(spec),
        ray_version=version("ray"),
        pods=pods,
        secrets=secrets,
        volumes=volumes,
        suspend=options.suspend,
        queue=names["--queue"],
        ttl_s=options.ttl_s,
        retries=options.retries,
        service_account=names["--service-account"],
        namespace=names["--namespace"],
    )
    return render(spec.name, [config_map(job), ray_job(job)], COMMENTS)
