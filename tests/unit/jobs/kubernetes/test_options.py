"""Options of `stillhouse manifest`: what Kubernetes takes, and one line for what it does not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kuberay import Secret, Volume
from jobs.kubernetes.options import (
    NAME_LENGTH,
    Fault,
    kubernetes_name,
    read_bytes,
    read_gpu_type,
    read_image,
    read_label,
    read_secrets,
    read_volumes,
)
from trainer.spec.rules import NAME

RUN_NAMES = st.from_regex(NAME, fullmatch=True)


@given(RUN_NAMES)
def test_every_run_has_a_name_that_kuberay_takes(run: str) -> None:
    name = kubernetes_name(run)
    assert len(name) <= NAME_LENGTH
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)


@given(RUN_NAMES, RUN_NAMES)
def test_two_runs_have_two_names(one: str, other: str) -> None:
    assert (kubernetes_name(one) == kubernetes_name(other)) == (one == other)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("demo", "demo"),
        ("qwen3-8b", "qwen3-8b"),
        ("qwen3-8b-to-0.6b", r"qwen3-8b-to-0-6b-[0-9a-f]{8}"),
        ("7b", r"run-7b-[0-9a-f]{8}"),
        ("a-", r"a-[0-9a-f]{8}"),
        ("0", r"run-0-[0-9a-f]{8}"),
        ("a" * 63, r"a{38}-[0-9a-f]{8}"),
    ],
)
def test_names(run: str, name: str) -> None:
    assert re.fullmatch(name, kubernetes_name(run))


@pytest.mark.parametrize(
    "image",
    [
        "stillhouse:0.1.0",
        "registry.example.com:5000/team/stillhouse:0.1.0-cuda",
        f"stillhouse@sha256:{'0' * 64}",
        f"stillhouse:latest@sha256:{'0' * 64}",
    ],
)
def test_images(image: str) -> None:
    assert read_image(image) == image


@pytest.mark.parametrize(
    "image",
    ["", "stillhouse", "stillhouse:latest", "reg:5000/stillhouse", "a b:1", "s@sha256:1", ":1"],
)
def test_images_that_may_change_are_refused(image: str) -> None:
    with pytest.raises(Fault, match=r"^--image: got .*a tag other than latest"):
        read_image(image)


def test_secrets() -> None:
    assert read_secrets(["HF_TOKEN=hugging-face/token", "A=b.c/D_e"]) == (
        Secret("HF_TOKEN", "hugging-face", "token"),
        Secret("A", "b.c", "D_e"),
    )


@pytest.mark.parametrize(
    "text",
    [
        "HF_TOKEN=hf_SeCrEt0123456789",
        "HF_TOKEN=name/hf_SeCrEt0123456789",
        "KEY=name/0123456789abcdef0123456789abcdef",
        "KEY=0123456789abcdef0123456789abcdef/key",
        "KEY=name/wJalrXUtnFEMIK7MDENGbPxRfiCYSeCrEt0",
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYSeCrEt0",
        "OPENAI_API_KEY=sk-SeCrEt",
        "AKIASECRET",
        "hf_SeCrEt=name/key",
    ],
)
def test_a_secret_itself_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(Fault) as caught:
        read_secrets(["A=b/c", text])
    line = str(caught.value)
    assert line.startswith("--secret, number 2: ") and "ENV=SECRET/KEY" in line
    parts = [part for part in re.split("[=/]", text) if len(part) > 8 and "_ACCESS_" not in part]
    assert not any(part in line for part in parts if part not in ("HF_TOKEN", "OPENAI_API_KEY"))


@given(st.text(max_size=60))
def test_no_text_is_repeated(text: str) -> None:
    secret = f"QZ{text}QZ"
    try:
        made = read_secrets([f"KEY={secret}"])
    except Fault as fault:
        assert secret not in str(fault)
    else:
        raise AssertionError(made)  # upper-case letters are in no name of a secret


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["A"], "may be ENV=SECRET/KEY"),
        (["A=b"], "may be ENV=SECRET/KEY"),
        (["1A=b/c"], "may be ENV=SECRET/KEY"),
        (["A=B/c"], "may be ENV=SECRET/KEY"),
        (["A=b/c/d"], "may be ENV=SECRET/KEY"),
        (["RAY_AUTH_TOKEN=b/c"], "is set by Ray"),
        (["PYTHONPATH=b/c"], "is set by Ray"),
        (["A=b/c", "A=b/d"], "A is given twice"),
    ],
)
def test_secrets_that_are_wrong(texts: list[str], why: str) -> None:
    with pytest.raises(Fault, match=why):
        read_secrets(texts)


def test_volumes() -> None:
    assert read_volumes(["shared:/mnt/shared/", "data:/mnt/data"]) == (
        Volume("shared", "/mnt/shared"),
        Volume("data", "/mnt/data"),
    )


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["shared"], "may be CLAIM:/MOUNT"),
        (["shared:mnt"], "may be CLAIM:/MOUNT"),
        (["Shared:/mnt"], "may be CLAIM:/MOUNT"),
        (["a:/"], "may be CLAIM:/MOUNT"),
        (["a://"], "may be CLAIM:/MOUNT"),
        (["a:/dev/shm"], "is a folder of the image"),
        (["a:/opt"], "is a folder of the image"),
        (["a:/etc/stillhouse/x"], "is a folder of the image"),
        (["a:/mnt/a", "b:/mnt/a/b"], "overlap"),
        (["a:/mnt/a", "a:/mnt/a"], "overlap"),
    ],
)
def test_volumes_that_are_wrong(texts: list[str], why: str) -> None:
    with pytest.raises(Fault, match=why):
        read_volumes(texts)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (None, None),
        ("NVIDIA-H100-80GB-HBM3", ("nvidia.com/gpu.product", "NVIDIA-H100-80GB-HBM3")),
        (
            "cloud.google.com/gke-accelerator=nvidia-h100-80gb",
            ("cloud.google.com/gke-accelerator", "nvidia-h100-80gb"),
        ),
        ("gpu=a", ("gpu", "a")),
    ],
)
def test_types_of_gpu(text: str | None, label: tuple[str, str] | None) -> None:
    assert read_gpu_type(text) == label


@pytest.mark.parametrize("text", ["", "a b", "=a", "a=", "-a", "x" * 64, "a//b=c"])
def test_types_of_gpu_that_are_no_labels(text: str) -> None:
    with pytest.raises(Fault, match="^--gpu-type: got "):
        read_gpu_type(text)


@pytest.mark.parametrize(
    ("text", "size"), [("16Gi", 16 << 30), ("1M", 10**6), ("2Ti", 2 << 40), ("512Mi", 512 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert read_bytes("--shm", text) == size


@pytest.mark.parametrize("text", ["", "16", "0Gi", "1.5Gi", "16GB", "-1Gi", "16 Gi"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(Fault, match=f"^--memory: got {text}; may be a whole number with Mi"):
        read_bytes("--memory", text)


@pytest.mark.parametrize("text", ["", "A", "a_b", "-a", "a-", "a" * 64, "a.b"])
def test_names_of_objects_that_are_none(text: str) -> None:
    with pytest.raises(Fault, match="^--namespace: got "):
        read_label("--namespace", text)
