"""The options of `stillhouse manifest` as values; each fault is one line, never with a secret."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from hashlib import blake2s
from typing import TypeVar

from cluster.kuberay import SPEC_FOLDER, Secret, Volume

NAME_LENGTH = 47  # KubeRay appends a suffix for the cluster, and refuses longer ones
GPU_PRODUCT = "nvidia.com/gpu.product"  # set by NVIDIA's GPU feature discovery
OWN_FOLDERS = ("/dev", "/proc", "/sys", "/tmp", "/opt/stillhouse", SPEC_FOLDER)

_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_DNS_LABEL = re.compile(_LABEL)
_DNS_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")
_LABEL_KEY = re.compile(rf"({_SUBDOMAIN.pattern}/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
# What services hand out as keys, and what else is too long and too mixed for a name.
_TOKEN = re.compile(
    r"(hf_|sk-|pk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|eyJ|wandb_v1).*"
    r"|[0-9a-fA-F]{32,}|(?=.*[a-z])(?=.*[A-Z])(?=.*[0-9])[A-Za-z0-9]{24,}"
)
_QUANTITY = re.compile(r"([1-9][0-9]*)(Mi|Gi|Ti|M|G|T)")
_FACTORS = {
    "M": 10**6, "G": 10**9, "T": 10**12, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
}  # fmt: skip

Value = TypeVar("Value")


class Fault(ValueError):
    """An option is wrong: one line."""


def kept(faults: list[str], read: Callable[[], Value], otherwise: Value) -> Value:
    """What `read` returns; a fault of it goes to `faults`, and `otherwise` is returned."""
    try:
        return read()
    except Fault as fault:
        faults.append(str(fault))
        return otherwise


def kubernetes_name(run: str) -> str:
    """A name that KubeRay takes, for a run's: the same where it can be.

    It begins with a letter, has letters, digits and '-', and at most 47 of them. Where the run's
    name is changed a hash of it follows, so that two runs never have one name.
    """
    if len(run) <= NAME_LENGTH and _DNS_1035.fullmatch(run):
        return run
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}".rstrip("-")
    mark = blake2s(run.encode(), digest_size=4).hexdigest()
    return f"{plain[: NAME_LENGTH - 9].rstrip('-')}-{mark}"


def read_image(image: str) -> str:
    """An image with a tag that is not latest, or with a digest."""
    name, at, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/-]*", name) is not None
    fixed = re.fullmatch(r"sha256:[0-9a-f]{64}", digest) if at else tag not in ("", "latest")
    if plain and fixed:
        return image
    raise Fault(
        f"--image: got {image}; may be an image with a tag other than latest, or a digest, so that "
        "all pods of all retries have the same, e.g. registry.example.com/stillhouse:0.1.0-cuda"
    )


def read_secrets(texts: Sequence[str]) -> tuple[Secret, ...]:
    """ENV=SECRET/KEY of each text; a fault names the entry by its number, never its value."""
    secrets: dict[str, Secret] = {}
    for number, text in enumerate(texts, start=1):
        variable, equals, reference = text.partition("=")
        name, slash, key = reference.partition("/")
        where = f"--secret, number {number}"
        if any(_TOKEN.fullmatch(part) for part in (variable, reference, name, key)):
            raise Fault(
                f"{where}: looks like the secret itself, which must not be in a manifest; may be "
                "ENV=SECRET/KEY of a Kubernetes secret (kubectl create secret generic)"
            )
        if (
            not equals
            or not slash
            or not _VARIABLE.fullmatch(variable)
            or not _SUBDOMAIN.fullmatch(name)
            or not _KEY.fullmatch(key)
        ):
            raise Fault(
                f"{where}: may be ENV=SECRET/KEY, the name of a variable, of a Kubernetes secret "
                "and of a key in it, e.g. HF_TOKEN=hugging-face/token"
            )
        if variable.startswith("RAY_") or variable in ("PATH", "PYTHONPATH", "HOME"):
            raise Fault(f"{where}: {variable} is set by Ray, KubeRay or the image; leave it out")
        if variable in secrets:
            raise Fault(f"{where}: {variable} is given twice; give it once")
        secrets[variable] = Secret(variable, name, key)
    return tuple(secrets.values())


def read_volumes(texts: Sequence[str]) -> tuple[Volume, ...]:
    """CLAIM:/mount of each text; no mount is in another, or over a folder of the image."""
    volumes: list[Volume] = []
    for text in texts:
        claim, _, path = text.partition(":")
        normal = posixpath.normpath(path)
        if not _SUBDOMAIN.fullmatch(claim) or not path.startswith("/") or normal in ("/", "//"):
            raise Fault(
                f"--pvc: got {text}; may be CLAIM:/MOUNT, a PersistentVolumeClaim and an absolute "
                "folder, e.g. shared:/mnt/shared"
            )
        if any(below(normal, own) or below(own, normal) for own in OWN_FOLDERS):
            raise Fault(f"--pvc: got {text}; {path} is a folder of the image; take /mnt/{claim}")
        for other in volumes:
            if below(normal, other.path) or below(other.path, normal):
                raise Fault(f"--pvc: {path} and {other.path} overlap; give folders side by side")
        volumes.append(Volume(claim, normal))
    return tuple(volumes)


def read_gpu_type(text: str | None) -> tuple[str, str] | None:
    """LABEL=VALUE, or a value of the label that NVIDIA's feature discovery sets."""
    if text is None:
        return None
    label, equals, value = text.rpartition("=")
    label = label if equals else GPU_PRODUCT
    if not _LABEL_KEY.fullmatch(label) or not _LABEL_VALUE.fullmatch(value):
        raise Fault(
            f"--gpu-type: got {text}; may be a value of the node label {GPU_PRODUCT} (kubectl get "
            f"nodes -L {GPU_PRODUCT}) or LABEL=VALUE, e.g. "
            "cloud.google.com/gke-accelerator=nvidia-h100-80gb"
        )
    return label, value


def read_bytes(option: str, text: str) -> int:
    """The bytes of a Kubernetes quantity such as 64Gi."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise Fault(f"{option}: got {text}; may be a whole number with Mi, Gi or Ti, e.g. 64Gi")
    return int(match[1]) * _FACTORS[match[2]]


def read_label(option: str, text: str | None) -> str | None:
    """The name of a Kubernetes object such as a namespace."""
    if text is None or (len(text) <= 63 and _DNS_LABEL.fullmatch(text)):
        return text
    raise Fault(f"{option}: got {text}; may be lower-case letters, digits and '-', at most 63")


def below(path: str, folder: str) -> bool:
    """Whether a normal absolute path is the folder, or in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
