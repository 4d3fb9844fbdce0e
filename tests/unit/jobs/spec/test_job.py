"""The rules across sections: each broken one is one line that names the key."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.errors import SpecErrors
from jobs.spec.job import JobSpec, is_hub_id, rule_faults
from jobs.spec.load import spec_of

GOOD: dict[str, Any] = {
    "name": "a-run",
    "teacher": {"model": "org/big"},
    "student": {"model": "org/small"},
    "data": {"train": [{"source": "texts/*.txt"}], "sequence_length": 64},
    "distill": {"tokens_per_step": 640},
}
SCRATCH = {"config": {"model_type": "llama"}, "init": "random"}


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with changes; keys are written with __ for the dot."""
    data = deepcopy(GOOD)
    for key, value in changes.items():
        *sections, last = key.split("__")
        part = data
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    return data


def faults(**changes: Any) -> list[str]:
    with pytest.raises(SpecErrors) as caught:
        spec_of(changed(**changes))
    return caught.value.faults


def test_a_sound_spec_has_the_defaults_of_its_floors() -> None:
    spec = spec_of(GOOD)
    assert (spec.seed, spec.storage, spec.tokenizer) == (17, "./runs", None)
    assert spec.sweep is not None and spec.sweep.bits == [8, 4, 3, 2]
    assert spec.tracking.mode == "auto" and spec.tracking.project == "stillhouse"
    assert (spec.cache.method, spec.cache.draws, spec.cache.redraws) == ("sample", 50, 1)
    assert spec.resources.max_failures == 3
    with pytest.raises(ValidationError):
        spec.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["a", "qwen3-8b_to.06", "0x", "a" * 63])
def test_plain_names(name: str) -> None:
    assert spec_of(changed(name=name)).name == name


@pytest.mark.parametrize("name", ["", "_corpora", "Run", "a/b", "a b", "..", "-a", "a\n", "a" * 64])
def test_other_names_are_refused(name: str) -> None:
    (line,) = faults(name=name)
    assert line.startswith("name: got ")
    assert line.endswith(
        "; may be 1 to 63 lower-case letters, digits, '.', '_' and '-', "
        "the first a letter or a digit"
    )


CHATS = [{"source": "chats.jsonl", "format": "messages"}]
ANSWERED: dict[str, Any] = {
    "distill__mode": "responses",
    "data__train": CHATS,
    "responses": {"from": "teacher"},
}
SERVER = {"from": {"endpoint": "http://here/v1", "model": "big"}}
ALONE = {"teacher": None, "distill__losses": {"ce": 1.0}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"distill__tokens_per_step": 1000},
            "distill.tokens_per_step: got 1000; may be a multiple of data.sequence_length (64), "
            "e.g. 1024",
        ),
        (
            {"distill__tokens_per_step": 1},
            "distill.tokens_per_step: got 1; may be a multiple of data.sequence_length (64), "
            "e.g. 64",
        ),
        (
            {"data__max_tokens": 63},
            "data.max_tokens: got 63; may be auto or a whole number from data.sequence_length (64)",
        ),
        (
            {"distill__temperature": 2.0, "cache": {"method": "topk", "temperatures": [1.0, 4]}},
            "distill.temperature: got 2.0; may be one of cache.temperatures (1.0, 4.0)",
        ),
        (
            {"distill__temperature": 2.0, "cache": {"method": "sample", "draws": 20}},
            "distill.temperature: got 2.0; may be 1 with cache.method: sample; others need method: "
            "topk, which keeps the tails of cache.temperatures",
        ),
        (
            {"teacher__sharding": "zero3", "resources": {"capture": {"workers": 1}}},
            "teacher.sharding: got zero3 with resources.capture.workers: 1; may be none or auto, "
            "or give at least 2 workers",
        ),
        (
            {"teacher": None},
            "distill.losses: forward_kl needs a teacher; give teacher: {model: ...}, or train "
            "without one: losses: {ce: 1.0}",
        ),
        (
            {**ALONE, "distill__control": True},
            "distill.control: got true; may be false without a teacher, whose gain it measures",
        ),
        (
            {"distill__control": True, "distill__losses": {"ce": 1.0, "forward_kl": 0}},
            "distill.control: got true; may be false without a loss to the teacher in "
            "distill.losses, as the student is then the control",
        ),
        (
            {"distill": None, "student__init": "random"},
            "student.init: got random; may be pretrained with distill: null, "
            "which sweeps student.model as it is",
        ),
        (
            {"distill": None, "sweep": None},
            "distill: null and sweep: null leave nothing to do; give one of them",
        ),
        (
            {"data": None},
            "data: got null; needed by distill and sweep, "
            "e.g. data: {train: [{source: builtin:python-docs}]}",
        ),
        (
            {"data": None, "distill": None},
            "data: got null; needed by sweep, e.g. data: {train: [{source: builtin:python-docs}]}",
        ),
        (
            {"tokenizer": {"train": 300}},
            "tokenizer.train: may not be given with a teacher, whose vocabulary the student must "
            "have; remove tokenizer",
        ),
        (
            {**ALONE, "tokenizer": {"train": 300}},
            "tokenizer.train: may not be given with student.init: pretrained, whose weights "
            "belong to the model's own vocabulary; remove tokenizer",
        ),
        (
            {**ALONE, "student": SCRATCH},
            "tokenizer: got null; needed where neither teacher nor student.model brings one, "
            "e.g. tokenizer: {train: 2048}",
        ),
        (
            {
                **ALONE,
                "student": SCRATCH,
                "tokenizer": {"train": 300},
                "data__train": [{"source": "a"}, {"source": "b", "format": "input_ids"}],
            },
            "data.train.1.format: got input_ids; may be text with tokenizer.train, "
            "which learns from text",
        ),
        (
            {
                "teacher__sharding": "zero3",
                "distill__mode": "online",
                "resources": {"distill": {"workers": 1}},
            },
            "teacher.sharding: got zero3 with resources.distill.workers: 1; may be none or auto, "
            "or give at least 2 workers",
        ),
        (
            {
                "teacher__sharding": "zero3",
                "distill__mode": "online",
                "resources": {"distill": {"workers": [1, 4]}},
            },
            "teacher.sharding: got zero3 with resources.distill.workers: [1, 4]; may be none or "
            "auto, or give at least 2 workers",
        ),
        (
            {"distill__losses": {"jsd": 1.0}},
            "distill.losses.jsd: may not be used with cache.method: sample, whose draws would bias "
            "it, as it is not linear in the teacher's distribution; may be forward_kl, or use "
            "cache: {method: topk} or distill.mode: online",
        ),
        (
            {"distill__losses": {"forward_kl": 1, "hidden": 0.1}},
            "distill.losses.hidden: got distill.mode: cached; may be used with mode: online, as a "
            "cache holds no hidden states",
        ),
        (
            {**ALONE, "distill__mode": "online"},
            "distill.mode: got online without a teacher; may be cached, or give teacher",
        ),
        (
            {"distill__mode": "online", "distill__losses": {"ce": 1.0}},
            "distill.mode: got online without a loss to the teacher in distill.losses; may be "
            "cached",
        ),
        (
            {**ALONE, "student": {"init": "slice", "layers": 2}, "tokenizer": {"train": 300}},
            "student.init: got slice without a teacher, whose layers it keeps; may be pretrained "
            "or random, or give teacher",
        ),
        (
            {"student": {**SCRATCH, "lora": {}}},
            "student.lora: may not be given with student.init: random, as adapters cannot make up "
            "for weights that know nothing; remove lora, or start from pretrained",
        ),
        (
            {"distill": None, "student__lora": {"r": 4}},
            "student.lora: may not be given with distill: null, which trains nothing; remove it",
        ),
        (
            {"distill": None, "student": {"init": "slice", "layers": 2}},
            "student.init: got slice; may be pretrained with distill: null, which sweeps "
            "student.model as it is",
        ),
        (
            {"distill__mode": "responses", "data__train": CHATS},
            "responses: got null; needed by distill.mode: responses, e.g. {from: teacher}",
        ),
        (
            {"responses": {"from": "teacher"}},
            "responses: may not be given with distill: {mode: cached}; set distill.mode: "
            "responses, or remove it",
        ),
        (
            {**ANSWERED, "data__train": [{"source": "texts/*.txt"}]},
            "data.train.0.format: got text; may be messages or prompt_completion with "
            "distill.mode: responses, which takes the prompts from them",
        ),
        (
            {**ANSWERED, **ALONE},
            "responses.from: got teacher, and there is none; give teacher, {file: ...} or "
            "{endpoint: ..., model: ...}",
        ),
        (
            {**ANSWERED, "responses": {"from": {"file": "a.jsonl"}}},
            "data.train: may be [] with responses.from: {file: ...}, as prompts and answers come "
            "from that file",
        ),
        (
            {**ANSWERED, "responses": {"temperature": 0, "samples": 2}},
            "responses.samples: got 2; may be 1 with temperature: 0, where all answers to a prompt "
            "are the same",
        ),
        (
            {"teacher__revision": "v2", "teacher__model": "./big"},
            'teacher.revision: got "v2"; only hub ids have revisions, teacher.model is "./big"',
        ),
        (
            {"student__revision": "v2", "student__model": "s3://b/small"},
            'student.revision: got "v2"; only hub ids have revisions, '
            'student.model is "s3://b/small"',
        ),
    ],
)
def test_a_broken_rule_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert faults(**changes) == [line]


@pytest.mark.parametrize(
    "changes",
    [
        ALONE,
        {**ALONE, "student": SCRATCH, "tokenizer": {"train": 300}},
        {**ALONE, "student": {"model": "org/s", "init": "random"}, "tokenizer": {"train": 300}},
        {"student": SCRATCH},  # the teacher's tokenizer
        {"distill": None},
        {"distill": None, "teacher": None},
        {"sweep": None},
        {"distill__losses": {"ce": 1.0}},  # the teacher still judges
        {"distill__control": True},
        {"distill__temperature": 2, "cache": {"method": "topk", "temperatures": [1, 2]}},
        {"cache": {"draws": 20, "redraws": 4, "seed": 3}},
        {"cache": {"method": "topk", "k": 64}},
        {"data__max_tokens": 64},
        {"distill__mode": "online", "distill__temperature": 3.0},
        {"teacher__sharding": "zero3", "resources": {"distill": {"workers": 1}}},
        {"distill__mode": "online", "distill__losses": {"jsd": {"beta": 0.2}, "hidden": 0.1}},
        {"distill__losses": {"reverse_kl": 1, "skew_kl": 1}, "cache": {"method": "topk"}},
        {"student": {"init": "slice", "layers": 2, "lora": {"r": 4}}},
        ANSWERED,
        {**ANSWERED, "distill__losses": {"ce": 1.0}, "teacher": None, "responses": SERVER},
        {**ANSWERED, "responses": {"from": {"file": "a.jsonl"}}, "data__train": []},
        {"teacher__revision": "v2"},
        {"student__model": "gpt2", "student__revision": "v2"},
    ],
)
def test_what_the_rules_allow(changes: dict[str, Any]) -> None:
    assert spec_of(changed(**changes)).name == "a-run"


def test_several_broken_rules_are_all_told() -> None:
    lines = faults(
        distill__tokens_per_step=100,
        distill__temperature=3,
        teacher__model="/x",
        data__max_tokens=9,
    )
    assert [line.partition(":")[0] for line in lines] == [
        "distill.tokens_per_step",
        "data.max_tokens",
        "distill.temperature",
    ]


def test_rules_hold_without_the_loader_too() -> None:
    with pytest.raises(ValidationError, match="may be a multiple of data.sequence_length"):
        JobSpec.model_validate(changed(distill__tokens_per_step=100))


def test_rules_about_keys_at_fault_are_left_out() -> None:
    sections: dict[str, Any] = {"teacher": None, "distill": None, "sweep": None, "data": None}
    spec = JobSpec.model_construct(None, **sections)
    assert rule_faults(spec, ["distill", "teacher", "student", "tokenizer"]) == []
    assert rule_faults(spec, ["teacher", "student", "tokenizer", "distill.steps"]) == [
        "distill: null and sweep: null leave nothing to do; give one of them"
    ]


@pytest.mark.parametrize(
    ("model", "hub"),
    [
        ("gpt2", True),
        ("Qwen/Qwen3-0.6B", True),
        ("./x", False),
        ("../x", False),
        ("/x/y", False),
        ("~/x", False),
        ("a/b/c", False),
        ("s3://bucket/x", False),
    ],
)
def test_hub_ids(model: str, hub: bool) -> None:
    assert is_hub_id(model) is hub


def test_every_key_is_described_and_bounds_of_auto_keys_hold() -> None:
    def check(model: Any) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert field.description.endswith("."), f"{model.__name__}.{name}"
            kinds = getattr(field.annotation, "__args__", (field.annotation,))
            for kind in kinds:
                if hasattr(kind, "model_fields"):
                    check(kind)

    check(JobSpec)
    # Bounds used to be compared with the text "auto" when it was written out.
    for key in ("data__max_tokens", "distill__micro_batch", "distill__learning_rate"):
        assert spec_of(changed(**{key: "auto"}))
    workers = {"workers": "auto", "gpus_per_worker": "auto", "cpus_per_worker": "auto"}
    cells = {"gpus_per_cell": "auto", "cpus_per_cell": "auto"}
    assert spec_of(changed(resources={"capture": workers, "distill": workers, "sweep": cells}))


def test_importing_the_spec_stays_light() -> None:
    code = (
        "import sys, jobs.spec.job, jobs.spec.load, jobs.spec.load, jobs.spec.init; "
        "print([m for m in ('torch', 'transformers', 'ray', 'datasets', 'wandb') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
