"""A spec becomes a manifest: pods from resources, nothing that the pods could not reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cluster.kuberay import Pods
from jobs.cli.submit import manifest
from jobs.errors import SpecErrors
from jobs.kubernetes.manifest import ENTRYPOINT, Options, build
from jobs.kubernetes.pods import Asked, size
from jobs.spec.job import JobSpec
from jobs.spec.load import load_spec

SPEC = """\
name: a-run
storage: s3://bucket/runs
teacher: {model: org/big}
student: {model: org/small}
data: {train: [{source: org/texts}]}
"""
GPUS = Asked(gpus_per_node=8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def spec(*overrides: str) -> JobSpec:
    return load_spec("spec.yaml", overrides)


def made(job: JobSpec, **options: Any) -> list[Any]:
    options.setdefault("size", GPUS)
    return list(yaml.safe_load_all(build(job, Options("s:1", **options))))


def faults(job: JobSpec, **options: Any) -> list[str]:
    options.setdefault("size", GPUS)
    options.setdefault("image", "s:1")
    with pytest.raises(SpecErrors) as caught:
        build(job, Options(**options))
    return caught.value.faults


# -- the text ----------------------------------------------------------------------------------


def test_the_spec_comes_back_equal(folder: Path) -> None:
    job = spec("student.config={model_type: llama, a: 1e3}", "student.init=random",
               "student.model=null", "tracking.tags=['yes', 'a: b', 'ü']")  # fmt: skip
    config, ray = made(job)
    (folder / "back.yaml").write_text(config["data"]["spec.yaml"])
    assert load_spec("back.yaml") == job
    assert ray["spec"]["entrypoint"] == ENTRYPOINT


def test_the_text_is_the_same_each_time_and_has_no_backslash() -> None:
    options = Options("s:1", size=GPUS, secrets=("A=b/c",), volumes=("v:/mnt/v",))
    text = build(spec(), options)
    assert text == build(spec(), options)
    assert "\\" not in text and max(map(len, text.split("\n"))) <= 140


def test_comments_say_why_and_change_nothing() -> None:
    text = build(spec(), Options("s:1", size=GPUS))
    assert "fenced by attempt number" in text
    without = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("# "))
    assert list(yaml.safe_load_all(without)) == list(yaml.safe_load_all(text))


def test_names_that_look_like_numbers_stay_texts() -> None:
    text = build(spec(), Options("s:1", size=GPUS, namespace="1e3", queue="0o17"))
    assert "namespace: '1e3'" in text and "queue-name: '0o17'" in text


def test_the_command_prints_or_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()
    app.command()(manifest)
    command = typer.main.get_command(app)
    words = ["spec.yaml", "seed=3", "--image", "s:1", "--gpus-per-node", "2", "--suspend"]
    assert command.main(args=words, standalone_mode=False) == 0
    text = capsys.readouterr().out
    assert "    seed: 3\n" in text and "  suspend: true\n" in text
    assert command.main(args=[*words, "--out", "m.yaml"], standalone_mode=False) == 0
    assert (folder / "m.yaml").read_text() == text
    assert "kubectl apply -f m.yaml" in capsys.readouterr().out
    with pytest.raises(SpecErrors, match="--out: no/m.yaml cannot be written: No such file"):
        command.main(args=[*words, "--out", "no/m.yaml"], standalone_mode=False)


# -- pods --------------------------------------------------------------------------------------

LABEL = ("nvidia.com/gpu.product", "T")


@pytest.mark.parametrize(
    ("overrides", "asked", "pods"),
    [
        ([], GPUS, Pods(1, 8, 64, "512Gi", 16 << 30)),
        ([], Asked(gpus_per_node=0), Pods(1, 0, 4, "32Gi", 16 << 30)),
        ([], Asked(2, 4, "T"), Pods(2, 4, 32, "256Gi", 16 << 30, LABEL)),
        (["distill.workers=16"], Asked(None, 8, "T"), Pods(2, 8, 64, "512Gi", 16 << 30, LABEL)),
        (["distill.workers=9"], Asked(None, 8, "T"), Pods(2, 8, 64, "512Gi", 16 << 30, LABEL)),
        (["distill.workers=[4,16]"], GPUS, None),  # two nodes of which type?
        (["distill.workers=[4,16]"], Asked(1, 8), Pods(1, 8, 64, "512Gi", 16 << 30)),
        (
            ["distill.gpus_per_worker=1", "distill.workers=4"],
            Asked(),
            Pods(1, 4, 32, "256Gi", 16 << 30),
        ),
        (
            ["distill.gpus_per_worker=1", "distill.workers=16"],
            Asked(gpu_type="T"),
            Pods(2, 8, 64, "512Gi", 16 << 30, LABEL),
        ),
        (
            ["capture.gpus_per_worker=0", "distill.gpus_per_worker=0", "distill.workers=4",
             "distill.cpus_per_worker=3"],
            Asked(nodes=2),
            Pods(2, 0, 6, "32Gi", 16 << 30),
        ),
        ([], Asked(1, 8, None, 16, "128Gi", "8Gi"), Pods(1, 8, 16, "128Gi", 8 << 30)),
    ],
)  # fmt: skip
def test_pods(overrides: list[str], asked: Asked, pods: Pods | None) -> None:
    found: list[str] = []
    sized = size(spec(*(f"resources.{text}" for text in overrides)), asked, found)
    if pods is None:
        assert len(found) == 1 and found[0].startswith("--gpu-type: needed with 2 nodes")
    else:
        assert (sized, found) == (pods, [])


@pytest.mark.parametrize(
    ("overrides", "asked", "fault"),
    [
        ([], Asked(), "--gpus-per-node: needed, as resources leaves GPUs to the cluster (auto)"),
        (["distill.workers=16"], Asked(1, 8), "resources.distill: 16 workers of 1 CPUs and 1 GPUs"),
        (
            ["distill.gpus_per_worker=1"],
            Asked(1, 0),
            "resources.distill: 1 workers of 1 CPUs and 1",
        ),
        (["distill.cpus_per_worker=9", "distill.workers=8"], GPUS, "resources.distill: 8 workers"),
        (["sweep.gpus_per_cell=2"], Asked(1, 1), "resources.sweep.gpus_per_cell: got 2, and a"),
        (["sweep.cpus_per_cell=9"], Asked(1, 1), "resources.sweep.cpus_per_cell: got 9, and a"),
        ([], Asked(1, 0, "T"), "--gpu-type: has no meaning without GPUs"),
        ([], Asked(1, 8, "a b"), "--gpu-type: got a b; may be"),
        ([], Asked(1, 8, None, None, "16Gi"), "--shm: got 16Gi, which counts as memory of a pod"),
        ([], Asked(1, 8, None, None, "x"), "--memory: got x; may be"),
    ],
)
def test_pods_that_cannot_be(overrides: list[str], asked: Asked, fault: str) -> None:
    job = spec(*(f"resources.{text}" for text in overrides))
    lines = faults(job, size=asked)
    assert len(lines) == 1 and lines[0].startswith(fault)


# -- what pods can reach -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["storage=gs://b/x"],
        ["storage=/mnt/v/runs"],
        ["storage=file:///mnt/v/runs"],
        ["storage=/mnt/v"],
        ["teacher.model=/mnt/v/big", "data.train.0.source=/mnt/v/*.jsonl"],
        ["teacher.model=s3://b/big", "data.train.0.source=builtin:python-docs"],
        ["sweep.extra=[{path: /mnt/v/x}]", "sweep.tasks=[{folder: /mnt/v/t}, arc_easy]"],
    ],
)
def test_what_all_pods_see(overrides: list[str]) -> None:
    made(spec(*overrides), volumes=("v:/mnt/v",))


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("storage=./runs", "storage: got ./runs, which the pods do not share; may be a URL"),
        ("storage=/mnt/vv/runs", "storage: got /mnt/vv/runs, which the pods do not share"),
        ("storage=/mnt/v/../runs", "storage: got /mnt/v/../runs, which the pods do not share"),
        ("storage=memory://x", "storage: got memory://x, which the pods do not share"),
        ("storage=s3://key:SECRET@b/x", "storage: has credentials or a query in the URL"),
        (
            "teacher.model=./big",
            "teacher.model: got ./big, which the pods do not have; may be a hub",
        ),
        ("student.model=small", "student.model: got small, which the pods do not have"),
        ("teacher.model=here/big", "teacher.model: got here/big, which the pods do not have"),
        ("teacher.model=https://me:SECRET@h/x", "teacher.model: has credentials"),
        ("data.train.0.source=a/*.jsonl", "data.train.0.source: got a/*.jsonl, which the pods do"),
        ("sweep.extra=[{path: ./x}]", "sweep.extra.0.path: got ./x, which the pods do not have"),
        ("sweep.tasks=[{folder: t}]", "sweep.tasks.0.folder: got t, which the pods do not have"),
    ],
)
def test_what_some_pod_does_not_see(folder: Path, override: str, fault: str) -> None:
    (folder / "here" / "big").mkdir(parents=True)
    lines = faults(spec(override), volumes=("v:/mnt/v",))
    assert len(lines) == 1 and lines[0].startswith(fault) and "SECRET@" not in lines[0]
    assert "--pvc CLAIM:/mnt/shared" in lines[0] or "--secret" in lines[0]


def test_a_servers_key_must_be_in_the_pods() -> None:
    job = spec(
        "distill={mode: responses, losses: {ce: 1.0}}",
        "data.train.0.format=messages",
        "responses={from: {endpoint: 'https://x.example/v1', model: m, api_key_env: KEY}}",
    )
    assert faults(job) == [
        "responses.from.api_key_env: KEY is not set in the pods; give --secret KEY=SECRET/KEY"
    ]
    made(job, secrets=("KEY=server/key",))


def test_all_that_is_wrong_is_told_at_once() -> None:
    lines = faults(
        spec("storage=./runs"), image="s", size=Asked(), namespace="A", service_account="B"
    )
    assert [line.partition(":")[0] for line in lines] == [
        "--image", "--service-account", "--namespace", "--gpus-per-node", "storage",
    ]  # fmt: skip
