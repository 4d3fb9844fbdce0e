"""The loaded tensors lie in a private mapping of the file, which lets go of what was copied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import quant.artifact.load
from quant.artifact import load_quantized, save_quantized
from quant.artifact.safetensors_file import MappedTensors, Slot, write_tensors
from quant.codes import Codes
from quant.layers.linear import QuantEmbedding, QuantLinear, quant_weights
from quant.quant_spec import QuantSpec
from quant.quantize import quantize

SPEC = QuantSpec(4, 32)
IDS = torch.arange(20)[None]
MIB = 1 << 20


@pytest.fixture
def folder(make_llama, tmp_path):
    model = quantize(make_llama(num_hidden_layers=1), SPEC)
    return save_quantized(model, tmp_path / "model", SPEC)


def test_a_loaded_model_outlives_its_file(folder):
    model = load_quantized(folder, prefer="plain")
    expected = load_quantized(folder, prefer="plain")(IDS).logits
    for path in folder.iterdir():
        path.unlink()
    assert torch.equal(model(IDS).logits, expected)


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(folder):
    before = (folder / "quantized.safetensors").read_bytes()
    model = load_quantized(folder, prefer="plain")
    model.model.embed_tokens.weight.zero_()
    model.model.layers[0].mlp.up_proj.scale.add_(1)
    assert model.model.embed_tokens.weight.abs().max() == 0
    assert (folder / "quantized.safetensors").read_bytes() == before
    assert load_quantized(folder).model.embed_tokens.weight.abs().max() > 0


def test_nothing_is_opened_for_writing(folder, monkeypatch):
    """So that a folder without write permission loads, whoever the process runs as."""
    folder.chmod(0o555)
    seen = []
    opened = os.open

    def check(path, flags, *rest, **more):
        seen.append(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", check)
    path_open = Path.open

    def check_path(self, mode="r", *rest, **more):
        seen.append(any(letter in mode for letter in "wax+"))
        return path_open(self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", check_path)
    load_quantized(folder)(IDS)
    folder.chmod(0o755)
    assert len(seen) >= 2 and not any(seen)


def test_written_tensors_are_what_the_safetensors_library_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a.codes": torch.randint(0, 255, (3, 5), dtype=torch.uint8),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "a.scale": torch.randn(7, 1).half(),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 3).t(),
    }
    slots = {name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    each = [lambda name=name: {name: tensors[name]} for name in reversed(tensors)]
    write_tensors(tmp_path / "ours", slots, each)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        library, mapped = load_file(path), MappedTensors(path)
        assert set(library) == set(mapped.slots) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(library[name], tensor)
            ours = mapped.tensor(name)
            assert ours.dtype == tensor.dtype and torch.equal(ours, tensor)
            assert ours.data_ptr() % ours.element_size() == 0
    ours = MappedTensors(tmp_path / "ours")
    for name, slot in ours.slots.items():
        assert (ours.data + slot.start) % slot.dtype.itemsize == 0, name
    write_tensors(tmp_path / "again", slots, reversed(each))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "ours").read_bytes()


def test_a_tensor_at_an_odd_address_is_copied_to_an_even_one(tmp_path):
    head = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    data = bytes([1, 2, 3]) + torch.tensor([0.5, -2.0]).numpy().tobytes()
    (tmp_path / "odd").write_bytes(len(head).to_bytes(8, "little") + head + data)
    found = MappedTensors(tmp_path / "odd").tensor("b")
    assert found.tolist() == [0.5, -2.0] and found.data_ptr() % 4 == 0


def test_what_is_written_must_be_what_was_planned(tmp_path):
    planned = {"a": Slot(torch.float32, (2,)), "b": Slot(torch.float32, (1,))}
    for number, made in enumerate(({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, {"c": IDS})):
        with pytest.raises(ValueError, match=r"planned was|no tensor came for b"):
            write_tensors(tmp_path / str(number), planned, [lambda made=made: made])


def test_released_pages_are_read_again(tmp_path):
    values = torch.randn(1000, 100)
    save_file({"before": torch.zeros(3), "a": values, "after": torch.ones(5)}, tmp_path / "file")
    mapped = MappedTensors(tmp_path / "file")
    view = mapped.tensor("a")
    assert torch.equal(view, values)
    mapped.release(["a"])
    assert torch.equal(view, values) and torch.equal(mapped.tensor("after"), torch.ones(5))


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@pytest.mark.parametrize("copied", [False, True], ids=["in the mapping", "laid out anew"])
def test_loading_takes_the_memory_of_the_model_once(tmp_path, monkeypatch, copied):
    """Peak resident memory; `clear_refs` sets the peak back to what is resident now."""
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip("the peak cannot be reset here")
    width, layers = 1024, 8
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2048}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    model = model.to_empty(device="cpu").bfloat16()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            rows, columns = module.weight.shape
            ones = torch.ones(rows, columns // 64, dtype=torch.float16)
            codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
            made = QuantEmbedding if isinstance(module, torch.nn.Embedding) else QuantLinear
            model.set_submodule(name, made.from_codes(Codes(codes, ones, ones, 8)))
    spec = QuantSpec(8, 64, "rtn", embeddings=True, head=True)
    folder = save_quantized(model, tmp_path / "model", spec)
    del model, module, codes
    size = (folder / "quantized.safetensors").stat().st_size
    assert size > 80 * MIB

    def lay_out_anew(layer, prefer):
        for weight in quant_weights(layer).values():
            weight.codes = weight.codes.clone() if copied else weight.codes
            assert weight.codes.max() > 0  # every page was read

    monkeypatch.setattr(quant.artifact.load, "use_kernels", lay_out_anew)
    before = resident("VmRSS")
    peak.write_text("5")
    loaded = load_quantized(folder)
    largest = 2 * width * width * (1 + 4 / 64)
    allowed = largest + 8 * MIB + (size if copied else 0)
    assert resident("VmHWM") - before < allowed
    assert loaded.lm_head.codes.shape == (2048, width)


@pytest.mark.parametrize("device", ["cuda:77", "meta", "nonsense", 3.5])
def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(ValueError, match=r"^device .*; may be cpu( or cuda)?$"):
        load_quantized(folder, device=device)


def test_an_unknown_preference(folder):
    with pytest.raises(ValueError, match="prefer 'fast' is unknown; may be speed, memory, plain"):
        load_quantized(folder, prefer="fast")
