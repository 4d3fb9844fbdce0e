"""Which cell is recommended, against brute force and closed forms over drawn numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import Store
from jobs.report.pareto import (
    OWN,
    TEACHER,
    Baseline,
    candidates,
    difference,
    front,
    front_keys,
    kept,
    retention,
    tied,
)
from jobs.report.recommend import in_words, recommend
from jobs.report.routes import answer, attributions, hours_in_words, paired, reduction, routes
from jobs.report.run_data import RunData, load_run
from tests.fixtures.swept_run import GPU, SEQUENCES, swept_run

TOKENS = [200.0] * SEQUENCES


def cell(kl: float, size: int, seed: int = 0, noise: float = 0.05, **more: Any) -> dict[str, Any]:
    """A result with a KL on select that differs from sequence to sequence, alike for all cells."""
    hard = np.exp(np.random.default_rng(7).normal(0, 0.4, SEQUENCES))
    own = np.exp(np.random.default_rng(seed).normal(0, noise, SEQUENCES))
    sums = 200 * kl * hard * own / np.mean(hard * own)
    each = {"tokens": TOKENS, "kl_to_reference": sums.tolist()}
    select = {"kl_to_student": kl, "retention": 100 - 10 * kl, "per_sequence": each}
    return {"status": "done", "bytes": size, "select": select, "spec": {"bits": 4}, **more}


def run_of(cells: dict[str, Any], **evaluations: Any) -> RunData:
    return RunData("run", "/runs/run", {"distill": {}}, [], evaluations, cells)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return swept_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def data(swept: Store) -> RunData:
    return load_run(swept)


def test_nothing_but_select_is_read(data: RunData) -> None:
    changed = {}
    for key, result in data.cells.items():
        worse = {name: None for name in result if name.startswith(("kl_", "accuracy", "retention"))}
        worse |= {"per_sequence": {"tokens": [1.0], "kl_to_reference": [99.0]}, "tasks": None}
        changed[key] = {**result, **worse}
    other = RunData(data.name, data.url, data.spec, data.events, data.evaluations, changed)
    for limits in ({}, {"max_mb": 0.6}, {"min_retention": 98.0}, {"min_speed": 1.3}):
        assert recommend(other, **limits) == recommend(data, **limits)
    assert front_keys(changed) == front_keys(data.cells)


def test_the_front_against_brute_force() -> None:
    random = np.random.default_rng(3)
    cells = {
        f"c{i}": cell(float(np.exp(random.integers(-5, 0))), int(random.integers(100, 200)), i, 0.3)
        for i in range(30)
    }
    known = {one.key: one for one in candidates(cells, OWN)}

    def beats(a: Any, b: Any) -> bool:
        return bool(a.bytes <= b.bytes and a.kl < b.kl and not tied(a, b))

    best = [one for one in known.values() if not any(beats(o, one) for o in known.values())]
    found = front(cells)
    assert {one.candidate.key for one in found} == {one.key for one in best}
    assert [one.candidate.bytes for one in found] == sorted(one.bytes for one in best)
    for one in found:
        for key in one.tied:
            assert known[key].bytes <= one.candidate.bytes and tied(known[key], one.candidate)
    assert any(one.tied for one in found) and not found[0].tied


def test_a_difference_is_tied_when_its_paired_interval_holds_zero() -> None:
    # Far more alike than their own intervals say: only the pairs tell them apart.
    a, b, c = cell(0.010, 100, 1), cell(0.011, 90, 1), cell(0.0101, 80, 2, 0.4)
    first, second, third = candidates({"c": c, "b": b, "a": a}, OWN)
    assert (first.key, second.key, third.key) == ("c", "b", "a")
    own = [one.interval() for one in (third, second)]
    assert own[0] and own[1] and own[0].high and own[1].low and own[0].high > own[1].low
    found = difference(second, third)
    assert found is not None and found.value == pytest.approx(0.001) and not tied(second, third)
    assert tied(first, third)
    assert difference(first, candidates({"x": _shorter(a)}, OWN)[0]) is None  # other sequences


def test_what_is_far_apart_is_no_tie_by_its_interval_either() -> None:
    kls = np.geomspace(0.01, 0.02, 12)
    cells = {str(kl): cell(float(kl), 100, i, 0.02 * i) for i, kl in enumerate(kls)}
    known = candidates(cells, OWN)
    answers = []
    for a, b in zip(known, known[1:], strict=False):
        found = difference(a, b)
        assert found is not None and tied(a, b) == found.holds_zero
        answers.append(found.holds_zero)
    assert True in answers and False in answers
    # One sequence that stands out, and 47 that are alike: that says nothing.
    one = {**cells["0.01"], "select": {**cells["0.01"]["select"]}}
    each = one["select"]["per_sequence"]
    sums = [each["kl_to_reference"][0] + 1000, *each["kl_to_reference"][1:]]
    one["select"]["per_sequence"] = {**each, "kl_to_reference": sums}
    assert tied(*candidates({"a": one, "b": cells["0.01"]}, OWN))


def _shorter(result: dict[str, Any]) -> dict[str, Any]:
    each = {name: values[:-1] for name, values in result["select"]["per_sequence"].items()}
    return {**result, "select": {**result["select"], "per_sequence": each}}


def test_one_lowest_kl_within_the_size_and_ties_go_to_the_smallest() -> None:
    cells = {
        "large": cell(0.001, 900_000, 1),
        "good": cell(0.0100, 600_000, 2, 0.3),
        "as-good": cell(0.0101, 500_000, 3, 0.3),
        "worse": cell(0.05, 400_000, 4),
        "broken": {"status": "failed", "bytes": None, "error": "x"},
    }
    data = run_of(cells)
    assert recommend(data, max_mb=1).key == "large"
    found = recommend(data, max_mb=0.6)
    assert (found.key, found.ties) == ("as-good", ["good"])
    assert any("Tied with good (0.600 MB)" in line for line in found.why)
    assert recommend(data, max_mb=0.499).key == "worse"
    assert recommend(data, max_mb=0.5).key == "as-good"  # the limit itself fits


def test_ties_of_one_size_go_to_the_faster_unless_the_devices_differ() -> None:
    slow = cell(0.0100, 500_000, 1, 0.3, decode_tokens_per_s=10.0, device_name="A")
    fast = cell(0.0101, 500_000, 2, 0.3, decode_tokens_per_s=90.0, device_name="A")
    assert recommend(run_of({"slow": slow, "fast": fast}), max_mb=1).key == "fast"
    elsewhere = {**fast, "device_name": "B"}
    assert recommend(run_of({"slow": slow, "fast": elsewhere}), max_mb=1).key == "slow"


def test_retention_alone_takes_the_smallest_and_with_a_size_the_best() -> None:
    cells = {"a": cell(0.01, 900_000), "b": cell(0.1, 500_000), "c": cell(1.0, 300_000)}
    data = run_of(cells)  # they keep 99.9, 99 and 90 %
    assert recommend(data, min_retention=98).key == "b"
    assert recommend(data, min_retention=98, max_mb=1).key == "a"
    assert recommend(data).key == "b"  # 99 % where nothing is asked for
    worst = run_of({"b": cell(0.2, 500_000), "c": cell(1.0, 300_000)})
    found = recommend(worst)
    assert found.key == "b" and any("None keeps 99 %" in line for line in found.why)


def test_all_limits_hold_together(data: RunData) -> None:
    baseline = Baseline.of(data.cells)
    found = recommend(data, max_mb=0.56, min_retention=95, min_speed=1.3)
    result = data.cells[str(found.key)]
    assert result["bytes"] <= 560_000 and (kept(result["select"]) or 0) >= 95
    assert (baseline.speedup(result) or 0) >= 1.3
    fits = {
        key: sum(cell["select"]["per_sequence"][TEACHER])
        for key, cell in data.cells.items()
        if cell["status"] == "done"
        and cell["bytes"] <= 560_000
        and (kept(cell["select"]) or 0) >= 95
        and (baseline.speedup(cell) or 0) >= 1.3
    }
    assert min(fits, key=fits.__getitem__) in {found.key, *found.ties}
    assert found.command == (
        f"stillhouse export swept --cell {found.key} --format hf --out swept-{found.key}-hf"
    )


def test_a_refusal_names_the_nearest_miss_with_its_numbers() -> None:
    speeds = {"speedup": 2.0, "baseline_decode_tokens_per_s": 10.0, "decode_tokens_per_s": 20.0}
    cells = {"a": cell(0.01, 900_000, **speeds), "b": cell(0.1, 500_000, **speeds)}
    found = recommend(run_of(cells), max_mb=0.45, min_speed=1.5)
    assert found.key is None and found.command is None
    assert found.refused == (
        "run: no cell of 2 fits --max-mb 0.45 and --min-speed 1.5; the nearest is b: 0.500 MB "
        "misses --max-mb 0.45 (and has 2.0x); loosen what it misses"
    )
    assert in_words(found) == [found.refused]
    unknown = recommend(run_of({"a": cell(0.01, 900_000)}), min_speed=1)
    assert "what was not measured misses --min-speed 1" in str(unknown.refused)
    assert recommend(run_of({})).refused == "run: it has no cells"
    old = {"status": "done", "bytes": 5, "kl_to_student": 0.1}
    assert "run its sweep again" in str(recommend(run_of({"old": old})).refused)
    assert front_keys({"old": old}) == {"old"}  # nothing is known against it


@pytest.mark.parametrize("limit", ["max_mb", "min_retention", "min_speed"])
def test_limits_that_are_not_above_0_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"--{limit.replace('_', '-')} 0: must be above 0"):
        recommend(run_of({}), **{limit: 0.0})


def test_the_16_bit_student_is_told_of_where_it_fits() -> None:
    student = {"bytes": 1_200_000}
    data = run_of({"a": cell(0.01, 900_000)}, student=student)
    data.spec["distill"] = {"steps": 3}
    fits = "No quantization is needed for this: the 16-bit student takes 1.20 MB"
    assert any(fits in line for line in recommend(data, max_mb=1.2).why)
    assert not any(fits in line for line in recommend(data, max_mb=1.19).why)
    assert not any(fits in line for line in recommend(data).why)
    alone = recommend(data, max_mb=1.2, min_retention=99.95)  # what no cell keeps, it keeps
    assert alone.key is None and fits in alone.why[0]


def test_a_model_that_was_not_kept_is_told(data: RunData) -> None:
    gone = run_of({"a": cell(0.01, 900_000, model_kept=False)})
    assert any("keep_models" in line for line in recommend(gone).why)


def test_cells_of_student_and_teacher_are_compared_in_kl_to_the_teacher(data: RunData) -> None:
    found = recommend(data, max_mb=6)
    best = min(
        (cell for cell in data.cells.values() if cell["status"] == "done"),
        key=lambda cell: sum(cell["select"]["per_sequence"]["kl_to_teacher"]),
    )
    assert data.cells[str(found.key)] is best and best["model"] == "teacher"
    assert any("compared in KL to the teacher" in line for line in found.why)
    # Their speed-ups are against the teacher; the limit is against the student on the same device.
    baseline = Baseline.of(data.cells)
    assert baseline == Baseline("student", {GPU: 400.0})
    assert baseline.speedup(best) == pytest.approx(best["decode_tokens_per_s"] / 400)
    assert baseline.speedup({**best, "device_name": "another"}) is None
    student = recommend(data, max_mb=6, models=("student",))
    assert str(student.key).startswith("hqq-8b") and "to the 16-bit student" in student.why[0]


def test_retention_is_paired_over_sequences() -> None:
    own, reference = [40.0, 30.0, 20.0, 9.0], [41.0, 30.0, 21.0, 10.0]
    each = {"tokens": [100.0] * 4, "correct": own, "reference_correct": reference}
    found = retention({"per_sequence": each})
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == kept({"per_sequence": each}) == pytest.approx(100 * 99 / 102)
    assert found.low < found.value < found.high
    # A ratio of sums by the delta method, Student's t with 3 degrees of freedom.
    left = np.asarray(own) - 99 / 102 * np.asarray(reference)
    error = 3.182446 * np.sqrt(4 / 3 * (left**2).sum()) / 102
    assert found.high - found.value == pytest.approx(100 * error, rel=1e-5)
    assert kept({"retention": 97.5}) == 97.5 and kept({}) is None


def test_the_loss_is_the_sum_of_its_parts(data: RunData) -> None:
    found = {one.key: one for one in attributions(data)}
    assert set(found) == {"student"} | {
        key for key, cell in data.cells.items() if cell["status"] == "done"
    }
    for one in found.values():
        assert one.teacher is not None
        parts = sum(part.value for part in (one.distilled, one.quantized) if part is not None)
        assert one.teacher + parts == pytest.approx(one.total, abs=1e-12)
    student = found["student"].distilled
    assert student is not None and student.low is not None and student.high is not None
    truth = data.evaluations["student"]["nll"] - data.evaluations["teacher"]["nll"]
    assert student.value == pytest.approx(truth) and student.low < truth < student.high
    assert found["student"].quantized is None and found["teacher-hqq-4b-g64"].distilled is None


def test_other_texts_are_not_compared(data: RunData) -> None:
    a, b = data.cells["hqq-4b-g64"], data.cells["hqq-3b-g64"]
    assert paired(a, b, "nll") is not None
    assert paired({**a, "data_hash": "1"}, {**b, "data_hash": "2"}, "nll") is None
    assert paired(a, None, "nll") is None and paired(a, b, "unknown") is None
    less = reduction(b, a, "kl_to_reference")
    sums = [np.sum(x["per_sequence"]["kl_to_reference"]) for x in (a, b)]
    assert less is not None and less.value == pytest.approx(1 - sums[0] / sums[1])


def test_four_ways_with_what_they_cost(data: RunData) -> None:
    found = routes(data)
    assert [one.name for one in found] == [
        "teacher", "quantized teacher", "student", "quantized student",
    ]  # fmt: skip
    teacher, quantized, student, both = found
    assert (teacher.hours, teacher.kl, teacher.retention) == ({}, 0.0, 100.0)
    assert quantized.hours == {"gpu": 0.02} and student.hours == {"gpu": 2.5}
    more = 2.5 + data.cells[both.key]["device_hours"]
    assert both.hours == {"gpu": pytest.approx(more)}
    assert hours_in_words({"gpu": 2.5, "cpu": 0.05}) == "2.5 GPU hours + 3.0 CPU core minutes"
    told = answer(data, found)
    assert told.startswith(f"Do both for size: {both.key} (") and quantized.key in told
    # What loses in both is not recommended for anything.
    small = {**data.cells[quantized.key], "bytes": 1000}
    better = RunData(
        "r", "u", data.spec, data.events, data.evaluations,
        {quantized.key: small, both.key: data.cells[both.key]},
    )  # fmt: skip
    assert answer(better, routes(better)).startswith(f"Quantize only: {quantized.key} (0.00100 MB")
    alone = RunData(
        "r", "u", data.spec, data.events, data.evaluations, {both.key: data.cells[both.key]}
    )
    assert routes(alone) == []


def test_the_control_is_no_part_of_what_the_student_cost(tmp_path: Path) -> None:
    from cluster.storage import Attempt, EventWriter

    run = swept_run(tmp_path)
    with EventWriter(run, Attempt.claim(run).number) as events:
        for stage, seconds in (("distill", 300.0), ("control", 100.0)):
            events.emit("training_done", stage=stage, metrics={"worker_seconds": seconds})
    student = routes(load_run(run))[2]
    assert student.hours == {"gpu": pytest.approx(0.5 + 0.75 * 2.0)}
