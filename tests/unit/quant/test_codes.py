"""Tests of quant.codes (named so that no other test file has the same name)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant.codes import CHUNK, pack, pack_into, packed_width, unpack


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip_takes_exactly_b_bits(bits):
    codes = torch.randint(1 << bits, (3, 5, 48), dtype=torch.uint8)
    codes[0, 0] = (1 << bits) - 1
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 48 * bits // 8)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_numpys_little_endian_bit_stream(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 40, dtype=np.uint8)
    stream = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits].ravel()
    expected = np.packbits(stream, bitorder="little")
    assert np.array_equal(pack(torch.from_numpy(codes), bits).numpy(), expected)


class Steps(TorchDispatchMode):
    """The most bytes that one step of the arithmetic with words made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.int64 and made.dim() == 2:
            self.most = max(self.most, made.nbytes)
        return made


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_large_matrices_are_done_in_pieces(bits, turned):
    codes = torch.randint(1 << bits, (2048, 1032), dtype=torch.uint8)
    codes = codes.t()[:1001] if turned else codes
    with Steps() as steps:
        packed = pack(codes, bits)
        assert torch.equal(unpack(packed, bits), codes)
    assert 0 < steps.most <= CHUNK
    for row in (0, 500, 1000):
        assert torch.equal(packed[row], pack(codes[row], bits))


def test_packs_into_what_is_there_or_leaves_it():
    codes = torch.randint(8, (5, 16), dtype=torch.uint8)
    there = torch.zeros(5, 6, dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 8 does not fit into 3 bits"):
        pack_into(there, torch.cat((codes[:4], torch.full((1, 16), 8, dtype=torch.uint8))), 3)
    assert not there.any()
    pack_into(there, codes, 3)
    assert torch.equal(there, pack(codes, 3))
    for bits in (3, 8):
        with pytest.raises(ValueError, match=r"codes \[1, 16\] do not fit into packed ones"):
            pack_into(torch.zeros(5, 2 * bits, dtype=torch.uint8), codes[:1], bits)


def test_non_contiguous_and_empty():
    codes = torch.randint(8, (16, 4), dtype=torch.uint8).t()
    assert torch.equal(unpack(pack(codes, 3), 3), codes)
    assert pack(torch.zeros(0, 8, dtype=torch.uint8), 3).shape == (0, 3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_that_start_anywhere(bits):
    """A mapped file's tensor, or one column of a wider one, is aligned to nothing."""
    codes = torch.randint(1 << bits, (5, 24), dtype=torch.uint8)
    packed = pack(codes, bits)
    wider = torch.cat((torch.full((1,), 255, dtype=torch.uint8), packed.flatten()))
    assert torch.equal(unpack(wider[1:].view(5, -1), bits), codes)
    beside = torch.cat((packed, packed.flip(0)), 1)
    assert torch.equal(unpack(beside[:, : 3 * bits], bits), codes)
    assert torch.equal(
        pack(torch.cat((codes, codes), 1)[:, 8:32], bits)[:, -bits:], packed[:, :bits]
    )


def test_neither_gives_a_view():
    codes = torch.arange(16, dtype=torch.uint8)
    for made in (pack(codes, 8), unpack(codes, 8)):
        assert made.data_ptr() != codes.data_ptr()


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="bits may be 1 to 8"):
        packed_width(8, bits)
    with pytest.raises(ValueError, match="bits may be 1 to 8"):
        unpack(torch.zeros(8, dtype=torch.uint8), bits)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(torch.zeros(2, 12, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="code 4 does not fit into 2 bits"):
        pack(torch.full((1, 8), 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(8), 4)
    with pytest.raises(ValueError, match="do not hold codes of 3 bits"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3)
