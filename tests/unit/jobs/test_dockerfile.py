"""The Dockerfile, read as text: what a build would trip over, and what no image may have."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.kuberay import USER

ROOT = Path(__file__).parents[3]
CODE = ("jobs", "trainer", "quant", "cluster")


@dataclass(frozen=True)
class Step:
    """One instruction: its word, what follows, and the stage it is in."""

    word: str
    rest: str
    stage: str


def read(text: str) -> list[Step]:
    """The instructions of a Dockerfile."""
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
    steps, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n"):
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        steps.append(Step(word, rest, stage))
    return steps


STEPS = read((ROOT / "Dockerfile").read_text())
IGNORE = [
    line
    for line in (ROOT / ".dockerignore").read_text().split("\n")
    if line and not line.startswith("#")
]


def of(word: str) -> list[Step]:
    return [step for step in STEPS if step.word == word]


def ignored(path: str) -> bool:
    """As docker reads .dockerignore: the last line that fits decides."""
    out = False
    parts = Path(path).parts
    folders = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    for line in IGNORE:
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            fits = any(fnmatch.fnmatch(folder, pattern) for folder in folders)
        if fits:
            out = not line.startswith("!")
    return out


def test_stages_build_on_a_pinned_image_or_on_each_other() -> None:
    stages: set[str] = set()
    for step in of("FROM"):
        image = step.rest.split(" ")[0]
        name, _, tag = image.partition(":")
        assert image in stages or (name and tag and tag != "latest")
        stages.add(step.stage)
    assert len(stages) == len(of("FROM")) >= 2


def test_nothing_runs_as_root_in_the_end() -> None:
    last = [step for step in STEPS if step.stage == STEPS[-1].stage and step.word == "USER"][-1]
    # A number: Kubernetes cannot tell from a name that it is not root.
    assert last.rest == f"{USER}:{USER}"
    assert f"useradd --uid {USER} " in "".join(step.rest for step in of("RUN"))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    for step in of("COPY"):
        if step.rest.startswith("--from="):
            continue
        for source in step.rest.split(" ")[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored(source), source


def test_all_code_is_copied() -> None:
    copied = {source for step in of("COPY") for source in step.rest.split(" ")[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} == set(CODE) <= copied


@pytest.mark.parametrize(
    "path", ["runs/demo/spec.yaml", ".git/config", ".env", "jobs/.env", "wandb/x", ".venv/bin/pip",
             "jobs/__pycache__/cli.pyc", "id.pem", "cluster/tls.key", "docs/kubernetes.md"],
)  # fmt: skip
def test_what_no_image_may_have_is_ignored(path: str) -> None:
    assert ignored(path)


def test_packages_are_those_of_the_lock_file() -> None:
    installs = re.findall(r"pip install [^&]*", " && ".join(step.rest for step in of("RUN")))
    assert len(installs) == 2
    assert all("--constraint requirements.lock" in each for each in installs)
    assert re.search(r"^torch==[0-9.]+$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)


def test_no_secret_and_nothing_from_a_url() -> None:
    assert of("ADD") == []
    settings = [step.rest for step in STEPS if step.word in ("ARG", "ENV")]
    assert not re.search(r"(?i)token|secret|password|api_?key", " ".join(settings))


def test_the_code_is_found_from_every_folder() -> None:
    (folder,) = {step.rest for step in of("WORKDIR")}
    assert f"PYTHONPATH={folder} " in of("ENV")[0].rest


def test_the_reader_sees_what_is_wrong() -> None:
    steps = read("FROM a:1 AS one\n# c\nRUN x \\\n  && y\nADD http://h/f /f\n")
    assert steps == [
        Step("FROM", "a:1 AS one", "one"),
        Step("RUN", "x && y", "one"),
        Step("ADD", "http://h/f /f", "one"),
    ]
