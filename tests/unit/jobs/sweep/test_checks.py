"""Faults that only files and models can tell, as the command line says them, before Ray starts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from jobs.cli.main import main  # noqa: E402
from tests.fixtures import small_job  # noqa: E402

Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of 64 positions with its tokenizer, where job_spec expects it."""
    from tests.fixtures.corpora import save_model, write_texts
    from trainer.corpus.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("world")
    write_texts(folder / "texts", documents=400)
    texts = (folder / "texts" / "0.jsonl").read_text().splitlines()
    train_tokenizer(iter(texts), 400, folder / "tokenizer")
    save_model(folder / "runs" / "teacher" / "student", folder / "tokenizer", width=64)
    return folder


@pytest.fixture
def faults(teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Run:
    """Runs the job with changes; asserts exit code 2, no Ray, no attempt; returns the lines."""
    monkeypatch.chdir(teacher)

    def run(*overrides: str, **changes: Any) -> list[str]:
        spec = small_job.job_spec(teacher, **{"data__sequence_length": 32, **changes})
        path = small_job.write_spec(spec, teacher)
        capsys.readouterr()  # what fixtures said
        with monkeypatch.context() as without:
            for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
                without.delitem(sys.modules, name)  # of a test before this one
            code = main(["run", str(path), *overrides])
            assert "ray" not in sys.modules
        lines = capsys.readouterr().err.splitlines()
        assert code == 2, lines
        assert all(line.startswith("error: ") for line in lines), lines
        assert not (teacher / "runs" / "job").exists()
        return [line.removeprefix("error: ") for line in lines]

    return run


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0]


def test_group_size_that_does_not_divide_the_layers(faults: Run) -> None:
    line = only(faults("sweep.group_size=[48]"))
    assert line.startswith("sweep.group_size: group_size 48 does not do for layer model.layers.0")
    assert line.endswith("it may be 8, 16, 32 or channel")


def test_group_sizes_that_no_cell_uses_are_not_checked(faults: Run) -> None:
    # 48 divides no layer, but the one cell of int8-dynamic has a scale per channel.
    line = only(faults("sweep.group_size=[48]", "sweep.methods=[int8-dynamic]", "data.train=[]"))
    assert line.startswith("data.train")


def test_one_of_two_tied_ends_of_the_student(faults: Run) -> None:
    tied = "student.config.tie_word_embeddings=true"
    for flag in ("embeddings", "head"):
        line = only(faults(tied, f"sweep.{flag}=true", "sweep.group_size=[48]"))
        assert line.startswith(f"sweep.{flag}: {flag} without "), line
        assert "model.embed_tokens" in line and "lm_head" in line
    line = only(faults(tied, "sweep.embeddings=true", "sweep.head=true", "sweep.group_size=[48]"))
    assert line.startswith("sweep.group_size: group_size 48 does not do")


def test_a_student_with_fused_experts(faults: Run, teacher: Path) -> None:
    from tests.fixtures.model_families import tiny as tiny_model

    folder = teacher / "experts"
    tiny_model("mixtral", vocab_size=400, max_position_embeddings=64).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher / "tokenizer" / file, folder)
    job = {"distill": None, "student": {"model": str(folder)}}
    line = only(faults(**job))
    assert line.startswith("sweep: MixtralForCausalLM has weights that cannot be quantized")
    assert line.endswith("to leave them so knowingly, say sweep.keep_16bit: ['*.experts']")

    experts = "sweep.keep_16bit=['*.experts*']"
    assert only(faults(experts, "data.report_sequences=5000", **job)).startswith("corpus too small")
    line = only(faults(experts, "sweep.group_size=[48]", **job))
    assert line.startswith("sweep.group_size: group_size 48 does not do for layer model.layers.0")
    line = only(faults("sweep.keep_16bit=['*.expert']", **job))
    assert line.startswith("sweep.keep_16bit: '*.expert' matches no layer; there are for example")
    line = only(faults("sweep.keep_16bit=['*.layers.*']", **job))
    assert line == (
        "sweep: MixtralForCausalLM has no layer besides those listed as None: nothing to quantize"
    )


def test_a_student_of_odd_width(faults: Run, teacher: Path) -> None:
    from tests.fixtures.model_families import tiny as tiny_model

    folder = teacher / "odd"
    model = tiny_model("llama", vocab_size=400, max_position_embeddings=64, intermediate_size=100)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher / "tokenizer" / file, folder)
    line = only(faults(distill=None, student={"model": str(folder)}))
    assert line.startswith("sweep: layer model.layers.0.mlp.down_proj is 100 weights wide")
    assert line.endswith("it can only stay in 16 bits, sweep.keep_16bit: ['*.down_proj']")


def test_a_source_that_matches_no_file(faults: Run) -> None:
    line = only(faults(data__train=[{"source": "nowhere/*.jsonl"}]))
    assert line.startswith("data.train.0.source: ") and "nowhere/*.jsonl" in line


def test_a_source_without_the_column(faults: Run, teacher: Path) -> None:
    source = {"source": str(teacher / "texts" / "*.jsonl"), "column": "prose"}
    line = only(faults(data__train=[source]))
    assert line.startswith("data.train.0.column: ") and "prose" in line and "text" in line


def test_teacher_and_student_of_different_vocabularies(faults: Run, teacher: Path) -> None:
    from tests.fixtures.corpora import save_model
    from trainer.corpus.tokenizer import train_tokenizer

    train_tokenizer(iter(["another language " * 50]), 270, teacher / "other-tokenizer")
    save_model(teacher / "other", teacher / "other-tokenizer")
    line = only(faults(student={"model": str(teacher / "other")}))
    assert line.startswith("student.model: ") and "different vocabularies" in line


def test_storage_that_cannot_be_written(faults: Run, teacher: Path) -> None:
    (teacher / "a-file").write_text("")
    line = only(faults(f"storage={teacher}/a-file"))
    assert line.startswith("storage: ") and "a-file" in line


def test_storage_without_permission(faults: Run, teacher: Path) -> None:
    if os.geteuid() == 0:  # root may write everywhere but in the kernel's own folders
        line = only(faults("storage=/proc/runs"))
    else:
        (teacher / "closed").mkdir(mode=0o500)
        line = only(faults(f"storage={teacher}/closed"))
    assert line.startswith("storage: ")


def test_unknown_protocol(faults: Run) -> None:
    assert only(faults("storage=ftpp://host/runs")).startswith("storage: ")


def test_sequence_length_over_the_models_maximum(faults: Run) -> None:
    line = only(faults("data.sequence_length=64"))
    assert line == ("data.sequence_length: 64 is over the teacher's maximum; may be at most 32")


def test_sequence_length_over_the_new_students_own_maximum(faults: Run) -> None:
    line = only(faults("student.config.max_position_embeddings=16"))
    assert line.endswith("is over the student's maximum; may be at most 16")


def test_a_corpus_too_small_for_its_parts(faults: Run) -> None:
    line = only(faults("data.report_sequences=5000"))
    assert "corpus too small" in line and "data.report_sequences" in line


def test_a_model_that_is_no_folder(faults: Run) -> None:
    line = only(faults("teacher.model=./nothing/here"))
    assert line.startswith("teacher.model: './nothing/here' is no folder")


def test_an_unknown_architecture(faults: Run) -> None:
    line = only(faults("student.config.model_type=llamma"))
    assert line.startswith("student.config.model_type: ")


def test_a_size_the_architecture_does_not_know(faults: Run) -> None:
    line = only(faults("student.config.hiden_size=64"))
    assert line.startswith("student.config: ") and "hiden_size" in line


def test_sizes_that_build_no_model(faults: Run) -> None:
    line = only(faults("student.config.hidden_size=30"))
    assert line.startswith(("student.config: ", "sweep.group_size: "))


def test_a_teacher_that_zero3_cannot_shard(faults: Run, teacher: Path) -> None:
    folder = shutil.copytree(teacher / "runs" / "teacher" / "student", teacher / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    line = only(faults(teacher={"model": str(folder), "sharding": "zero3"}))
    assert line.startswith("teacher.sharding: zero3 does not work for a quantized llama")


def test_a_slice_of_more_layers_than_there_are(faults: Run) -> None:
    line = only(faults(student={"init": "slice", "layers": 9}))
    assert line.startswith("student.layers: got 9; may be 1 to 2")


def test_a_lora_target_that_is_no_layer(faults: Run, teacher: Path) -> None:
    model = str(teacher / "runs" / "teacher" / "student")
    line = only(faults(student={"model": model, "lora": {"targets": ["q_porj"]}}))
    assert line.startswith("student.lora.targets: got 'q_porj'") and "q_proj" in line


def test_hidden_layers_that_a_model_does_not_have(faults: Run) -> None:
    losses = {"forward_kl": 1.0, "hidden": {"layers": [[0, 7]]}}
    line = only(faults(distill__mode="online", distill__losses=losses))
    assert line.startswith("distill.losses.hidden.layers: ") and "7" in line


def test_a_deepspeed_key_that_another_key_owns(faults: Run) -> None:
    line = only(faults("distill.deepspeed={zero_optimization: {stage: 3}}"))
    assert line.startswith("distill.deepspeed.zero_optimization.stage: ")
    assert "distill.zero_stage" in line


def test_a_family_that_is_not_verified(faults: Run) -> None:
    line = only(faults("sweep=null", student={"init": "random", "config": {"model_type": "opt"}}))
    assert line.startswith("student.config.model_type: got a model of type opt")
    assert "llama" in line


def test_conversations_without_a_chat_template(faults: Run, teacher: Path) -> None:
    from tests.fixtures.corpora import write_chats

    source = {"source": write_chats(teacher / "chats"), "format": "messages"}
    line = only(faults(data__train=[source]))
    assert line.startswith("data.train.0.format: ") and "chat template" in line


def test_a_file_of_answers_that_is_not_there(faults: Run) -> None:
    changes: dict[str, Any] = {
        "distill__mode": "responses",
        "data__train": [],
        "responses": {"from": {"file": "none.jsonl"}},
    }
    assert only(faults(**changes)).startswith("responses.from.file: no file none.jsonl")


def test_all_faults_are_told_at_once(faults: Run) -> None:
    lines = faults("sweep.group_size=[48]", "data.report_sequences=5000")
    assert len(lines) == 2, lines


def test_only_before_its_stages(faults: Run) -> None:
    assert only(faults("--only", "sweep")).startswith(
        "--only sweep: the stage prepare before it is not done"
    )


def test_a_stage_that_the_spec_does_not_have(faults: Run) -> None:
    line = only(faults("sweep=null", "--until", "sweep"))
    assert line == "--until sweep: this spec has prepare, capture, distill, summarize"
