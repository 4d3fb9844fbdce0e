"""How far tasks of a sweep are: phases of one, shares of all."""

from __future__ import annotations

from cluster.fanout import Progress
from jobs.sweep.progress import NAMED, Advance, Running


def test_phases_add_up_to_the_whole() -> None:
    told: list[tuple[float, str]] = []
    work = {"quantize": 20.0, "evaluation/select": 16.0, "evaluation/report": 64.0}
    advance = Advance(lambda done, words: told.append((done, words)), work)
    advance.quantized(10, 20)
    advance.quantized(20, 20)
    advance.part("select", 16)("evaluation", 16.0)
    report = advance.part("report", 64)
    report("evaluation", 12.75)
    report("evaluation", 64.0)
    advance.answered(0.5, "heldout", 20, 40)  # not asked for: not told
    assert told == [
        (0.0, "loading the model"),
        (0.1, "quantizing: 50 %"),
        (0.2, "quantizing: 100 %"),
        (0.36, "evaluated on select: 16 of 16 sequences"),
        ((20 + 16 + 12.75) / 100, "evaluated on report: 12 of 64 sequences"),
        (1.0, "evaluated on report: 64 of 64 sequences"),
    ]


def test_answers_of_benchmark_tasks_are_a_phase() -> None:
    told: list[tuple[float, str]] = []
    advance = Advance(lambda done, words: told.append((done, words)), {"quantize": 1.0, "tasks": 3})
    advance.quantized(8, 8)
    advance.answered(0.5, "heldout", 20, 40)
    assert told[1:] == [
        (0.25, "quantizing: 100 %"),
        (0.625, "benchmark task heldout: 20 of 40 answers"),
    ]


def test_the_share_of_a_sweep_counts_tasks_by_their_work() -> None:
    running = Running()
    assert running.share() == 0.0 and running.tasks() == []
    running.added("model/student", 10.0)
    running.added("cell/hqq-4b-g64", 10.0)
    running.added("cell/hqq-4b-g64-recovered", 100.0)
    running.heard("model/student", Progress(0.5, "hidden states of report: 32 of 64 sequences"))
    assert running.share() == 5 / 120
    running.ended("model/student")
    running.heard("cell/hqq-4b-g64", Progress(0.25, "quantizing: 90 %"))
    assert running.share() == 12.5 / 120
    assert running.tasks() == [
        {"key": "hqq-4b-g64", "share": 0.25, "words": "quantizing: 90 %"},
    ]
    running.lost("cell/hqq-4b-g64")
    assert running.share() == 10 / 120 and running.tasks() == []


def test_few_tasks_are_named_however_many_run() -> None:
    running = Running()
    for number in range(100):
        running.added(f"cell/{number}", 1.0)
        running.heard(f"cell/{number}", Progress(0.5, "quantizing: 50 %"))
    assert len(running.tasks()) == NAMED and running.share() == 0.5
    running.heard("model/teacher-records", Progress(0.0, ""))
    running.ended("cell/0")
    assert [task["key"] for task in running.tasks()][:1] == ["1"]
