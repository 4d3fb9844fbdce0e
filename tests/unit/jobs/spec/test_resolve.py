"""What a spec comes to before anything runs: autos, jobs, and what these depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Store, open_store
from jobs.run.inputs import ResolvedJob
from jobs.spec.job import JobSpec
from jobs.spec.load import spec_of
from jobs.stages import capture, distill, prepare
from trainer.processor import DtypeName
from trainer.resolve_auto import resolve
from trainer.stage_inputs import train_sequences, training_folders
from trainer.tasks import make_capture, make_trainings
from trainer.training.unfinished import unfinished_faults, unfinished_trainings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher and a student as far as identities look at them: no weights are loaded."""
    for name, width, layers in (("big", 64, 4), ("small", 32, 2)):
        place = tmp_path / name
        place.mkdir()
        config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": layers}
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").write_bytes(name.encode())
        (place / "tokenizer.json").write_text("{}")
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    return tmp_path


def resolved(folder: Path, device: str = "cuda", **changes: Any) -> JobSpec:
    data: dict[str, Any] = {
        "name": "a-run",
        "storage": str(folder / "runs"),
        "teacher": {"model": str(folder / "big")},
        "student": {"model": str(folder / "small")},
        "data": {"train": [{"source": str(folder / "texts.jsonl")}], "sequence_length": 64},
        "distill": {"tokens_per_step": 640, "steps": 100},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        part = data
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    # As on machines that are fast at it, whatever this one is.
    dtypes: dict[str, DtypeName] = dict.fromkeys(("teacher", "distill", "sweep"), "bfloat16")
    return resolve(spec_of(data), dtypes, device)


def fixed(spec: JobSpec) -> dict[str, Any]:
    outputs = {"prepare": {"corpus": "c"}, "capture": {"cache": "k"}}
    return distill.inputs(ResolvedJob.of(spec), outputs).fixed


def autos(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(autos, value.values()))
    return value == "auto"


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 2e-5),
        ({"student__lora": {}}, 2e-4),
        ({"student": {"init": "slice", "layers": 2}}, 1e-4),
        ({"student__init": "random"}, 3e-3),  # 4.9e-3 at width 32 would be over the most
    ],
)
def test_no_auto_is_left_of_a_training(folder: Path, changes: dict[str, Any], rate: float) -> None:
    spec = resolved(folder, **changes)
    assert spec.distill is not None and spec.data is not None
    assert not autos(spec.distill.model_dump()) and not autos(spec.data.model_dump())
    assert spec.distill.learning_rate == rate
    assert (spec.distill.micro_batch, spec.distill.evaluate_steps) == (256, 10)
    assert spec.distill.activation_checkpointing is False
    assert resolve(spec) == spec


def test_large_activations_are_recomputed(folder: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}
    student = {"init": "random", "config": config}
    assert resolved(folder, student=student).distill.activation_checkpointing is True  # type: ignore[union-attr]
    on_cpus = resolved(folder, "cpu", student=student).distill  # which have fewer at a time
    assert on_cpus.activation_checkpointing is False and on_cpus.micro_batch == 8  # type: ignore[union-attr]
    chosen = resolved(folder, student=student, distill__activation_checkpointing=False)
    assert chosen.distill.activation_checkpointing is False  # type: ignore[union-attr]


def test_what_decides_the_weights_is_an_input_of_the_training(folder: Path) -> None:
    base = fixed(resolved(folder))
    for changes in (
        {"distill__losses": {"forward_kl": 0.5, "ce": 0.5}},
        {"distill__losses": {"forward_kl": {"weight": {"start": 1, "end": 0.5}}}},
        {"distill__mode": "online"},
        {"distill__evaluate_steps": 7},
        {"distill__dtype": "float32"},
        {"student__lora": {"r": 4}},
        {"student": {"init": "slice", "layers": 2}},
        {"cache": {"draws": 9, "redraws": 2}},
        {"teacher__dtype": "float32"},
        {"data__train": [{"source": str(folder / "texts.jsonl"), "weight": 2.0}]},
        {"seed": 3},
    ):
        assert fixed(resolved(folder, **changes)) != base, changes
    for changes in (
        {"distill__activation_checkpointing": True},
        {"distill__micro_batch": 1},
        {"distill__zero_stage": 3},
        {"distill__offload": "cpu"},
        {"distill__deepspeed": {"prescale_gradients": True}},
        {"distill__checkpoint_minutes": 3},
        {"distill__keep_checkpoints": 5},
        {"distill__control": True},
        {"resources": {"distill": {"workers": 3}}},
    ):
        assert fixed(resolved(folder, **changes)) == base, changes


def test_settings_of_losses_and_adapters_tell_trainings_apart(folder: Path) -> None:
    cached = {"cache": {"method": "topk"}}
    one = resolved(folder, distill__losses={"jsd": {"beta": 0.2}}, **cached)
    other = resolved(folder, distill__losses={"jsd": {"beta": 0.3}}, **cached)
    assert fixed(one) != fixed(other)
    slices = [resolved(folder, student={"init": "slice", "layers": n}) for n in (2, 3)]
    assert fixed(slices[0]) != fixed(slices[1])
    assert fixed(slices[0])["student.layers"] == 2


def test_a_loss_that_never_counts_changes_nothing(folder: Path) -> None:
    one = resolved(folder, distill__losses={"forward_kl": 1.0})
    other = resolved(folder, distill__losses={"forward_kl": 1.0, "ce": 0})
    assert fixed(one) == fixed(other)
    assert training_folders(one, fixed(one)) == training_folders(other, fixed(other))


def test_the_teacher_decides_only_where_it_teaches_or_is_cut(folder: Path) -> None:
    alone = {"distill__losses": {"ce": 1.0}}
    other = {"teacher__dtype": "float32"}
    assert fixed(resolved(folder, **alone)) == fixed(resolved(folder, **alone, **other))
    sliced = {**alone, "student": {"init": "slice", "layers": 2}}
    assert fixed(resolved(folder, **sliced)) != fixed(resolved(folder, **sliced, **other))


def unfinished(run: Store, name: str, inputs: dict[str, Any] | None, step: int = 40) -> None:
    """A training as it lies on storage after a checkpoint."""
    store = run.sub("checkpoints", name)
    store.write_json(f"{step:08d}-0001-abc.json", {})
    if inputs is not None:
        store.write_json("inputs.json", inputs)


def test_an_unfinished_training_is_not_passed_over(folder: Path) -> None:
    """With another learning rate a training began anew, and said nothing of its checkpoints."""
    before, after = resolved(folder), resolved(folder, distill__learning_rate=0.5)
    run = open_store(folder / "run")
    names = training_folders(before, fixed(before))
    unfinished(run, names["distill"], fixed(before))
    unfinished(run, names["control"], fixed(before), step=7)
    unfinished(run, "something-else", fixed(before))
    assert unfinished_faults(before, fixed(before), run) == []
    faults = unfinished_faults(after, fixed(after), run)
    way_out = (
        "put it back to continue, run with --redo distill to drop it and train anew, or give the "
        "run another name)"
    )
    assert sorted(faults) == sorted(
        f"distill.learning_rate: 2e-05 -> 0.5 (a training of this run is unfinished at step "
        f"{step}; {way_out}"
        for step in (40, 7)
    )
    assert list(unfinished_trainings(after, fixed(after), run)) == [
        f"checkpoints/{names[stage]}" for stage in ("control", "distill")
    ]
    # What is done is told of elsewhere, and what has no checkpoint has nothing to lose.
    for name in names.values():
        run.sub("checkpoints", name).write_json("done/metrics.json", {})
    run.sub("checkpoints", "distill-0123").write_json("inputs.json", fixed(before))
    assert unfinished_faults(after, fixed(after), run) == []
    unfinished(run, "distill-4567", None, step=3)
    (fault,) = unfinished_faults(after, fixed(after), run, "delete {path} to drop it")
    path = folder / "run" / "checkpoints" / "distill-4567"
    assert fault.startswith(f"{path}: a training of this run is unfinished at step 3, of other")
    assert f"delete {path} to drop it" in fault


def test_an_online_training_depends_on_the_teacher_not_on_the_cache(folder: Path) -> None:
    online = {"distill__mode": "online"}
    inputs = fixed(resolved(folder, **online))
    assert "cache" not in inputs and inputs["teacher.dtype"] == "bfloat16"
    assert fixed(resolved(folder, **online, cache={"draws": 9})) == inputs
    assert fixed(resolved(folder, **online, teacher__dtype="float32")) != inputs


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({}, True),
        ({"distill__mode": "online"}, False),
        ({"distill__losses": {"ce": 1.0}}, False),
        ({"distill": None}, False),
    ],
)
def test_only_what_will_be_read_is_captured(
    folder: Path, changes: dict[str, Any], reads: bool
) -> None:
    spec = resolved(folder, **changes)
    store = open_store(folder / "runs")
    task = make_capture(spec, store, store, batch_tokens=64, shard_seconds=1)
    assert (task.distill is not None) is reads
    growing = capture.inputs(ResolvedJob.of(spec), {"prepare": {"corpus": "c"}}).growing
    assert ("distill.steps" in growing) is reads


def test_the_control_learns_from_the_text_alone(folder: Path) -> None:
    losses = {"jsd": 1.0, "hidden": 0.5, "ce": 0.1}
    spec = resolved(folder, distill__mode="online", distill__losses=losses, distill__control=True)
    store = open_store(folder / "runs")
    student, control = make_trainings(spec, fixed(spec), store, store, None)
    assert student.teacher is not None and student.distill.mode == "online"
    assert control.teacher is None and control.distill.mode == "cached"
    assert control.distill.losses.model_dump() == {"ce": 1.0}
    assert control.checkpoints.url != student.checkpoints.url
    assert [job.last.name for job in (student, control)] == ["student-last", "control-last"]
    same = {"mode", "losses"}
    assert control.distill.model_dump(exclude=same) == student.distill.model_dump(exclude=same)


def test_a_control_that_is_cut_from_the_teacher_has_it_to_cut_from(folder: Path) -> None:
    spec = resolved(folder, student={"init": "slice", "layers": 2}, distill__control=True)
    store = open_store(folder / "runs")
    for job in make_trainings(spec, fixed(spec), store, store, None):
        assert job.teacher is not None


def test_answers_of_a_file_are_one_source(folder: Path) -> None:
    answers = folder / "answers.jsonl"
    answers.write_text('{"prompt": "a", "completion": "b"}\n')
    spec = resolved(
        folder,
        distill__mode="responses",
        data__train=[],
        responses={"from": {"file": str(answers)}},
    )
    store = open_store(folder / "runs")
    (job,) = make_trainings(spec, fixed(spec), store, store, None)
    assert [source.weight for source in job.data.train] == [1.0]
    # Other answers are another corpus.
    before = prepare.inputs(ResolvedJob.of(spec), {}).fixed
    answers.write_text('{"prompt": "a", "completion": "c"}\n')
    assert prepare.inputs(ResolvedJob.of(spec), {}).fixed != before


@pytest.mark.parametrize(
    ("changes", "sequences"),
    [
        ({}, 1000),  # 100 steps of 640 tokens in sequences of 64
        ({"data__max_tokens": 640}, 10),
        ({"data__max_tokens": 641}, 11),
        ({"distill": None}, 1),
        ({"distill": None, "sweep__recover": {"steps": 5, "batch_sequences": 4}}, 20),
        ({"distill": None, "data__max_tokens": 640}, 10),
        # A training reads what it reads, also where recovery would read more.
        ({"sweep__recover": {"steps": 500, "batch_sequences": 4}}, 1000),
    ],
)
def test_as_many_sequences_are_prepared_as_are_read(
    folder: Path, changes: dict[str, Any], sequences: int
) -> None:
    spec = resolved(folder, **changes)
    assert train_sequences(spec) == sequences
    inputs = prepare.inputs(ResolvedJob.of(spec), {})
    assert inputs.at_least == {"train_sequences": sequences}
    assert "train_sequences" not in inputs.fixed


def test_sources_that_are_read_unequally_need_more(folder: Path) -> None:
    source = {"source": str(folder / "texts.jsonl")}
    train = [{**source, "weight": weight} for weight in (0.5, 1.0, 2.0)]
    assert train_sequences(resolved(folder, data__train=train)) == 4000
