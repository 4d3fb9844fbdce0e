from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from quant.artifact import load_quantized
from quant.artifact.sizes import parameter_count, true_bytes
from quant.evaluation.baselines import evaluate_extra, evaluate_model, failed_extra
from quant.evaluation.cell import failed_cell, measure_cell, run_cell, select_kl
from quant.evaluation.evaluate import evaluate, teacher_metrics
from quant.evaluation.measure import EvaluationConfig, EvaluationData
from quant.evaluation.speed import generation_seconds, load_baseline, resident_bytes
from quant.grid import Cell, uniform
from quant.kernels import kernel_names
from quant.layers.linear import quant_linears
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures.model_families import tiny
from trainer.models.load import load_for_inference
from trainer.processor import cpu_dtype

RESULT_KEYS = {
    "spec",
    "status",
    "error",
    "bits_per_weight",
    "bytes",
    "parameters",
    "perplexity",
    "kl_to_student",
    "kl_to_teacher",
    "top1_agreement",
    "accuracy",
    "retention",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "speedup",
    "kernel",
    "kernel_kl",
    "resident_bytes",
    "evaluated_with",
    "quantize_s",
    "eval_s",
    "versions",
    "fingerprint",
    "tokens",
}
EVALUATION_KEYS = {
    "role",
    "name",
    "parameters",
    "bytes",
    "accuracy",
    "perplexity",
    "kl_to_teacher",
    "retention",
    "top1_agreement",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "versions",
}
SPEC = QuantSpec(4, 32)
CELL = uniform(SPEC)


def part(batches, records=None, reference=None) -> EvaluationData:
    """A part of a corpus that may be read again and again."""
    return EvaluationData(
        lambda: iter(batches), None if records is None else lambda: records, reference
    )


@pytest.fixture
def student(make_llama, tmp_path, batches, foretell):
    """A saved float32 student which gets a good part of the tokens right."""
    model = make_llama(tied=True)
    foretell(model, batches)
    folder = str(tmp_path / "student")
    model.save_pretrained(folder)
    return folder


def test_a_cell_is_quantized_saved_and_evaluated(
    student, tmp_path, make_llama, batches, make_records
):
    out, teacher = str(tmp_path / "cell"), make_llama(seed=9)
    records = make_records(teacher, batches, 16)
    result = run_cell(CELL, student, part(batches, records), None, out)
    assert result.keys() >= RESULT_KEYS
    json.dumps(result, allow_nan=False)
    assert result["status"] == "done" and result["spec"] == SPEC.to_dict()
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "kernel", "resident_bytes"):
        assert result[key] is None, "known from the second pass on"
    assert result["evaluated_with"] == "dequantized weights in bfloat16"
    saved, original = load_quantized(out, prefer="plain"), load_for_inference(student)
    assert original.dtype == torch.float32  # the dtype it was saved in
    assert result["bytes"] == true_bytes(saved)
    assert result["parameters"] == parameter_count(original)
    assert result["bits_per_weight"] == 8 * true_bytes(saved) / parameter_count(original)
    again = evaluate(saved, batches, original, records)
    assert result["perplexity"] == again["perplexity"]
    assert result["kl_to_student"] == again["kl_to_reference"] > 0
    assert result["kl_to_teacher"] == again["kl_to_teacher"] > 0.1
    whole = evaluate(original, batches)["accuracy"]
    assert result["retention"] == pytest.approx(100 * result["accuracy"] / whole)
    assert whole > 0.2
    alone = run_cell(CELL, student, part(batches))
    assert alone["kl_to_teacher"] is None
    assert alone["kl_to_student"] == result["kl_to_student"]


def test_an_impossible_cell_raises_for_the_caller_to_record(student, batches):
    with pytest.raises(ValueError, match="group_size 48"):
        run_cell(uniform(QuantSpec(4, 48)), student, part(batches))


def test_speed_is_measured_beside_the_16_bit_model(student, tmp_path, batches):
    out = str(tmp_path / "cell")
    run_cell(CELL, student, part(batches), out_folder=out)
    told: list[float] = []
    baseline = load_baseline(student, "cpu", 8, 4, repeats=1)
    found = measure_cell(
        out, baseline, prompt_tokens=8, decode_tokens=4, repeats=2, notify=told.append
    )
    assert told == [pytest.approx(part / 10) for part in range(1, 11)]
    fast = load_quantized(out, prefer="speed", dtype=getattr(torch, cpu_dtype()))
    generation_seconds(fast, torch.zeros(1, 8, dtype=torch.int64), 2)  # what decoding lays out
    assert found["kernel"] == kernel_names(fast)
    assert found["resident_bytes"] == resident_bytes(fast)
    assert found["baseline_resident_bytes"] == resident_bytes(
        load_for_inference(student, dtype=getattr(torch, found["baseline_dtype"]))
    )
    assert found["speedup"] == found["decode_tokens_per_s"] / found["baseline_decode_tokens_per_s"]
    assert found["prefill_tokens_per_s"] > 0 and found["baseline_prefill_tokens_per_s"] > 0


ALL = [
    QuantSpec(4, "channel"),
    QuantSpec(4, 32, "rtn"),
    QuantSpec(3, 64, embeddings=True, head=True),
    QuantSpec(2, "channel", "rtn", embeddings=True, head=True),
    QuantSpec(8, "channel", "int8-dynamic"),
]


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.key)
def test_every_kind_of_cell_is_evaluated_and_measured(spec, student, tmp_path, batches):
    out = str(tmp_path / "cell")
    result = run_cell(uniform(spec), student, part(batches), out_folder=out)
    baseline = load_for_inference(student, dtype=torch.bfloat16)
    result |= measure_cell(out, baseline, prompt_tokens=8, decode_tokens=2, repeats=1)
    json.dumps(result, allow_nan=False)
    assert result.keys() >= RESULT_KEYS and result["status"] == "done"
    assert QuantSpec(**json.loads(json.dumps(result["spec"]))) == spec
    assert result["kl_to_student"] > 0 and result["decode_tokens_per_s"] > 0
    assert 0 <= result["kernel_kl"] < 0.01 + 0.02 * result["kl_to_student"]
    assert ("int8" in result["evaluated_with"]) == (spec.method == "int8-dynamic")
    weights = (tmp_path / "cell" / "quantized.safetensors").stat().st_size
    assert result["bytes"] <= weights <= result["bytes"] + 16384  # the file's header
    # Half of this student's weights are in its tied embeddings.
    assert (result["bits_per_weight"] < 5) == spec.embeddings


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stay_in_16_bits_where_they_are_listed(family, tmp_path, batches):
    source, out = str(tmp_path / "moe"), str(tmp_path / "cell")
    model = tiny(family)
    model.save_pretrained(source)
    with pytest.raises(ValueError, match="cannot be quantized"):
        run_cell(CELL, source, part(batches))
    result = run_cell(CELL, source, part(batches), out_folder=out, keep_16bit=["*.experts*"])
    assert result["keep_16bit"] == ["*.experts*"]
    result |= measure_cell(out, model, prompt_tokens=8, decode_tokens=2, repeats=1)
    assert result["status"] == "done" and result["decode_tokens_per_s"] > 0
    saved = load_quantized(out, prefer="plain")
    attention = [f"{name}_proj" for name in "qkvo"]
    assert {name.rpartition(".")[2] for name in quant_linears(saved)} == set(attention)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    assert result["bytes"] == true_bytes(saved) > 2 * experts
    assert result["bits_per_weight"] < 16


def test_what_is_evaluated_is_what_the_kernels_run(student, tmp_path, batches):
    """The evaluation's dense matmuls and the kernels agree far below the quantization's error."""
    for spec in (QuantSpec(4, 32), QuantSpec(8, "channel", "int8-dynamic")):
        out = str(tmp_path / spec.key)
        result = run_cell(uniform(spec), student, part(batches), out_folder=out)
        fast = evaluate(load_quantized(out), batches, load_for_inference(student))
        assert fast["perplexity"] == pytest.approx(result["perplexity"], rel=0.02), spec.key
        kl = pytest.approx(result["kl_to_student"], rel=0.1, abs=2e-4)
        assert fast["kl_to_reference"] == kl, spec.key


def test_a_failed_cell_has_every_key(student, batches):
    done = run_cell(CELL, student, part(batches))
    failed = failed_cell(uniform(QuantSpec(4, "channel")), "ValueError: no")
    assert failed.keys() == done.keys()
    assert failed["spec"]["group_size"] == "channel" and failed["kernel"] is None


def test_unquantized_models(student, tmp_path, make_llama, batches, make_records):
    teacher = make_llama(seed=9, num_hidden_layers=3)
    records = make_records(teacher, batches, 16)
    teacher.config.save_pretrained(tmp_path / "teacher")  # its weights are never needed
    top = evaluate_model(str(tmp_path / "teacher"), part(batches, records), None, "teacher")
    numbers = teacher_metrics(batches, records)
    assert top.keys() >= EVALUATION_KEYS
    assert (top["role"], top["name"]) == ("teacher", "teacher")
    assert top["parameters"] == parameter_count(teacher) and top["bytes"] == 2 * top["parameters"]
    assert top["accuracy"] == numbers["accuracy"] and top["perplexity"] == numbers["perplexity"]
    assert top["kl_to_teacher"] is top["retention"] is top["top1_agreement"] is None

    low = evaluate_model(student, part(batches, records), None, "student", name="small")
    found = evaluate(load_for_inference(student), batches, None, records)
    assert low.keys() >= EVALUATION_KEYS and low["name"] == "small"
    assert low["kl_to_teacher"] == found["kl_to_teacher"] > 0.1
    assert low["top1_agreement"] == found["teacher_top1_agreement"]
    expected = None if not numbers["accuracy"] else 100 * low["accuracy"] / numbers["accuracy"]
    assert low["retention"] == expected
    json.dumps([top, low], allow_nan=False)
    with pytest.raises(ValueError, match="from its records"):
        evaluate_model(student, part(batches), None, "teacher")


def test_a_stored_reference_gives_the_numbers_of_the_model_beside(
    student, tmp_path, batches, make_records, make_llama
):
    records = make_records(make_llama(seed=9), batches, 16)
    parts = {"report": part(batches, records), "select": part(batches[:1], records[:1])}
    stored = {name: str(tmp_path / name) for name in parts}
    low = evaluate_model(student, parts["report"], parts["select"], "student", references=stored)
    assert low["select"]["tokens"] < low["tokens"]
    # Evaluated from what was stored: the numbers of a pass of its own.
    assert low == evaluate_model(student, parts["report"], parts["select"], "student")
    beside = run_cell(CELL, student, parts["report"], parts["select"])
    found = run_cell(
        CELL,
        student,
        part(batches, records, stored["report"]),
        part(batches[:1], records[:1], stored["select"]),
    )
    timed = ("quantize_s", "eval_s", "eval_peak_bytes")
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in beside.items() if k not in timed
    }
    assert found["select"]["kl_to_student"] != found["kl_to_student"] > 0
    assert found["kl_kinds"]["kl_to_student"] == "exact"
    assert found["kl_kinds"]["kl_to_teacher"].startswith("coarsened")


def test_a_cell_of_the_teacher_is_exactly_compared_with_it(student, batches, make_records):
    """`student` plays the teacher here: its records give the same divergence, but coarsened."""
    records = make_records(load_for_inference(student), batches, 16)
    result = run_cell(uniform(SPEC, "teacher"), student, part(batches, records))
    assert result["kl_to_student"] is None and result["model"] == "teacher"
    assert result["kl_kinds"] == {"kl_to_teacher": "exact"}
    plain = run_cell(CELL, student, part(batches, records))
    assert result["kl_to_teacher"] == plain["kl_to_student"] >= plain["kl_to_teacher"] > 0


def test_layers_of_their_own_bits_are_a_cell(student, tmp_path, batches):
    layers = {"model.layers.0.mlp.down_proj": QuantSpec(8, 32), "model.layers.1.mlp.up_proj": None}
    cell = Cell("allocated-1mb", "student", QuantSpec(2, 32), layers, budget_mb=1.0)
    result = run_cell(cell, student, part(batches), out_folder=str(tmp_path / "cell"))
    assert result["layers"] == {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32},
        "model.layers.1.mlp.up_proj": None,
    }
    saved = load_quantized(tmp_path / "cell", prefer="plain")
    assert quant_linears(saved)["model.layers.0.mlp.down_proj"].bits == 8
    assert result["bytes"] == true_bytes(saved)
    uniform_2 = run_cell(uniform(QuantSpec(2, 32)), student, part(batches))
    assert result["kl_to_student"] < uniform_2["kl_to_student"]
    assert select_kl(cell, student, part(batches))["kl"] == result["kl_to_student"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cells_and_references_are_computed_in_one_dtype(student, tmp_path, batches, dtype):
    """Whatever the model's own is; a cell's 16-bit parts are 16-bit on disk all the same."""
    config, out = EvaluationConfig(dtype=dtype), tmp_path / "cell"
    reference = str(tmp_path / "reference")
    references = {"report": reference}
    model = evaluate_model(
        student, part(batches), None, "student", config=config, references=references
    )
    beside = part(batches, reference=reference)
    cell = run_cell(CELL, student, beside, part(batches), str(out), config=config)
    assert cell["compute_dtype"] == model["compute_dtype"] == dtype
    assert cell["evaluated_with"].endswith(dtype)
    stored = load_quantized(out, prefer="plain")
    assert stored.dtype is torch.bfloat16
    computed = load_quantized(out, prefer="plain", dtype=getattr(torch, dtype))
    # What was evaluated is what the folder holds: float32 sees no weight that bfloat16 lost.
    truth = load_for_inference(student, dtype=getattr(torch, dtype))
    found = evaluate(computed, batches, truth)
    assert found["kl_to_reference"] == pytest.approx(cell["kl_to_student"], rel=1e-3, abs=1e-7)
    chosen = select_kl(CELL, student, part(batches), config=config)
    assert chosen["kl"] == pytest.approx(cell["select"]["kl_to_student"], rel=1e-3, abs=1e-7)


def test_extra_models_are_loaded_as_what_they_are(student, tmp_path, batches, make_llama):
    quantized = str(tmp_path / "ours")
    model = quantize(load_for_inference(student), SPEC, dtype=torch.bfloat16)
    model.save_pretrained(quantized)
    ours = evaluate_extra(quantized, student, part(batches), part(batches), "ours")
    cell = run_cell(CELL, student, part(batches), part(batches))
    assert ours["kl_to_student"] == cell["kl_to_student"]
    assert ours["role"] == "extra" and ours["technique"] == "quantized elsewhere (hqq-4b-g32)"
    assert ours["parameters"] == cell["parameters"]
    assert abs(ours["bytes"] - cell["bytes"]) < 16384, "of its file, with the header"
    other = tmp_path / "other"
    make_llama(seed=5, tied=True).save_pretrained(other)
    plain = evaluate_extra(str(other), student, part(batches), None, "other")
    assert plain["technique"] == "as given, in float32" and plain["kl_to_student"] > 0.1
    same = evaluate_extra(student, student, part(batches), None, "itself")
    assert same["kl_to_student"] == 0.0 and same["retention"] == 100.0
    (other / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="transformers cannot load it"):
        evaluate_extra(str(other), student, part(batches), None, "broken")
    assert failed_extra("x", "why").keys() >= plain.keys()


def test_a_16_bit_model_is_mapped_not_copied(tmp_path, make_llama):
    """Processes of one machine share the pages of its file."""
    folder = str(tmp_path / "model")
    size = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    make_llama(**size).to(torch.bfloat16).save_pretrained(folder)
    script = (
        "import sys, trainer.models.load, quant.evaluation.measure\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(l for l in lines if l.startswith('RssAnon')).split()[1]) * 1024\n"
        "before = anonymous()\n"
        "model = trainer.models.load.load_for_inference(sys.argv[1])\n"
        "total = sum(float(p.sum()) for p in model.parameters())\n"
        "print(anonymous() - before, sum(p.nbytes for p in model.parameters()))\n"
    )
    command = [sys.executable, "-c", script, folder]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held, weights = map(int, out.split()[-2:])
    assert weights > 50_000_000 and held < 0.4 * weights


def test_a_cell_goes_on_from_the_model_that_it_had_saved(student, tmp_path, batches, monkeypatch):
    """It is not quantized again, and what comes out is the same to the last bit."""
    out = str(tmp_path / "cell")
    saved: list[dict] = []

    def stop(made):
        saved.append(json.loads(json.dumps(made)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(CELL, student, part(batches), out_folder=out, on_saved=stop)
    whole = run_cell(CELL, student, part(batches), out_folder=str(tmp_path / "whole"))
    monkeypatch.setattr("quant.evaluation.cell.quantize", None)
    [made] = saved
    rest = run_cell(CELL, student, part(batches), out_folder=out, made=made)
    assert rest["quantize_s"] == made["quantize_s"] > 0
    timed = {"quantize_s", "eval_s", "eval_peak_bytes"}
    assert {k: v for k, v in rest.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }
