"""A spec and the options of `stillhouse manifest` as YAML for KubeRay, with comments."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import yaml

from cluster.kuberay import SPEC_FILE, SPEC_FOLDER, Job, Secret, Volume, config_map, ray_job
from jobs.errors import SpecErrors
from jobs.kubernetes.options import (
    kept,
    kubernetes_name,
    read_image,
    read_label,
    read_secrets,
    read_volumes,
)
from jobs.kubernetes.pods import Asked, reach_faults, size
from jobs.spec.job import JobSpec
from jobs.spec.load import dump_spec

WIDTH = 96
# Above the first line with the key.
COMMENTS = {
    "runtimeEnvYAML": "After a stop is asked for, Ray waits so long for the checkpoint.",
    "backoffLimit": "Each retry has a new cluster, whose pods may overlap with those of the one "
    "before; runs are fenced by attempt number, so the older one cannot publish.",
    "ttlSecondsAfterFinished": "The cluster, with its GPUs, is kept so long after the end.",
    "submitterPodTemplate": "Runs `ray job submit`; KubeRay fills in the command.",
    "rayVersion": "That of the image.",
    "authOptions": "KubeRay makes a token for this cluster alone; nobody without it can connect.",
    "num-cpus": "Only the driver runs on the head; work goes to the workers.",
    "object-store-memory": "Half of /dev/shm in bytes; NCCL, gloo and data loaders have the rest.",
    "preStop": "Has the job save a checkpoint, and waits for it.",
    "emptyDir": "/dev/shm; it counts as memory of the pod.",
    "nodeSelector": "One type of GPU.",
}


def render(name: str, objects: list[dict[str, Any]], comments: Mapping[str, str]) -> str:
    """The objects as YAML documents in their order; the same objects give the same text."""
    head = f"# The run {name} on KubeRay, made by `stillhouse manifest`: kubectl apply -f FILE"
    return "\n---\n".join([head, *(_document(each, comments) for each in objects)]) + "\n"


def _document(data: dict[str, Any], comments: Mapping[str, str]) -> str:
    left = dict(comments)
    lines: list[str] = []
    literal: int | None = None  # indent of the key whose text the lines are
    text = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False,
        width=10**6,
    )  # fmt: skip
    for line in text.rstrip("\n").split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if literal is not None and line and indent <= literal:
            literal = None
        key = re.match(r" *(?:- )?([A-Za-z-]+):", line)
        if literal is None and key and key[1] in left:
            mark = f"{' ' * indent}# "
            lines += textwrap.wrap(
                left.pop(key[1]), WIDTH, initial_indent=mark, subsequent_indent=mark
            )
        if literal is None and re.search(r": \|[0-9+-]*$", line):
            literal = indent
        lines.append(line)
    return "\n".join(lines)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a literal block, lists below their key, nothing as an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
# Numbers to the YAML 1.2 of Kubernetes, text to the 1.1 of PyYAML: as text they need quotes.
for _tag, _pattern in (("float", r"[-+]?[0-9.]+[eE][-+]?[0-9]+$"), ("int", r"0[ox][0-9a-fA-F]+$")):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-+.0123456789")
    )


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
