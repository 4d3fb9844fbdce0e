from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MixtralConfig,
)

from quant.evaluation.batches import CountedLogits
from quant.evaluation.bootstrap import mean_interval, ratio_of_perplexities
from quant.evaluation.evaluate import evaluate, teacher_metrics
from quant.evaluation.reference import write_reference
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from trainer.logits.reader import take


def in_float64(model, reference, batches, whole_log_probs) -> dict[str, float]:
    """The same numbers, position by position, from the definition."""
    nll, correct, kl, agree, change, reference_nll = [], [], [], [], [], []
    for batch in batches:
        q, p = whole_log_probs(model, batch).numpy(), whole_log_probs(reference, batch).numpy()
        for row, at in zip(*np.nonzero(batch.loss_mask), strict=True):
            token = batch.input_ids[row, at + 1]
            nll.append(-q[row, at, token])
            correct.append(q[row, at].argmax() == token)
            kl.append(float((np.exp(p[row, at]) * (p[row, at] - q[row, at])).sum()))
            agree.append(q[row, at].argmax() == p[row, at].argmax())
            change.append(np.exp(q[row, at, token]) - np.exp(p[row, at, token]))
            reference_nll.append(-p[row, at, token])
    return {
        "tokens": len(nll),
        "nll": float(np.mean(nll)),
        "perplexity": math.exp(np.mean(nll)),
        "accuracy": float(np.mean(correct)),
        "kl_to_reference": float(np.mean(kl)),
        "kl_to_reference_max": max(kl),
        "kl_to_reference_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(np.mean(agree)),
        "reference_nll": float(np.mean(reference_nll)),
        "reference_perplexity": math.exp(np.mean(reference_nll)),
        "perplexity_ratio": math.exp(np.mean(nll)) / math.exp(np.mean(reference_nll)),
        "true_prob_change": float(np.mean(change)),
        "true_prob_change_rms": float(np.sqrt(np.mean(np.square(change)))),
    }


OF_TEACHERS = [
    "kl_to_teacher",
    "kl_to_teacher_low",
    "kl_to_teacher_high",
    "kl_to_teacher_p99",
    "kl_to_teacher_max",
    "teacher_top1_agreement",
    "teacher_accuracy",
    "teacher_nll",
    "teacher_perplexity",
    "teacher_true_prob_change",
]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_is_what_float64_over_full_logits_gives(
    make_llama, batches, foretell, whole_log_probs, chunk_tokens
):
    model, reference = make_llama(seed=1), make_llama(seed=2)
    foretell(model, batches)
    expected = in_float64(model, reference, batches, whole_log_probs)
    found = evaluate(model, batches, reference, chunk_tokens=chunk_tokens)
    assert expected["accuracy"] > 0.2 and expected["tokens"] == 5 * 19 - 2 * 5 - 2
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["sequences"] == 5 and found["batch_sizes"] == [3, 2]
    assert [name for name, value in found.items() if value is None] == OF_TEACHERS
    assert found["kl_kinds"] == {"kl_to_reference": "exact"}
    mirrored = evaluate(reference, batches)
    assert found["reference_accuracy"] == mirrored["accuracy"]
    assert found["reference_perplexity"] == pytest.approx(mirrored["perplexity"], rel=1e-6)
    assert mirrored["kl_to_reference"] is mirrored["perplexity_ratio_low"] is None
    assert mirrored["kl_kinds"] == {}


def test_an_evaluation_of_unshifted_positions_would_differ(make_llama, batches, whole_log_probs):
    """Peers' bug: scoring token t at position t. A model that copies would look perfect."""
    model = make_llama(seed=1)
    found = evaluate(model, batches)
    for shift in (0, 2):
        wrong = []
        for batch in batches:
            q = whole_log_probs(model, batch).numpy()
            tokens = np.roll(batch.input_ids, -shift, axis=1)
            picked = np.take_along_axis(q, tokens[..., None], -1)[..., 0]
            wrong.append(-picked[batch.loss_mask > 0])
        assert abs(np.concatenate(wrong).mean() - found["nll"]) > 0.01


def test_sums_per_sequence_add_up(make_llama, batches, make_records):
    model, reference = make_llama(seed=1), make_llama(seed=2)
    found = evaluate(model, batches, reference, make_records(reference, batches, 8))
    parts = found["per_sequence"]
    assert parts["tokens"] == [int(n) for b in batches for n in b.loss_mask.sum(1)]
    totals = {"correct": "accuracy", "reference_correct": "reference_accuracy"}
    assert set(parts) - {"tokens"} == {
        "nll",
        "correct",
        "kl_to_reference",
        "kl_to_teacher",
        "reference_nll",
        "reference_correct",
        "teacher_nll",
    }
    for name in set(parts) - {"tokens"}:
        total = found[totals.get(name, name)]
        assert sum(parts[name]) / found["tokens"] == pytest.approx(total, abs=1e-12)
    single = evaluate(model, [batches[1]])
    assert parts["nll"][3:] == pytest.approx(single["per_sequence"]["nll"], rel=1e-6)


def test_mean_is_over_tokens_not_over_batches(make_llama, batches):
    model = make_llama(seed=1)
    each = [evaluate(model, [batch]) for batch in batches]
    tokens = [one["tokens"] for one in each]
    weighted = sum(one["nll"] * n for one, n in zip(each, tokens, strict=True)) / sum(tokens)
    assert tokens[0] != tokens[1]
    assert evaluate(model, batches)["nll"] == pytest.approx(weighted, rel=1e-9)


def test_positions_that_do_not_count_change_nothing(make_llama, batches):
    model = make_llama(seed=1)
    before = evaluate(model, [batches[0]])
    batches[0].input_ids[0, 15:] = 0  # sequence 0 counts up to position 13, token 14
    after = evaluate(model, [batches[0]])
    assert after.pop("data_hash") != before.pop("data_hash") and after == before


def test_kl_of_a_model_to_itself_is_zero(make_llama, batches, make_records):
    model = make_llama()
    found = evaluate(model, batches, make_llama(), make_records(model, batches, 8))
    for name in ("", "_low", "_high", "_p99", "_max"):
        assert found[f"kl_to_reference{name}"] == 0.0
    for name in ("", "_low", "_high"):
        assert found[f"true_prob_change{name}"] == 0.0 and found[f"perplexity_ratio{name}"] == 1.0
    assert found["top1_agreement"] == found["teacher_top1_agreement"] == 1
    assert abs(found["kl_to_teacher"]) < 1e-6
    assert found["accuracy"] == found["teacher_accuracy"] == found["reference_accuracy"]
    assert found["perplexity"] == pytest.approx(found["teacher_perplexity"], rel=1e-5)


def test_kl_to_teacher_nears_the_full_kl_with_more_ids(make_llama, batches, make_records):
    model, teacher = make_llama(seed=1), make_llama(seed=2)
    full = evaluate(model, batches, teacher)["kl_to_reference"]
    found = [
        evaluate(model, batches, None, make_records(teacher, batches, k))["kl_to_teacher"]
        for k in (1, 8, 64, 256)
    ]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(full, rel=1e-4)


def test_records_shifted_by_a_position_give_another_divergence(make_llama, batches, make_records):
    model = make_llama()
    records = []
    for batch, record in zip(batches, make_records(model, batches, 32), strict=True):
        rows = np.roll(np.arange(len(record.ids)).reshape(batch.input_ids.shape), 1, axis=1)
        records.append(take(record, rows.flatten()))
    found = evaluate(model, batches, None, records)
    assert found["kl_to_teacher"] > 0.02 and found["teacher_top1_agreement"] < 0.5


def test_fewer_bits_are_further_from_the_original(make_llama, batches):
    reference = make_llama()
    kl = {
        bits: evaluate(quantize(make_llama(), QuantSpec(bits, 32)), batches, reference)
        for bits in (8, 4, 2)
    }
    assert 0 < kl[8]["kl_to_reference"] < kl[4]["kl_to_reference"] / 3
    assert kl[4]["kl_to_reference"] < kl[2]["kl_to_reference"] / 3
    assert kl[8]["top1_agreement"] > kl[4]["top1_agreement"] > kl[2]["top1_agreement"]


def test_teacher_metrics_need_no_model(
    make_llama, batches, foretell, make_records, whole_log_probs
):
    teacher = make_llama(seed=2)
    foretell(teacher, batches)
    found = teacher_metrics(batches, make_records(teacher, batches, 4))
    own = evaluate(teacher, batches)
    assert found["accuracy"] == own["accuracy"] > 0.2
    assert found["perplexity"] == pytest.approx(own["perplexity"], rel=1e-6)
    for name in ("tokens", "sequences", "accuracy_low", "accuracy_high", "data_hash"):
        assert found[name] == own[name]
    assert found["per_sequence"]["correct"] == own["per_sequence"]["correct"]
    assert found["per_sequence"]["nll"] == pytest.approx(own["per_sequence"]["nll"], rel=1e-6)
    json.dumps(found, allow_nan=False)
    log_probs = [whole_log_probs(teacher, b).numpy()[b.loss_mask > 0] for b in batches]
    entropy = np.concatenate([-(np.exp(p) * p).sum(-1) for p in log_probs]).mean()
    assert found["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_changes_of_the_true_tokens_probability_against_a_teacher(
    make_llama, batches, make_records, whole_log_probs
):
    model, teacher = make_llama(seed=1), make_llama(seed=2)
    found = evaluate(model, batches, None, make_records(teacher, batches, 4))
    expected = in_float64(model, teacher, batches, whole_log_probs)
    assert found["teacher_true_prob_change"] == pytest.approx(expected["true_prob_change"], 1e-4)
    assert found["teacher_nll"] == pytest.approx(expected["reference_nll"], rel=1e-6)
    assert found["true_prob_change"] is None and found["kl_kinds"].keys() == {"kl_to_teacher"}
    assert "a lower bound" in found["kl_kinds"]["kl_to_teacher"]


def test_intervals_are_over_sequences(make_llama, batches, foretell, make_records):
    """Those of the sums per sequence, so that tables made of those alone agree."""
    model, reference = make_llama(seed=1), make_llama(seed=2)
    foretell(model, batches)
    found = evaluate(model, batches, reference, make_records(reference, batches, 8))
    json.dumps(found, allow_nan=False)
    parts = found["per_sequence"]
    tokens = parts["tokens"]
    for name, key in (
        ("accuracy", "correct"),
        ("kl_to_reference", "kl_to_reference"),
        ("kl_to_teacher", "kl_to_teacher"),
    ):
        expected = mean_interval(parts[key], tokens).within(
            0, 1 if name == "accuracy" else math.inf
        )
        assert found[name] == expected.value
        assert (found[f"{name}_low"], found[f"{name}_high"]) == (expected.low, expected.high)
        assert 0 <= found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    ratio = ratio_of_perplexities(parts["nll"], parts["reference_nll"], tokens)
    assert found["perplexity_ratio_low"] == ratio.low < ratio.high == found["perplexity_ratio_high"]
    assert found["true_prob_change_low"] < found["true_prob_change"]
    assert found["true_prob_change"] < found["true_prob_change_high"]
    assert found["intervals"]["unit"] == "sequence" and found["intervals"]["level"] == 0.95


def test_one_sequence_leaves_no_interval(make_llama, batches):
    one = dataclasses.replace(
        batches[1],
        **{name: each[:1] for name, each in dataclasses.asdict(batches[1]).items()},
    )
    found = evaluate(make_llama(seed=1), [one], make_llama(seed=2))
    assert found["kl_to_reference"] > 0 and found["sequences"] == 1
    ends = [name for name in found if name.endswith(("_low", "_high"))]
    assert len(ends) == 10 and all(found[name] is None for name in ends)


def test_blocks_of_logits_change_nothing(make_llama, batches, make_records, monkeypatch):
    import quant.evaluation.evaluate

    model, reference = make_llama(seed=1), make_llama(seed=2)
    records = make_records(reference, batches, 8)
    whole = evaluate(model, batches, reference, records)
    monkeypatch.setattr(quant.evaluation.evaluate, "BLOCK", 5 * 256)
    assert evaluate(model, batches, reference, records) == whole


TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=0.3),
        CohereConfig(**TINY, logit_scale=0.25),
        GraniteConfig(**TINY, logits_scaling=8.0),
        MixtralConfig(**TINY, num_local_experts=2),
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=256),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_are_the_models_own_whatever_its_head_does(config, batches, whole_log_probs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3.0)
    batch = batches[0]
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    counted = torch.from_numpy(batch.loss_mask) > 0
    logits = CountedLogits(model, ids, positions, counted)
    got = torch.cat([logits.chunk(at, at + 10) for at in range(0, len(logits), 10)])
    whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits[counted]
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)
    assert "forward" not in model.base_model.__dict__
    expected = in_float64(model, model, batches, whole_log_probs)
    assert evaluate(model, batches)["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_documents_in_one_sequence_do_not_see_each_other(make_llama, batches):
    model = make_llama()
    batch = batches[0]
    before = evaluate(model, [batch])["per_sequence"]["nll"]
    batch.input_ids[1, :8] = 7  # document 1 of sequence 1; document 2 starts at position 9
    ids = batch.input_ids
    alone = dataclasses.replace(
        batch,
        input_ids=ids[1:2, 9:],
        position_ids=batch.position_ids[1:2, 9:],
        loss_mask=batch.loss_mask[1:2, 9:],
    )
    batch.loss_mask[1, :9] = 0
    after = evaluate(model, [batch])["per_sequence"]["nll"]
    assert after[1] == pytest.approx(evaluate(model, [alone])["per_sequence"]["nll"][0], rel=1e-5)
    assert after[0] == before[0] and after[2] == before[2]


def test_refusals(make_llama, batches, make_records):
    model = make_llama()
    records = make_records(model, batches, 4)
    with pytest.raises(ValueError, match="fewer records than batches"):
        evaluate(model, batches, None, records[:1])
    with pytest.raises(ValueError, match="fewer batches than teacher records"):
        evaluate(model, batches[:1], None, records)
    with pytest.raises(ValueError, match="records are of 40 positions, their batch of 60"):
        evaluate(model, batches, None, records[::-1])
    batches[1].loss_mask[0, -1] = 1
    with pytest.raises(ValueError, match="last position"):
        evaluate(model, batches)
    for batch in batches:
        batch.loss_mask[:] = 0
    with pytest.raises(ValueError, match="no position"):
        evaluate(model, batches)
    with pytest.raises(ValueError, match="no position"):
        evaluate(model, [])


def test_a_broken_model_is_an_error_not_a_nan(make_llama, batches):
    model = make_llama()
    model.model.norm.weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match="the model is broken"):
        evaluate(model, batches)


def test_progress_moves_within_batches_and_ends_with_all_sequences(make_llama, batches, tmp_path):
    model, reference = make_llama(), make_llama(seed=9)
    sequences = sum(len(batch.input_ids) for batch in batches)
    told: list[float] = []
    quiet = evaluate(model, batches, reference)
    assert evaluate(model, batches, reference, progress=told.append) == quiet
    assert told == sorted(told) and told[0] == 0 and told[-1] == sequences
    first = len(batches[0].input_ids)
    assert len([done for done in told if 0 < done < first]) >= 4  # two layers of both models
    written: list[float] = []
    write_reference(model, batches, tmp_path / "reference", progress=written.append)
    assert written == sorted(written) and written[-1] == sequences
    assert len(set(written)) > len(batches) + 1
