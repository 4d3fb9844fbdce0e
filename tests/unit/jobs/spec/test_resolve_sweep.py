"""Group sizes that nobody chose divide the layers of the models that are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.spec.job import JobSpec
from jobs.spec.load import spec_of
from jobs.spec.resolve import resolve_group_sizes, single_group_size
from quant.quant_spec import CHANNEL, GroupSize, QuantSpec
from tests.fixtures.corpora import save_model
from trainer.corpus.tokenizer import train_tokenizer
from trainer.stage_inputs import identities


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by width: in `wide` layers of 128 and 256 inputs, in `narrow` of 48 and 96."""
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer(["a"], 258, folder / "tokenizer")
    for name, width in (("wide", 128), ("narrow", 48)):
        save_model(folder / name, folder / "tokenizer", width=width)
    return folder


def job(models: Path, **changes: Any) -> JobSpec:
    return spec_of(
        {
            "name": "a-run",
            "storage": str(models / "runs"),
            "teacher": {"model": str(models / "wide")},
            "student": {"model": str(models / "narrow")},
            "data": {"train": [{"source": "builtin:python-docs"}]},
            "distill": None,
            **changes,
        }
    )


def sizes(spec: JobSpec) -> Any:
    resolved = resolve_group_sizes(spec, identities(spec))
    assert resolved.sweep is not None
    return resolved.sweep.group_size


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"models": ["teacher"]}, [64, 128]),
        ({}, [8, 16]),  # of the student: 48 = 3 x 16
        ({"models": ["student", "teacher"]}, [8, 16]),
        ({"models": ["teacher"], "keep_16bit": ["*.down_proj"]}, [64, 128]),
        ({"group_size": [128]}, [128]),
        ({"group_size": ["channel"]}, ["channel"]),
    ],
)
def test_sizes_divide_the_layers_of_all_models_of_the_grid(
    models: Path, sweep: dict[str, Any], expected: list[GroupSize]
) -> None:
    assert sizes(job(models, sweep=sweep)) == expected


def test_what_stays_in_16_bits_need_not_be_divided(models: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 72,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    job_of = {"student": {"init": "random", "config": config}, "distill": {}}
    assert sizes(job(models, **job_of)) == [8]
    kept = {"keep_16bit": ["*.down_proj"]}
    assert sizes(job(models, **job_of, sweep=kept)) == [64, 128]


def test_a_model_that_cannot_be_read_leaves_auto_to_the_checks(models: Path) -> None:
    spec = job(models, student={"model": str(models / "missing")})
    assert sizes(spec) == "auto"


def test_a_spec_without_a_sweep_is_left_alone(models: Path) -> None:
    spec = job(models, sweep=None, distill={})
    assert resolve_group_sizes(spec, identities(spec)) == spec


@pytest.mark.parametrize(("name", "size"), [("wide", 64), ("narrow", 16)])
def test_a_single_model_has_64_or_the_largest_that_divides(
    models: Path, name: str, size: int
) -> None:
    folder = models / name
    assert single_group_size(folder, QuantSpec(4, 64), {}) == size
    dynamic = QuantSpec(8, CHANNEL, "int8-dynamic")
    assert single_group_size(folder, dynamic, {}) == CHANNEL


def test_a_layer_that_stays_in_16_bits_does_not_count(models: Path) -> None:
    all_but_mlp = {"*.mlp.*": QuantSpec(8, 8), "*.self_attn.*": None}
    assert single_group_size(models / "narrow", QuantSpec(4, 64), all_but_mlp) == 16
