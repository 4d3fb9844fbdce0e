"""What the CUDA kernels refuse, and their layouts' ways back, on a machine without a GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import quant.codes as codes_module
import quant.kernels.cuda as tinygemm
from quant.codes import pack
from quant.kernels import candidates, choose
from quant.kernels.blocks import Blocks
from quant.kernels.cuda import Gemlite, TinyGemm, check_product
from quant.kernels.int4 import Int4
from quant.kernels.int8_dynamic import Int8Dynamic
from quant.kernels.kernel import Refused, StoredWeight
from tests.fixtures.kernel_layers import heavy_tailed, random_codes, random_input, weight_in_float64


def stored(bits=4, group=64, columns=256, **more) -> StoredWeight:
    codes = random_codes(bits, group, columns=columns)
    return StoredWeight(pack(codes.codes, bits), codes.scale, codes.zero, bits, columns, **more)


@pytest.mark.parametrize(
    ("kernel", "weight", "reason"),
    [
        (TinyGemm, {"bits": 8}, "^8-bit codes do not fit"),
        (TinyGemm, {"group": 8}, "^groups of 8 do not fit the int4 kernel$"),
        (TinyGemm, {"columns": 192}, "^an input width of 192 is no multiple of 128$"),
        (TinyGemm, {}, "^tinygemm runs on CUDA, not on device cpu$"),
        (Gemlite, {"bits": 3}, "^gemlite has no kernel for 3-bit codes$"),
        (Gemlite, {"group": 16}, "^groups of 16 do not fit gemlite$"),
        (Gemlite, {}, "^gemlite runs on CUDA, not on device cpu$"),
    ],
)
def test_refuses_by_name(kernel, weight, reason):
    with pytest.raises(Refused, match=reason):
        kernel(stored(**weight))


def test_order_of_candidates():
    assert candidates(stored(4), "cuda") == [TinyGemm, Gemlite]
    assert candidates(stored(3), "cuda") == [TinyGemm, Gemlite]
    for bits in (1, 2, 8):
        assert candidates(stored(bits), "cuda") == [Gemlite, TinyGemm]
    assert candidates(stored(8, 256, activations="int8"), "cuda") == [Int8Dynamic]
    assert candidates(stored(4), "cpu") == [Blocks, Int4]


def test_a_tied_head_stays_with_the_embeddings_codes_for_memory():
    kernel, reason = choose(stored(shared=True), "memory")
    assert kernel is None and reason.startswith("the embedding holds these codes")
    assert isinstance(choose(stored(shared=True), "speed")[0], Blocks | Int4)


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """A made-up order of nibbles within each tile takes the place of the GPU's, and its kernel's
    arithmetic is done in float32 on bfloat16 scales and offsets."""
    count = tinygemm.TILE[0] * tinygemm.TILE[1]
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(1))

    def convert(codes):
        rows, columns = codes.shape
        tiles = codes.view(rows // 8, 8, columns // 128, 128).transpose(1, 2).flatten(2)
        nibbles = tiles[..., shuffled]
        packed = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        return packed.contiguous().view(torch.int32).view(rows // 8, columns // 128, 32, 4)

    def multiply(x, packed, group, scales_and_zeros):
        assert x.dtype == scales_and_zeros.dtype == torch.bfloat16
        codes = tinygemm._unpack(packed, tinygemm._tile_order(x.device))
        scale, offset = scales_and_zeros.float().permute(2, 1, 0).repeat_interleave(group, 2)
        return (x.float() @ ((codes - 8.0) * scale + offset).t()).bfloat16()

    kernel = types.SimpleNamespace(default=multiply)
    monkeypatch.setattr(tinygemm, "_pack", convert)
    monkeypatch.setattr(tinygemm, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", kernel)


def test_tiles_come_back_whatever_their_order(no_gpu_needed):
    order = tinygemm._tile_order(torch.device("cpu"))
    codes = torch.randint(16, (24, 384), dtype=torch.uint8)
    assert torch.equal(tinygemm._unpack(tinygemm._pack(codes), order), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "group"), [(100, 64), (96, 512), (3, 32)])
def test_tinygemm_around_its_gpu_kernel(no_gpu_needed, monkeypatch, bits, rows, group):
    """What is given to the kernel, and what is done without it, is the stored weight."""
    codes = random_codes(bits, group, rows=rows, columns=512)
    weight = StoredWeight(pack(codes.codes, bits), codes.scale, codes.zero, bits, 512)
    kernel = TinyGemm(weight)
    assert torch.equal(kernel.unpacked().codes, codes.codes)
    dense = torch.from_numpy(weight_in_float64(codes))
    monkeypatch.setattr(codes_module, "CHUNK", 8 * 512)  # several pieces for many tokens
    for tokens in (1, 5, tinygemm.FEW, tinygemm.FEW + 1):
        for mean in (0.0, 1.0):
            x = random_input(tokens, 512) + mean
            expected = x.double() @ dense.t()
            error = (kernel(x).double() - expected).norm() / expected.norm()
            assert error < 0.006, (tokens, mean)
    x = random_input(tinygemm.FEW + 1, 512, torch.float32)
    assert torch.allclose(kernel(x).double(), x.double() @ dense.t(), rtol=1e-4, atol=1e-3)


def test_what_tinygemms_offsets_lose_is_added_where_it_would_be_seen(no_gpu_needed):
    weight = heavy_tailed(4, 512)
    held, x = TinyGemm(weight), random_input(4, 512) + 1
    assert held.lost is not None and held.lost.shape == (1, 96)
    expected = x.double() @ weight.unpacked().dequantize(torch.float64).t()
    error = (held(x).double() - expected).norm() / expected.norm()
    held.lost = None
    without = (held(x).double() - expected).norm() / expected.norm()
    assert error < 0.005 < 0.02 < without


def test_tinygemm_is_given_the_even_column_in_the_high_nibble(monkeypatch):
    given = {}

    def convert(pairs, tiles):
        given.update(pairs=pairs, tiles=tiles)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    tinygemm._pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8))
    assert given["pairs"].tolist() == [[0x12, 0xF0]] and given["tiles"] == 8


def test_a_kernel_with_other_results_is_refused():
    weight = stored()
    kernel = Int4(weight)
    check_product(kernel, weight)
    kernel.scales_and_zeros[:, :, 0] *= 1.05
    with pytest.raises(Refused, match="Int4 gives other results than the plain path here"):
        check_product(kernel, weight)


def test_gemlites_words_are_the_packed_bytes(monkeypatch):
    """Its documented packing: code j of a 32-bit word at bit `j * bits`, words transposed."""
    for bits in (1, 2, 4, 8):
        weight = stored(bits)
        codes = weight.unpacked().codes
        per_word = 32 // bits
        parts = codes.to(torch.int64).unflatten(1, (-1, per_word))
        words = (parts << torch.arange(per_word) * bits).sum(-1)
        words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        kernel = Gemlite.__new__(Gemlite)
        kernel.layer = types.SimpleNamespace(W_q=words.t().contiguous())
        assert torch.equal(kernel.codes(), weight.codes)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("gone", name="gemlite"), "^gemlite is not installed$"),
        (ModuleNotFoundError("gone", name="triton"), "^no triton$"),
        (RuntimeError("this triton is too old\nmore"), "^gemlite failed .*this triton is too old"),
    ],
)
def test_a_gemlite_that_cannot_be_imported_is_no_kernel(monkeypatch, error, reason):
    class Broken:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "gemlite":
                raise error
            return None

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    weight = stored(4)
    fake = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    as_if = types.SimpleNamespace(
        bits=4,
        rows=96,
        columns=256,
        group_size=64,
        scale=weight.scale,
        zero=weight.zero,
        codes=fake,
    )
    with pytest.raises(Refused, match=reason):
        Gemlite(as_if)
