"""What is looked at on a node, and what the driver makes of the answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.nodes import Answer
from cluster.session import Cluster
from cluster.spec import ResourcesSpec
from cluster.storage import open_store
from jobs.errors import SpecErrors
from jobs.forecast.place import this_core
from jobs.pipeline import node_check, preflight
from jobs.pipeline.node_check import Model, fetch, look, versions


def test_a_node_sees_the_storage_and_can_write_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write_text("p/driver", "nonce")
    faults, name = look((store, "p", "nonce", versions(), 0))
    assert faults == [] and name in store.list("p")


def test_silent_nodes_are_named_and_those_that_are_gone_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = this_core()
    answers = [Answer("10.0.0.1", value=core), Answer("10.0.0.2", lost="died", alive=False)]
    monkeypatch.setattr(preflight, "run_on_every_node", lambda *a, **k: answers)
    monkeypatch.setattr(preflight, "install_seconds", lambda: 0.0)
    cluster = Cluster("10.0.0.1:6379", ((2, 0), (2, 0)), False)
    found = preflight.cores(cluster, lambda: False, print, print)
    assert found == [core]
    answers.append(Answer("10.0.0.3", lost="gave no answer", alive=True))
    with pytest.raises(preflight.NodesSilent, match=r"10\.0\.0\.3"):
        preflight.cores(cluster, lambda: False, print, print)


def test_another_storage_under_the_same_path_is_noticed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(RuntimeError, match="does not see what the driver wrote"):
        look((store, "p", "nonce", versions(), 0))
    store.write_text("p/driver", "of another run")
    with pytest.raises(RuntimeError, match="another file"):
        look((store, "p", "nonce", versions(), 0))


def test_other_versions_and_full_disks_are_faults(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write_text("p/driver", "nonce")
    wanted = {**versions(), "torch": "1.0.0"}
    faults, _ = look((store, "p", "nonce", wanted, 10**18))
    assert len(faults) == 2
    assert faults[0].startswith("has torch 2.") and "the driver has 1.0.0" in faults[0]
    assert "a checkpoint needs" in faults[1] and "TMPDIR" in faults[1]


def test_local_builds_of_a_version_are_that_version() -> None:
    assert versions()["torch"].count("+") == 0 and versions()["python"].startswith("3.")


def test_models_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    gone = Model("teacher.model", "org/gated", "main")
    (line,) = fetch([gone])
    assert line.startswith("teacher.model: 'org/gated'")
    assert line.endswith("(HF_TOKEN is not set on that node)") and "\n" not in line
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (line,) = fetch([gone])
    assert line.endswith("(HF_TOKEN is set on that node)") and "hf_secret" not in line


def test_a_model_for_which_there_is_no_room_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    store = open_store("memory://large-model")
    store.write_text("config.json", "{}")
    store.write_bytes("model.safetensors", b"x" * 1000)
    usage = SimpleNamespace(free=900)
    monkeypatch.setattr(node_check.shutil, "disk_usage", lambda path: usage)
    (line,) = fetch([Model("teacher.model", "memory://large-model", "main")])
    assert "900 B free" in line and "STILLHOUSE_CACHE" in line
    assert not store.has_copy()
    usage.free = 10**6
    assert fetch([Model("teacher.model", "memory://large-model", "main")]) == []
    assert store.has_copy()
    usage.free = 0
    assert fetch([Model("teacher.model", "memory://large-model", "main")]) == []


@pytest.mark.parametrize(("url", "words"), [("local", "does not share"), ("memory", "credentials")])
def test_nodes_that_do_not_share_the_storage(tmp_path: Path, url: str, words: str) -> None:
    store = open_store(tmp_path if url == "local" else "memory://not-shared")
    store.write_text("p/seen", "")
    spec: Any = SimpleNamespace(storage=store.url)
    answers = [
        Answer("good", ([], "seen")),
        Answer("blind", error="RuntimeError: it does not see"),
        Answer("deaf", ([], "elsewhere")),
        Answer("gone", lost="gave no answer within 120 s"),
    ]
    faults = preflight._storage_faults(spec, store, answers, "p")
    assert len(faults) == 2 and all(words in fault for fault in faults)
    assert "blind" in faults[0] and "deaf" in faults[1] and "not seen here" in faults[1]


def test_stages_that_fit_no_node_are_refused_together() -> None:
    asked = ResourcesSpec.model_validate(
        {
            "capture": {"workers": 9},
            "distill": {"gpus_per_worker": 1},
            "sweep": {"cpus_per_cell": 5},
        }
    )
    spec: Any = SimpleNamespace(resources=asked, responses=None)
    cluster = Cluster("x", ((4, 0), (4, 0)), embedded=False)
    with pytest.raises(SpecErrors) as error:
        preflight.resources(spec, ["capture", "distill", "sweep"], cluster)
    assert [fault.split(":")[0] for fault in error.value.faults] == [
        "resources.capture",
        "resources.distill",
        "resources.sweep",
    ]
    with pytest.raises(SpecErrors) as error:
        preflight.resources(spec, ["distill"], cluster)
    assert len(error.value.faults) == 1
    preflight.resources(spec, ["summarize"], cluster)


def test_a_cluster_may_be_given_time_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ResourcesSpec.model_validate({"distill": {"workers": 4}, "growth_minutes": 1})
    spec: Any = SimpleNamespace(resources=asked, responses=None)
    sizes = [Cluster("x", ((1, 0),) * count, embedded=False) for count in (2, 3, 4)]
    monkeypatch.setattr(preflight, "refresh", lambda cluster: sizes[sizes.index(cluster) + 1])
    monkeypatch.setattr(preflight.time, "sleep", lambda seconds: None)
    wanted: list[Any] = []
    monkeypatch.setattr(preflight, "ask_to_grow", wanted.append)
    told: list[str] = []
    grown = preflight.wait_for_resources(spec, ["distill"], sizes[0], lambda: False, told.append)
    assert grown == sizes[2] and len(told) == 2
    assert wanted == [[{"CPU": 1.0}] * 4]
    assert "only 2 do" in told[0] and "only 3 do" in told[1]
