"""Reading a spec: YAML, overrides, and exactly one line for each thing that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import SpecErrors
from jobs.spec.load import dump_spec, find_spec, json_schema, load_spec, recipes, spec_of
from trainer.spec.yaml import as_yaml, parse

GOOD = """\
name: a-run
teacher: {model: org/big}
student: {model: org/small}
data: {train: [{source: "texts/*.txt"}]}
"""

LOSS = "a number from 0, a section (weight) or null"
ORIGIN = (
    "teacher, a section (file) or a section (endpoint, model, api_key_env, requests_per_minute, "
    "concurrency)"
)
SOURCES = "a list, each a section (source, format, column, split, ...)"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD)
    return path


def faults(path: Path | str, *overrides: str) -> list[str]:
    """The faults of a spec; none of them may be longer than a line."""
    with pytest.raises(SpecErrors) as caught:
        load_spec(path, list(overrides))
    assert all(len(line.splitlines()) == 1 for line in caught.value.faults)
    return caught.value.faults


def faults_of(file: Path, text: str) -> list[str]:
    file.write_text(text)
    return [line.replace(str(file), "F") for line in faults(file)]


# -- one line for each fault of a value --------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("distill.steps=0", "distill.steps: got 0; may be a whole number from 1"),
        ("distill.steps=1.5", "distill.steps: got 1.5; may be a whole number from 1"),
        ("distill.steps=many", 'distill.steps: got "many"; may be a whole number from 1'),
        ("distill.steps=true", "distill.steps: got true; may be a whole number from 1"),
        ("distill.steps=", "distill.steps: got null; may be a whole number from 1"),
        (
            "distill.micro_batch=0",
            "distill.micro_batch: got 0; may be auto or a whole number from 1",
        ),
        (
            "distill.micro_batch=all",
            'distill.micro_batch: got "all"; may be auto or a whole number from 1',
        ),
        (
            "distill.learning_rate=0",
            "distill.learning_rate: got 0; may be auto or a number above 0",
        ),
        (
            "distill.learning_rate=.nan",
            "distill.learning_rate: got NaN; may be auto or a number above 0",
        ),
        (
            "distill.max_grad_norm=.inf",
            "distill.max_grad_norm: got Infinity; may be a number above 0",
        ),
        (
            "distill.warmup_ratio=1",
            "distill.warmup_ratio: got 1; may be a number from 0 to below 1",
        ),
        ("distill.zero_stage=4", "distill.zero_stage: got 4; may be 1, 2 or 3"),
        ("distill.zero_stage=true", "distill.zero_stage: got true; may be 1, 2 or 3"),
        ("distill.control=maybe", 'distill.control: got "maybe"; may be true or false'),
        ("distill={betas: [0.9, 1]}", "distill.betas.1: got 1; may be a number from 0 to below 1"),
        (
            "distill.betas=[0.9]",
            "distill.betas: got [0.9]; may be a list of 2, each a number from 0 to below 1",
        ),
        (
            "distill.losses.kl=1",
            "distill.losses.kl: unknown key; may be forward_kl, reverse_kl, jsd, skew_kl, ce "
            "or hidden",
        ),
        ("distill.losses.ce=x", f'distill.losses.ce: got "x"; may be {LOSS}'),
        ("distill.losses.ce=-1", f"distill.losses.ce: got -1; may be {LOSS}"),
        ("distill.losses.ce=true", f"distill.losses.ce: got true; may be {LOSS}"),
        (
            "distill.losses={ce: 0}",
            "distill.losses: needs at least one loss with a weight above 0, of forward_kl, "
            "reverse_kl, jsd, skew_kl, ce, hidden",
        ),
        (
            "distill.losses=3",
            "distill.losses: got 3; may be a section (forward_kl, reverse_kl, jsd, skew_kl, ...)",
        ),
        (
            "distill.losses={jsd: {beta: 1}}",
            "distill.losses.jsd.beta: got 1; may be a number above 0 to below 1",
        ),
        (
            "distill.losses={jsd: {b: 1}}",
            "distill.losses.jsd.b: unknown key; may be weight or beta",
        ),
        (
            "distill.losses={ce: {weight: x}}",
            'distill.losses.ce.weight: got "x"; may be a number from 0 or a section '
            "(start, end, until, shape)",
        ),
        (
            "distill.losses={ce: {weight: {start: 1}}}",
            "distill.losses.ce.weight.end: missing; may be a number from 0",
        ),
        (
            "distill.losses={ce: {weight: {start: 1, end: true}}}",
            "distill.losses.ce.weight.end: got true; may be a number from 0",
        ),
        (
            "distill={mode: online, losses: {hidden: {layers: [[0, -1]]}}}",
            "distill.losses.hidden.layers.0.1: got -1; may be a whole number from 0",
        ),
        (
            "distill={mode: online, losses: {hidden: {layers: [[0]]}}}",
            "distill.losses.hidden.layers.0: got [0]; may be a list of 2, each a whole number "
            "from 0",
        ),
        (
            "student.lora.targets=[]",
            "student.lora.targets: got []; may be auto or a list, not empty, each text, not empty",
        ),
        (
            "distill.evaluate_steps=0",
            "distill.evaluate_steps: got 0; may be auto, a whole number from 1 or null",
        ),
        ("cache.k=5000", "cache.k: got 5000; may be a whole number from 1 to 4096"),
        ("cache.method=both", 'cache.method: got "both"; may be sample or topk'),
        ("cache.draws=0", "cache.draws: got 0; may be a whole number from 1 to 4096"),
        ("cache.step=1", "cache.step: got 1; may be auto or a number from 0.001 to 0.1"),
        ("cache.remap=no", 'cache.remap: got "no"; may be frequency or none'),
        (
            "cache={method: sample, k: 50}",
            "cache: k is for method: topk, and this cache is of method: sample; remove k or "
            "change the method",
        ),
        (
            "cache={method: topk, redraws: 2}",
            "cache: redraws is for method: sample, and this cache is of method: topk; remove "
            "redraws or change the method",
        ),
        # Its default was topk once: a key of topk without a method is no cache of draws.
        (
            "cache={k: 64}",
            "cache: k is for method: topk, and this cache is of method: sample; remove k or "
            "change the method",
        ),
        ("cache.temperatures=[0]", "cache.temperatures.0: got 0; may be a number above 0"),
        (
            "cache.temperatures=[1, 1]",
            "cache.temperatures: got [1, 1]; repeated temperatures in [1.0, 1.0]; list each once",
        ),
        ("cache=null", "cache: got null; may be a section (method, draws, redraws, seed, ...)"),
        ("teacher.dtype=fp16", 'teacher.dtype: got "fp16"; may be auto, bfloat16 or float32'),
        ("teacher.model=", "teacher.model: got null; may be text, not empty"),
        ('teacher.model=""', 'teacher.model: got ""; may be text, not empty'),
        (
            "teacher=org/big",
            'teacher: got "org/big"; may be a section (model, revision, dtype, sharding) or null',
        ),
        ("teacher={}", "teacher.model: missing; may be text, not empty"),
        (
            "student={init: slice}",
            "student.layers: missing; may be how many of the teacher's layers init: slice keeps",
        ),
        (
            "student.layers=2",
            "student.layers: is for init: slice; remove it, or set student.init: slice",
        ),
        ("student={}", "student: needs model (hub id or folder) or config (with init: random)"),
        (
            "student.config=5",
            "student.config: got 5; may be a section, text or null (put it in quotes)",
        ),
        ("name=2024", "name: got 2024; may be text (put it in quotes)"),
        ("storage=", "storage: got null; may be text, not empty"),
        ("seed=-1", "seed: got -1; may be a whole number from 0 to 4294967295"),
        (
            "data.train=[]",
            "data.train: got []; may be a list, not empty, each a section (source, format, "
            "column, split, ...); empty with responses.from: {file: ...} alone",
        ),
        ("data.train=x", f'data.train: got "x"; may be {SOURCES}'),
        ("data.train.0={}", "data.train.0.source: missing; may be text, not empty"),
        ("data.train.0.weight=0", "data.train.0.weight: got 0; may be a number above 0"),
        (
            "data.max_chars=0",
            "data.max_chars: got 0; may be a whole number from 1 or null",
        ),
        (
            "tokenizer.train=256",
            "tokenizer.train: got 256; may be a whole number from 257 to 1048576",
        ),
        ("sweep.bits=8", "sweep.bits: got 8; may be a list, not empty, each a whole number"),
        (
            "sweep.keep_16bit=lm_head",
            'sweep.keep_16bit: got "lm_head"; may be a list, each text, not empty',
        ),
        (
            "sweep.keep_16bit=[8]",
            "sweep.keep_16bit.0: got 8; may be text, not empty (put it in quotes)",
        ),
        ("sweep.bits=[yes]", 'sweep.bits.0: got "yes"; may be a whole number'),
        (
            "sweep.bits=[7]",
            "sweep.bits: got [7]; 7 bits are not offered; may be [8, 6, 5, 4, 3, 2, 1]",
        ),
        (
            "tracking.mode=off",
            'tracking.mode: got "off"; may be auto, online, offline or disabled',
        ),
        ("tracking.tags=[2024]", "tracking.tags.0: got 2024; may be text (put it in quotes)"),
        (
            "resources.sweep.gpus_per_cell=-1",
            "resources.sweep.gpus_per_cell: got -1; may be auto or a number from 0",
        ),
    ],
)
def test_a_wrong_value_is_one_line(file: Path, override: str, line: str) -> None:
    assert faults(file, override) == [line]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "responses.from=x",
            f'responses.from: got "x"; may be {ORIGIN}',
        ),
        (
            "responses.from={endpoint: me, model: a}",
            "responses.from.endpoint: may be an http(s) URL with a host",
        ),
        (
            "responses.from={file: a.jsonl, model: b}",
            "responses.from.model: is not for these keys beside it; responses.from may be "
            + ORIGIN,
        ),
        (
            "responses={origin: teacher}",
            "responses.origin: unknown key; may be from, max_new_tokens, temperature, top_p, "
            "samples or seed",
        ),
        ("responses.samples=0", "responses.samples: got 0; may be a whole number from 1 to 64"),
    ],
)
def test_a_wrong_value_of_responses_is_one_line(file: Path, override: str, line: str) -> None:
    mode = ["distill.mode=responses", "data.train.0.format=messages"]
    assert faults(file, *mode, override) == [line]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("stpes", "did you mean distill.steps or sweep.recover.steps?"),
        ("steps", "did you mean distill.steps or sweep.recover.steps?"),
        ("model", "did you mean teacher.model, student.model or responses.from.model?"),
        ("studnet", "did you mean student?"),
        ("distill.stepz", "did you mean distill.steps?"),
        ("distill.k", "did you mean cache.k?"),
        (
            "cache.temperature",
            "did you mean cache.temperatures, responses.temperature or distill.temperature?",
        ),
        ("distill.workers", "did you mean resources.capture.workers or resources.distill.workers?"),
        ("data.train.0.wieght", "did you mean data.train.0.weight?"),
        ("data.column", "did you mean data.train.0.column?"),
        ("distill.losses.ce.start", "did you mean distill.losses.ce.weight.start?"),
        ("teacher.quantized", "may be model, revision, dtype or sharding"),
    ],
)
def test_an_unknown_key_is_told_with_the_right_one(file: Path, key: str, hint: str) -> None:
    assert faults(file, f"{key}=1") == [f"{key}: unknown key; {hint}"]


def test_everything_wrong_is_told_at_once_rules_too(file: Path) -> None:
    assert faults_of(
        file,
        """\
steps: 5
student: {model: ./x, revision: v2}
teacher: {model: a/b, dtype: fp16}
data: {train: [{source: a, wieght: 2}], sequence_length: 100}
distill: {zero_stage: true, micro_batch: 0, tokens_per_step: 1001, temperature: 2}
sweep: {bits: [8], cells: []}
""",
    ) == [
        "name: missing; may be text",
        'teacher.dtype: got "fp16"; may be auto, bfloat16 or float32',
        "data.train.0.wieght: unknown key; did you mean data.train.0.weight?",
        "distill.zero_stage: got true; may be 1, 2 or 3",
        "distill.micro_batch: got 0; may be auto or a whole number from 1",
        "sweep.cells: unknown key; may be bits, group_size, methods, embeddings, head, exclude, "
        "models, extra, budgets_mb, recover, tasks, keep_models, keep_16bit, dtype, "
        "batch_sequences, speed_prompt_tokens or speed_decode_tokens",
        "steps: unknown key; did you mean distill.steps or sweep.recover.steps?",
        "distill.tokens_per_step: got 1001; may be a multiple of data.sequence_length (100), "
        "e.g. 1000",
        "distill.temperature: got 2.0; may be 1 with cache.method: sample; others need method: "
        "topk, which keeps the tails of cache.temperatures",
        'student.revision: got "v2"; only hub ids have revisions, student.model is "./x"',
    ]


def test_a_fault_makes_no_false_faults(file: Path) -> None:
    # tokens_per_step is no number, so whether it is a multiple cannot be said; neither can a
    # teacher that does not hold be missed by the losses.
    assert faults(file, "distill.tokens_per_step=x", "data.sequence_length=100") == [
        'distill.tokens_per_step: got "x"; may be a whole number from 1'
    ]
    assert faults(file, "teacher={}") == ["teacher.model: missing; may be text, not empty"]
    # One entry at fault: the list as a whole cannot be judged, whatever its default would allow.
    assert faults(file, "cache.temperatures=[0, 2]", "distill.temperature=2") == [
        "cache.temperatures.0: got 0; may be a number above 0"
    ]


# -- YAML --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\n  b: c: d\n", "F:2: not valid YAML: mapping values are not allowed here"),
        (
            "name: a\n\tseed: 1\n",
            "F:2: not valid YAML: found character '\\t' that cannot start any token",
        ),
        ("seed: 1\nname: [a\n", "F:3: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "a: 1\n---\nb: 1\n",
            "F:2: not valid YAML: but found another document",
        ),
        (
            "name: !!python/object:os.system x\n",
            "F:1: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("", "F: is empty; may be a mapping of keys, e.g. name: my-run"),
        ("# nothing\n", "F: is empty; may be a mapping of keys, e.g. name: my-run"),
        ("- a\n", 'F: holds ["a"]; may be a mapping of keys, e.g. name: my-run'),
        ("hello\n", 'F: holds "hello"; may be a mapping of keys, e.g. name: my-run'),
        (
            "a: &a [*a]\n",
            "F: not valid YAML: a part contains itself, or a tag has no such value",
        ),
        (
            "a: !!int x\n",
            "F: not valid YAML: a part contains itself, or a tag has no such value",
        ),
    ],
)
def test_yaml_faults(file: Path, text: str, line: str) -> None:
    assert faults_of(file, text) == [line]


def test_duplicate_keys_are_refused_at_every_depth(file: Path) -> None:
    text = GOOD + "distill:\n  steps: 5\n  zero_stage: 2\n  steps: 6\nname: b\n"
    assert faults_of(file, text) == [
        'F:8: key "steps" is there twice, first on line 6; keep one of them',
        'F:9: key "name" is there twice, first on line 1; keep one of them',
    ]


def test_a_merged_key_is_no_duplicate(file: Path) -> None:
    file.write_text(
        GOOD + "resources:\n  capture: &w {workers: 2, cpus_per_worker: 3}\n"
        "  distill: {<<: *w, workers: 4}\n"
    )
    spec = load_spec(file, ["resources.distill.cpus_per_worker=1"])
    assert (spec.resources.distill.workers, spec.resources.capture.workers) == (4, 2)
    assert spec.resources.capture.cpus_per_worker == 3


def test_an_override_of_an_aliased_section_leaves_the_other_alone(file: Path) -> None:
    file.write_text(GOOD + "resources: {distill: &w {workers: 2}, capture: *w}\n")
    spec = load_spec(file, ["resources.distill.workers=5"])
    assert (spec.resources.distill.workers, spec.resources.capture.workers) == (5, 2)


def test_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert faults(binary) == [f"{binary}: cannot be read: is not UTF-8 text"]
    assert faults(tmp_path) == [f"{tmp_path}: is a folder; may be a YAML file, e.g. {binary}"]
    (tmp_path / "spec.yml").write_text(GOOD)
    (line,) = faults(tmp_path / "spec.yaml")
    assert line.startswith(
        f"{tmp_path}/spec.yaml: no such file; there are {binary}, {tmp_path}/spec.yml; bundled: "
    )
    assert "qwen3-8b-to-0.6b" in line
    (line,) = faults(tmp_path / "no" / "x.yaml")
    assert f"{tmp_path}/no/x.yaml: no such file; no YAML file is there; bundled: " in line


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("2.5e-4", 2.5e-4), ("'1e-3'", 1e-3), (".5", 0.5), ("3", 3.0)],
)
def test_numbers_are_numbers_however_written(file: Path, written: str, value: float) -> None:
    spec = load_spec(file, [f"distill.learning_rate={written}"])
    assert spec.distill is not None and spec.distill.learning_rate == value


def test_scalars_are_those_of_yaml_1_2(file: Path) -> None:
    config = "{a: no, b: 1:30, c: 017, d: 1e6, e: 0x10, f: 2024-01-01, g: True, h: ~, i: 1_000}"
    spec = load_spec(file, [f"student={{init: random, config: {config}}}"])
    assert spec.student.config == {
        "a": "no",
        "b": "1:30",
        "c": "017",
        "d": 1e6,
        "e": 16,
        "f": "2024-01-01",
        "g": True,
        "h": None,
        "i": 1000,
    }


# -- overrides ---------------------------------------------------------------------------------


def test_overrides(file: Path) -> None:
    spec = load_spec(
        file,
        [
            "teacher=null",
            "distill.losses={ce: 1.0}",
            "distill.steps=40",
            "distill.steps=50",
            "sweep.bits=[8,4]",
            "data.train.0.weight=2",
            "tracking.tags=[a, 'b=c']",
            "storage=memory://x?a=b",
        ],
    )
    assert spec.teacher is None and spec.distill is not None and spec.sweep is not None
    assert (spec.distill.steps, spec.sweep.bits) == (50, [8, 4])
    assert spec.data is not None and spec.data.train[0].weight == 2
    assert spec.tracking.tags == ["a", "b=c"] and spec.storage == "memory://x?a=b"


def test_an_override_makes_a_section_of_null_and_reaches_into_a_config(file: Path) -> None:
    assert load_spec(file, ["distill=null", "distill.steps=7"]).distill.steps == 7  # type: ignore[union-attr]
    spec = load_spec(
        file, ["student={init: random}", "student.config.rope.factor=2", "student.config.x=[1]"]
    )
    assert spec.student.config == {"rope": {"factor": 2}, "x": [1]}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "distill.steps",
            'override "distill.steps": may be key=value, e.g. distill.steps=100',
        ),
        ("=5", 'override "=5": may be key=value, e.g. distill.steps=100'),
        ("distill.=5", 'override "distill.=5": may be key=value, e.g. distill.steps=100'),
        ("a b=5", 'override "a b=5": may be key=value, e.g. distill.steps=100'),
        (
            "sweep.bits=[8",
            "override \"sweep.bits=[8\": not valid YAML: expected ',' or ']', "
            "but got '<stream end>'",
        ),
        (
            "data.train.1.weight=2",
            'override "data.train.1.weight=2": data.train has the entries 0 to 0',
        ),
        (
            "data.train.first=2",
            'override "data.train.first=2": data.train has the entries 0 to 0',
        ),
        (
            "distill.betas.0=0.8",
            'override "distill.betas.0=0.8": distill.betas is not in the spec; give all of it',
        ),
        ("name.x=2", 'override "name.x=2": name is "a-run", which has no keys'),
    ],
)
def test_malformed_overrides_are_named(file: Path, override: str, line: str) -> None:
    assert faults(file, override) == [line]


def test_faults_of_overrides_and_spec_come_together(file: Path) -> None:
    assert faults(file, "x", "distill.steps=0") == [
        'override "x": may be key=value, e.g. distill.steps=100',
        "distill.steps: got 0; may be a whole number from 1",
    ]


# -- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["distill.losses={jsd: {weight: 0.5, beta: 0.2}, ce: 1}", "cache.method=topk"],
        ["distill.losses={forward_kl: {weight: {start: 1, end: 0, until: 0.5, shape: cosine}}}"],
        ["distill={mode: online, losses: {forward_kl: 1, hidden: {layers: [[0, 1], [1, 3]]}}}"],
        ["distill.deepspeed={zero_optimization: {reduce_bucket_size: 1e6}}"],
        ["student={init: slice, layers: 3, lora: {targets: [q_proj]}}"],
        ["distill.mode=responses", "data.train.0.format=messages", "responses={from: teacher}"],
        [
            "distill.mode=responses",
            "data.train=[]",
            "responses={from: {file: a.jsonl}}",
        ],
        [
            "distill.mode=responses",
            "data.train.0.format=messages",
            "responses={from: {endpoint: http://x/v1, model: m, requests_per_minute: 30}}",
        ],
    ],
)
def test_what_a_run_writes_loads_to_the_same_spec(file: Path, overrides: list[str]) -> None:
    spec = load_spec(file, overrides)
    text = dump_spec(spec)
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(text))
    file.write_text(text)
    assert load_spec(file) == spec
    assert dump_spec(load_spec(file)) == text
    # Losses stand as they would be written, and those that are not used do not.
    if spec.distill is not None and "jsd" in spec.distill.losses.used():
        assert spec.model_dump()["distill"]["losses"] == {
            "jsd": {"weight": 0.5, "beta": 0.2},
            "ce": 1.0,
        }


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_recipes_load_validate_and_round_trip(recipe: str) -> None:
    spec = load_spec(recipe)
    assert find_spec(recipe) == recipes()[recipe]
    jsonschema.Draft202012Validator(json_schema()).validate(
        parse(recipes()[recipe].read_text(), recipe)[0]
    )
    text = dump_spec(spec)
    again = spec_of(yaml.safe_load(text))
    assert again == spec and dump_spec(again) == text


def test_a_file_goes_before_a_recipe_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-70b-to-8b").write_text(GOOD)
    assert load_spec("llama-70b-to-8b").name == "a-run"


def test_dump_has_every_key_in_the_order_of_the_schema(file: Path) -> None:
    data = yaml.safe_load(dump_spec(load_spec(file)))
    properties: dict[str, Any] = json_schema()["properties"]
    assert list(data) == list(properties)
    assert list(data["distill"]) == list(json_schema()["$defs"]["DistillSpec"]["properties"])


@pytest.mark.parametrize(
    "cache",
    [
        "{}",
        "{draws: 20, redraws: 3}",
        "{method: topk, k: 64}",
        "{method: topk, k: 64, keep: 0.86, step: 0.02, temperatures: [1.0, 2.0]}",
    ],
)
def test_the_cache_of_a_run_loads_again(file: Path, tmp_path: Path, cache: str) -> None:
    """The dump has the keys of both methods; those of the other one are no contradiction."""
    file.write_text(GOOD + f"cache: {cache}\n")
    spec = load_spec(file)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_spec(spec))
    assert load_spec(path) == spec
    assert load_spec(path).cache.identity() == spec.cache.identity()


def test_schema_refuses_what_the_loader_refuses() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    good = yaml.safe_load(GOOD)
    assert validator.is_valid(good)
    for wrong in (
        {**good, "steps": 5},
        {**good, "name": "_x"},
        {**good, "distill": {"micro_batch": 0}},
        {**good, "cache": {"temperatures": [0]}},
        {**good, "student": None},
    ):
        assert not validator.is_valid(wrong)


TRICKY = [
    "1e3",
    "no",
    "null",
    "017",
    "1:30",
    "2024-01-01",
    "a: b",
    "#x",
    "",
    " x",
    "x\ny",
    "é",
    "~",
]


@pytest.mark.parametrize("text", TRICKY)
def test_text_is_quoted_where_a_reader_would_take_it_for_something_else(
    file: Path, text: str
) -> None:
    scalar = as_yaml(text)
    file.write_text(GOOD + f"tracking: {{tags: [{scalar}]}}\n")
    spec = load_spec(file)
    assert spec.tracking.tags == [text]
    assert yaml.safe_load(dump_spec(spec))["tracking"]["tags"] == [text]


SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
CONFIGS = st.dictionaries(
    st.text(), st.recursive(SCALARS, lambda x: st.lists(x, max_size=3), max_leaves=6), max_size=4
)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS)
def test_any_config_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]
) -> None:
    data = {**yaml.safe_load(GOOD), "student": {"config": config, "init": "random"}}
    spec = spec_of(data)
    path = tmp_path_factory.mktemp("round") / "spec.yaml"
    path.write_bytes(dump_spec(spec).encode("utf-8"))
    assert load_spec(path) == spec
