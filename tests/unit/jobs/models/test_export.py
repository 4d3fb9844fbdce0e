"""export as a user calls it, of cells, artifacts and plain folders; what it prints is true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.storage import open_store
from jobs.cli.main import main
from jobs.models.export import _original
from jobs.run.directory import cells_of
from quant.artifact import load_quantized
from tests.fixtures.corpora import data_spec, make_corpus, save_model, write_texts

KEY = "hqq-4b-g32"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/demo`, a run as the pipeline leaves it: a corpus, a student, a cell with its model, one
    that failed and one whose model is gone."""
    place = tmp_path_factory.mktemp("world")
    storage = open_store(place / "runs")
    corpus = make_corpus(storage.sub("_corpora", "c0"), data_spec(write_texts(place / "texts")))
    run = place / "runs" / "demo"
    save_model(run / "student", corpus.tokenizer_folder(), tied=False)
    record = {"inputs": {"fixed": {}, "growing": {}}, "outputs": {"corpus": "c0"}}
    for name, text in {
        "spec.yaml": "name: demo\nstudent: {model: null, revision: main}\n",
        "state/prepare-0001.json": json.dumps(record),
        f"cells/{KEY}/result.json": json.dumps({"status": "done"}),
        "cells/hqq-1b-g8/result.json": json.dumps({"status": "failed", "error": "not\nfinite"}),
        "cells/hqq-8b-g32/result.json": json.dumps({"status": "done"}),
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    command = ["quantize", str(run / "student"), "--bits", "4", "--group-size", "32"]
    assert main([*command, "--out", str(run / "cells" / KEY / "model")]) == 0
    return place


@pytest.fixture(autouse=True)
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Commands run in a directory of their own with a link to the runs, on one thread."""
    (tmp_path / "runs").symlink_to(world / "runs")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def exported(capsys: pytest.CaptureFixture[str], command: str) -> list[str]:
    """The lines that an export prints."""
    capsys.readouterr()
    assert main(["export", *command.split()]) == 0
    return capsys.readouterr().out.splitlines()


def told(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and not Path("new").exists()
    return line.removeprefix("error: ")


def shown(count: int) -> str:
    return f"{count / 1000:.3g} kB" if count >= 1000 else f"{count} B"


def true_sizes(lines: list[str], folder: Path) -> None:
    """The sizes that are printed are those of the files."""
    there = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}
    assert {line for line in lines if line.startswith("file: ")} == {
        f"file: {name}, {shown(count)}" for name, count in there.items()
    }
    (line,) = (line for line in lines if line.startswith("size: "))
    assert line.startswith(f"size: {shown(sum(there.values()))}, ")


def test_a_cell_becomes_a_gguf_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = exported(capsys, f"demo --cell {KEY} --format gguf --out new")
    file = here / "new" / f"demo-{KEY}.gguf"
    assert lines[0] == f"wrote new/demo-{KEY}.gguf"
    assert lines[1].startswith("format: gguf ") and "Q4_1" in lines[1]
    assert lines[-1] == f"run it: llama-cli -m new/demo-{KEY}.gguf"
    true_sizes(lines, here / "new")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    model = load_quantized(here / "runs/demo/cells" / KEY / "model", prefer="plain")
    name, layer = "blk.1.ffn_down.weight", model.model.layers[1].mlp.down_proj
    held = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
    assert tensors[name].tensor_type.name == "Q4_1"
    np.testing.assert_allclose(held, layer.dequantize(torch.float32).numpy(), atol=2e-3)
    weights = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    (line,) = (line for line in lines if line.startswith("size: "))
    assert line.endswith(f", {8 * file.stat().st_size / weights:.2f} bits per weight")
    assert sum("bits per weight" in line for line in lines) == 1
    fields = gguf.GGUFReader(file).fields
    assert fields["general.name"].contents() == f"demo-{KEY}"


def test_a_cell_becomes_a_folder_chosen_on_the_runs_select_part(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import quant.export.hf.export as hf

    seen: dict[str, Any] = {}
    whole = hf.export_hf

    def keep(model: Any, source: Any, out: Any, calibration: Any, **settings: Any) -> Any:
        seen.update(calibration=calibration, **settings)
        return whole(model, source, out, calibration, **settings)

    monkeypatch.setattr(hf, "export_hf", keep)
    lines = exported(capsys, f"runs/demo --cell {KEY} --format hf --out new")
    corpus = data_spec("*")
    assert seen["calibration"].shape == (corpus.select_sequences, corpus.sequence_length)
    assert seen["calibration"].dtype == torch.int64
    assert Path(seen["original"]).resolve() == (here / "runs/demo/student").resolve()
    true_sizes(lines, here / "new")
    assert lines[0] == "wrote new" and lines[1].startswith("format: compressed-tensors")
    first = lines.index("KL of the 16-bit model, in nats per token, to")
    told_kl = [line.split(maxsplit=1) for line in lines[first + 1 :] if line.startswith("  ")]
    assert told_kl[0][1] == "the quantized model itself"
    values = [float(value) for value, _ in told_kl[1:]]
    assert values == sorted(values) and told_kl[1][1].endswith(" (written)")
    assert sum(name.endswith("(written)") for _, name in told_kl) == 1
    # the folder is one that generate and a stock transformers load
    assert lines[-1] == "run it: stillhouse generate new --prompt TEXT"
    ids = AutoTokenizer.from_pretrained("new")("1 birn", return_tensors="pt")["input_ids"]
    stock = AutoModelForCausalLM.from_pretrained("new", dtype="auto")
    out = stock.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5
    )
    capsys.readouterr()
    generate = ["generate", "new", "--max-new-tokens", "5", "--prompt"]
    assert main([*generate, "1 birn"]) == 0
    out_text = AutoTokenizer.from_pretrained("new").decode(out[0, ids.shape[1] :])
    told_out, err = capsys.readouterr()
    assert told_out.rstrip("\n") == out_text.rstrip("\n") and len(err.splitlines()) == 1


def test_a_cell_runs_by_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(f"generate demo --cell {KEY} --prompt 1 --max-new-tokens 3".split()) == 0
    assert "generated: 3 tokens" in capsys.readouterr().err


def test_a_lone_artifact_is_measured_on_prose(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import quant.export.hf.export as hf

    seen: list[torch.Tensor] = []
    whole = hf.export_hf

    def keep(model: Any, source: Any, out: Any, calibration: Any, **settings: Any) -> Any:
        seen.append(calibration)
        return whole(model, source, out, calibration, **settings)

    monkeypatch.setattr(hf, "export_hf", keep)
    lines = exported(capsys, f"runs/demo/cells/{KEY}/model --format hf --out new")
    (ids,) = seen
    folder = here / "runs/demo/cells" / KEY / "model"
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert ids.shape[0] == 16 and 8 <= ids.shape[1] <= min(longest, 256)
    assert (
        f"note: No run, so KL is measured on {ids.numel():,} tokens of the prose that ships with "
        f"Python (pydoc_data.topics, 16 sequences of {ids.shape[1]}), to the quantized model "
        "itself." in lines
    )
    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    starts = tokenizer(text[:4000], add_special_tokens=False).input_ids[: ids.shape[1]]
    assert ids[0].tolist() == starts
    assert len({tuple(row) for row in ids.tolist()}) == 16
    assert "KL of the quantized model, in nats per token, to" in lines
    assert sum(line.endswith("(written)") for line in lines) == 1


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("exact", "int4 exact, groups of 32"),
        ("symmetric", "int4 symmetric, groups of 32"),
        ("asymmetric", "int4 asymmetric, groups of 32"),
        ("bf16", "bf16"),
    ],
)
def test_kinds_of_a_folder(kind: str, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = exported(capsys, f"demo --cell {KEY} --format hf --kind {kind} --out new")
    assert lines[1].endswith(f": {format}")
    assert any(line.startswith("KL of") for line in lines) == (kind != "bf16")


def test_groups_that_only_one_kind_holds(capsys: pytest.CaptureFixture[str]) -> None:
    command = "quantize runs/demo/student --bits 4 --group-size 16 --out small"
    assert main(command.split()) == 0
    line = told(capsys, "export small --format hf --out new")
    assert line.endswith("or ask for --kind exact, which transformers alone loads")
    lines = exported(capsys, "small --format hf --kind exact --out new")
    assert lines[1].endswith("int4 exact, groups of 16")


def test_a_terminal_sees_what_is_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(f"export demo --cell {KEY} --format hf --kind symmetric --out new".split()) == 0
    told = capsys.readouterr().err
    for name in ("symmetric: largest weight", "symmetric: scales searched"):
        assert f"trying {name}" in told


def test_what_is_gone_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(here / "runs/demo", here / "apart/demo")
    shutil.rmtree(here / "apart/demo/student")
    lines = exported(capsys, f"apart/demo --cell {KEY} --format hf --out new")
    (note,) = (line for line in lines if line.startswith("note: The run's corpus"))
    assert "no finished corpus at" in note and note.endswith("KL is not measured.")
    assert "note: The 16-bit model is not there any more: KL is that to the quantized one." in lines


def test_the_untrained_model_is_not_taken_for_a_trained_student_that_is_gone(
    here: Path, tmp_path: Path
) -> None:
    run = open_store(tmp_path / "elsewhere").sub("demo")
    model, notes = str((here / "runs/demo/student").resolve()), list[str]()
    for distill, found in (("null", Path(model)), ("{steps: 10}", None)):
        text = f"student: {{model: {model}, revision: main}}\ndistill: {distill}\n"
        run.write_text("spec.yaml", text)
        assert _original(run, notes) == found
    assert notes == ["The 16-bit model is not there any more: KL is that to the quantized one."]


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_plain_folder_becomes_a_gguf_file(
    here: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = exported(capsys, f"runs/demo/student --format gguf --kind {kind} --out new")
    true_sizes(lines, here / "new")
    assert lines[1] == f"format: gguf {kind.upper()}"
    assert any(line.startswith("inexact: ") for line in lines) == (kind == "q8_0")


CELLS = f"{KEY}; hqq-1b-g8 failed (not finite); hqq-8b-g32 has no model any more"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "export demo --format gguf --out new",
            f"demo: is a run; give --cell, one of {CELLS}; its 16-bit model is",
        ),
        (
            "export demo --cell hqq-9b --format hf --out new",
            f"--cell hqq-9b: demo has no such cell; may be one of {CELLS}",
        ),
        (
            "export demo --cell hqq-1b-g8 --format hf --out new",
            f"--cell hqq-1b-g8: failed (not finite); run the sweep again, or give one of {KEY}",
        ),
        (
            "generate demo --cell hqq-8b-g32 --prompt x",
            f"--cell hqq-8b-g32: has no model any more; run the sweep again, or give one of {KEY}",
        ),
        ("generate demo --prompt x", "demo: is a run; give --cell, one of"),
        (
            "export dem --cell x --format hf --out new",
            "dem: no such run; the runs in ./runs are demo; see stillhouse export --help",
        ),
        ("export nix --format hf --out new", "nix: no such folder; may be a model's folder"),
        (
            "export runs/demo/student --format hf --out new",
            "runs/demo/student: is not quantized, and loads everywhere as it is; make one with "
            "stillhouse quantize runs/demo/student --bits 4 --out DIR",
        ),
        (
            f"export demo --cell {KEY} --format hf --kind f16 --out new",
            "--kind f16: is of gguf; with --format hf may be auto, exact, bf16, symmetric, asymm",
        ),
        (
            f"export demo --cell {KEY} --format gguf --kind exact --out new",
            "--kind exact: is of hf; with --format gguf may be auto, f32, f16, q8_0",
        ),
        (
            f"export demo --cell {KEY} --format hf --out runs/demo",
            "--out: runs/demo is not empty; may be a new folder for the exported model",
        ),
    ],
)
def test_wrong_inputs(command: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, command).startswith(line)


def test_what_is_exported_is_not_exported_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(capsys, f"runs/demo/cells/{KEY}/model --format hf --out first")
    assert told(capsys, "export first --format gguf --out new") == (
        "first: is exported already; give the model it was made of"
    )
    exported(capsys, f"runs/demo/cells/{KEY}/model --format gguf --out file")
    assert told(capsys, f"generate file/demo-{KEY}.gguf --prompt x").endswith(
        "llama.cpp and what is built on it run gguf files"
    )


def test_a_cell_of_the_first_format_is_told_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "runs/demo", here / "old/demo")
    file = here / "old/demo/cells" / KEY / "model/quant.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    line = told(capsys, f"export old/demo --cell {KEY} --format gguf --out new")
    assert "format 1" in line and "quantize the model again" in line


def test_cells_of_a_run_on_remote_storage(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store("memory://deploy/demo")
    store.upload_folder(world / "runs/demo", "")
    assert cells_of(store).models == [KEY]
    lines = exported(capsys, f"memory://deploy/demo --cell {KEY} --format gguf --out new")
    assert lines[0] == f"wrote new/demo-{KEY}.gguf"
