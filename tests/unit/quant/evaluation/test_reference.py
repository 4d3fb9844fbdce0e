from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from quant.evaluation.batches import CountedLogits, DataHash, inputs, place
from quant.evaluation.evaluate import evaluate
from quant.evaluation.reference import (
    HIDDEN,
    META,
    StoredReference,
    open_reference,
    read_meta,
    write_reference,
)
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures.model_families import tiny


def saved(model, folder, dtype=torch.float32):
    """A model in a folder, and what a cell would load from there."""
    model.to(dtype).save_pretrained(folder)
    return loaded(folder)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False).eval()


def live(model, batch) -> CountedLogits:
    ids, counted, _ = inputs(batch, "cpu")
    with torch.inference_mode():
        return CountedLogits(model, ids, place(batch.position_ids, "cpu"), counted)


def kept(reference, batches) -> list:
    data = DataHash()
    return [reference.batch(index, data.add(batch)) for index, batch in enumerate(batches)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gpt2", "gemma2", "mixtral", "gemma3", "falcon", "mamba", "phimoe"]
)
def test_logits_are_those_of_the_model_bit_for_bit(family, dtype, batches, tmp_path):
    changes = {"final_logit_softcapping": 0.1} if family == "gemma2" else {}
    model = saved(tiny(family, **changes), tmp_path / "model", dtype)
    meta = write_reference(model, iter(batches), tmp_path / "reference")
    assert meta == read_meta(tmp_path / "reference") and meta["kind"] == "hidden"
    reference = StoredReference(tmp_path / "reference", tmp_path / "model")
    for batch, stored in zip(batches, kept(reference, batches), strict=True):
        own = live(model, batch)
        assert len(stored) == len(own) == int((batch.loss_mask > 0).sum())
        for first in range(0, len(own), 7):
            last = min(first + 7, len(own))
            with torch.inference_mode():
                assert torch.equal(stored.chunk(first, last), own.chunk(first, last))


@pytest.mark.parametrize("tied", [False, True])
def test_an_evaluation_against_it_is_the_one_against_the_model(
    tied, make_llama, batches, make_records, tmp_path
):
    model = saved(make_llama(tied=tied), tmp_path / "model")
    cell = quantize(make_llama(tied=tied), QuantSpec(3, 32))
    records = make_records(make_llama(seed=5), batches, 8)
    for batch in batches:
        np.minimum(batch.input_ids, 199, out=batch.input_ids)
    write_reference(model, batches, tmp_path / "reference")
    reference = open_reference(tmp_path / "reference", tmp_path / "model")
    assert isinstance(reference, StoredReference)
    for vocab in (None, 200):
        found = evaluate(cell, iter(batches), reference, records, chunk_tokens=9, vocab=vocab)
        expected = evaluate(cell, iter(batches), model, records, chunk_tokens=9, vocab=vocab)
        assert found == expected and found["kl_to_reference"] > 0
    assert found["data_hash"] == reference.meta["data_hash"]
    assert found["batch_sizes"] == reference.meta["batch_sizes"] == [3, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_kl_of_a_model_with_itself_is_exactly_zero(family, dtype, batches, tmp_path):
    model = saved(tiny(family), tmp_path / "model", dtype)
    write_reference(model, batches, tmp_path / "reference")
    reference = StoredReference(tmp_path / "reference", tmp_path / "model")
    found = evaluate(loaded(tmp_path / "model"), batches, reference)
    for name in ("", "_low", "_high", "_p99", "_max"):
        assert found[f"kl_to_reference{name}"] == 0.0
    for name in ("", "_low", "_high"):
        assert found[f"perplexity_ratio{name}"] == 1.0
        assert found[f"true_prob_change{name}"] == 0.0
    assert found["true_prob_change_rms"] == 0.0 and found["top1_agreement"] == 1.0


def test_only_the_head_is_in_memory(make_llama, batches, tmp_path):
    model = saved(make_llama(), tmp_path / "model")
    write_reference(model, batches, tmp_path / "reference")
    hollow = StoredReference(tmp_path / "reference", tmp_path / "model")._model
    tensors = [*hollow.named_parameters(), *hollow.named_buffers()]
    there = {name for name, each in tensors if each.device.type != "meta"}
    assert there == {"lm_head.weight"}


def test_vocab_cuts_ids_off(make_llama, batches, tmp_path):
    model = saved(make_llama(), tmp_path / "model")
    write_reference(model, batches, tmp_path / "reference")
    whole = StoredReference(tmp_path / "reference", tmp_path / "model")
    cut = StoredReference(tmp_path / "reference", tmp_path / "model", vocab=100)
    with torch.inference_mode():
        a, b = (kept(each, batches)[0].chunk(2, 6) for each in (whole, cut))
    assert torch.equal(a[:, :100], b)


def test_the_file_is_plain_safetensors_of_the_last_hidden_states(make_llama, batches, tmp_path):
    model = saved(make_llama(), tmp_path / "model", torch.bfloat16)
    meta = write_reference(model, batches, tmp_path / "reference")
    assert sorted(path.name for path in (tmp_path / "reference").iterdir()) == [HIDDEN, META]
    found = safetensors.torch.load_file(tmp_path / "reference" / HIDDEN)
    assert list(found) == ["hidden"]
    rows = []
    for batch in batches:
        ids, counted, _ = inputs(batch, "cpu")
        output = model(
            input_ids=ids,
            position_ids=place(batch.position_ids, "cpu"),
            output_hidden_states=True,
            use_cache=False,
        )
        rows.append(output.hidden_states[-1][counted])
    assert torch.equal(found["hidden"], torch.cat(rows))
    assert (meta["tokens"], meta["hidden_size"]) == tuple(found["hidden"].shape)
    assert meta["hidden_dtype"] == "bfloat16" and meta["sequences"] == 5
    assert (tmp_path / "reference" / HIDDEN).stat().st_size == 256 + 2 * found["hidden"].numel()


def test_heads_are_found_however_a_folder_stores_them(batches, tmp_path, monkeypatch):
    """In shards; in another dtype than the config's; tied, with a base that was saved alone."""
    import quant.evaluation.reference

    def no_way(folder):
        raise AssertionError(f"the whole model of {folder} was loaded for its head")

    monkeypatch.setattr(quant.evaluation.reference, "whole_model", no_way)
    sharded, cast, alone = (tmp_path / name for name in ("sharded", "cast", "alone"))
    tiny("llama").save_pretrained(sharded, max_shard_size="50KB")
    assert (sharded / "model.safetensors.index.json").exists()
    tiny("llama").save_pretrained(cast)
    config = json.loads((cast / "config.json").read_text())
    (cast / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    gpt2 = tiny("gpt2")
    assert isinstance(gpt2, GPT2LMHeadModel)
    gpt2.transformer.save_pretrained(alone)
    for folder in (sharded, cast, alone):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        write_reference(model, batches, tmp_path / "reference")
        reference = StoredReference(tmp_path / "reference", folder)
        assert evaluate(model, batches, reference)["kl_to_reference_max"] == 0.0
    assert model.dtype == torch.float32 and read_meta(tmp_path / "reference")["head"]


def test_what_the_mapping_cannot_read_is_left_to_transformers(
    make_llama, batches, tmp_path, monkeypatch
):
    import quant.evaluation.reference

    calls, whole = [], quant.evaluation.reference.whole_model
    monkeypatch.setattr(
        quant.evaluation.reference, "whole_model", lambda *at: calls.append(at) or whole(*at)
    )
    folder = tmp_path / "model"
    model = saved(make_llama(tied=True), folder)
    write_reference(model, batches, tmp_path / "reference")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["a name of another kind"] = torch.zeros(2)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reference = StoredReference(tmp_path / "reference", folder)
    assert calls == [(folder, model.dtype)]
    assert evaluate(model, batches, reference)["kl_to_reference_max"] == 0.0


def test_a_model_without_a_base_is_run_live(make_llama, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "base_model_prefix", "")
    model = saved(make_llama(), tmp_path / "model")
    meta = write_reference(model, batches, tmp_path / "reference")
    assert meta["kind"] == "inseparable" and meta["tokens"] == 5 * 19 - 2 * 5 - 2
    assert [path.name for path in (tmp_path / "reference").iterdir()] == [META]
    reference = open_reference(tmp_path / "reference", tmp_path / "model")
    assert isinstance(reference, LlamaForCausalLM)
    assert evaluate(model, batches, reference)["kl_to_reference"] == 0.0
    with pytest.raises(ValueError, match="LlamaForCausalLM has no base that runs by itself"):
        StoredReference(tmp_path / "reference", tmp_path / "model")


def test_the_hash_is_of_the_sequences_however_they_are_batched(batches):
    def hashed(found) -> str:
        data = DataHash()
        for batch in found:
            data.add(batch)
        return data.hex

    whole = type(batches[0])(
        *(
            np.concatenate([getattr(batch, name) for batch in batches])
            for name in ("input_ids", "position_ids", "loss_mask")
        )
    )
    assert hashed(batches) == hashed([whole]) != hashed(batches[::-1])
    for name in ("input_ids", "position_ids", "loss_mask"):
        before = hashed([whole])
        getattr(whole, name)[4, 3] += 1
        assert hashed([whole]) != before


def test_other_data_is_refused_in_one_line(make_llama, batches, tmp_path):
    model = saved(make_llama(), tmp_path / "model")
    write_reference(model, batches, tmp_path / "reference")
    reference = StoredReference(tmp_path / "reference", tmp_path / "model")
    with pytest.raises(ValueError, match=r"it has 2 batches, the data 1") as told:
        evaluate(model, batches[:1], reference)
    assert "\n" not in str(told.value) and "in batches of [3, 2]" in str(told.value)
    with pytest.raises(ValueError, match="batch 2 of the data"):
        evaluate(model, [*batches, batches[0]], reference)
    with pytest.raises(ValueError, match="batch 0 of the data"):
        evaluate(model, batches[::-1], reference)
    batches[1].loss_mask[1, 3] = 0
    with pytest.raises(ValueError, match="batch 1 of the data is not the one it was made of"):
        evaluate(model, batches, reference)


def test_another_model_is_refused_in_one_line(make_llama, batches, tmp_path):
    model = saved(make_llama(), tmp_path / "model")
    saved(make_llama(seed=1), tmp_path / "other")
    saved(make_llama(hidden_size=32), tmp_path / "narrow")
    saved(tiny("qwen3"), tmp_path / "qwen3")
    write_reference(model, batches, tmp_path / "reference")
    for name in ("other", "narrow", "qwen3"):
        with pytest.raises(ValueError, match=f"another model than the one in .*{name}") as told:
            StoredReference(tmp_path / "reference", tmp_path / name)
        assert "\n" not in str(told.value)


def test_broken_files_are_refused_in_one_line(make_llama, batches, tmp_path):
    model = saved(make_llama(), tmp_path / "model")
    folder = tmp_path / "reference"
    meta = write_reference(model, batches, folder)

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as told:
            open_reference(folder, tmp_path / "model")
        assert "\n" not in str(told.value) and str(folder) in str(told.value)

    whole = (folder / HIDDEN).read_bytes()
    (folder / HIDDEN).write_bytes(whole[:-8])
    refused("the file holds")
    (folder / HIDDEN).write_bytes(whole)
    (folder / META).write_text(json.dumps({**meta, "tokens": meta["tokens"] - 1}))
    refused("it is not the tensor hidden, float32")
    (folder / META).write_text(json.dumps({**meta, "format": 2}))
    refused("is of format 2")
    (folder / META).write_text(json.dumps({"format": 1}))
    refused("it has no kind")
    (folder / META).write_text("{")
    refused("no valid JSON")
    (folder / META).unlink()
    refused("missing")


def test_it_appears_whole_or_not_at_all(make_llama, batches, tmp_path):
    model = make_llama()

    def failing():
        yield batches[0]
        raise OSError("the disk went away")

    folder = tmp_path / "reference"
    with pytest.raises(OSError, match="went away"):
        write_reference(model, failing(), folder)
    assert list(tmp_path.iterdir()) == []
    first = write_reference(model, batches[:1], folder)
    with pytest.raises(OSError, match="went away"):
        write_reference(model, failing(), folder)
    assert read_meta(folder) == first
    write_reference(model, batches, folder)
    assert read_meta(folder)["batch_sizes"] == [3, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        write_reference(model, batches, folder)
    for batch in batches:
        batch.loss_mask[:] = 0
    with pytest.raises(ValueError, match="no position"):
        write_reference(model, batches, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.itemsize)
        return made


def test_nothing_has_the_size_of_tokens_times_vocab(make_llama, batches, make_records, tmp_path):
    model = saved(
        make_llama(vocab_size=4096, hidden_size=16, intermediate_size=16), tmp_path / "model"
    )
    records = make_records(model, batches, 8)
    head = model.lm_head.weight.nbytes
    with Largest() as largest:
        write_reference(model, batches, tmp_path / "reference")
        assert largest.bytes == head
        reference = StoredReference(tmp_path / "reference", tmp_path / "model")
        found = evaluate(model, batches, reference, records, chunk_tokens=4)
    assert largest.bytes == head < found["tokens"] * 4096 * 4 / 5
