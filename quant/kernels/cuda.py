"""Kernels on CUDA: torch's int4 ("tinygemm": 4-bit codes, bfloat16 input), and gemlite's.

`torch.ops.aten._convert_weight_to_int4pack` takes two codes per byte, the even column in the high
nibble, and orders them by tiles of 8 rows x 128 columns for the tensor cores (ATen's int4mm.cu);
`_weight_int4pack_mm` computes `x ((q - 8) s + zp)^T`, as the CPU kernel does.

gemlite's Triton kernels, if the package is installed, take codes of 1, 2, 4 and 8 bits:
github.com/dropbox/gemlite (0.5): `A16Wn.from_weights` takes unpacked codes, scales and zero points
of any fraction. It keeps the codes as a little-endian bit stream along the columns, in words of 32
bits, transposed: the bytes that `quant.codes` makes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.codes import Codes, row_chunks, scaled, unpack
from quant.kernels.blocks import lost_offsets
from quant.kernels.kernel import Kernel, Refused, StoredWeight, kernel_group, repeated, space_above

INNER_TILES = 8  # tiles of 16 columns that a thread reads at once; 8 is torch's own choice
TILE = (8, 16 * INNER_TILES)  # rows, columns
CAPABILITY = 8  # compute capability: bfloat16 tensor cores
# Rows of x from which dequantizing and a bfloat16 matmul is faster: torchao's table for this
# kernel (A6000, 4096 x 4096) has it level with a 16-bit matmul between 64 and 256 rows.
FEW = 128


class TinyGemm(Kernel):
    """The weight in tinygemm's layout for few rows of x; for many it is dequantized."""

    name = f"tinygemm int4 to {FEW} rows, then dequantize+matmul"

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__(weight)
        if weight.bits > 4:
            raise Refused(f"{weight.bits}-bit codes do not fit tinygemm's int4 kernel")
        self.group = kernel_group(weight.group_size)
        if self.columns % TILE[1]:
            raise Refused(f"an input width of {self.columns} is no multiple of {TILE[1]}")
        device = weight.codes.device
        _check_device(device)
        padded = self.padded = -(-self.rows // TILE[0]) * TILE[0]
        self.order = _tile_order(device)
        tiles = (padded // TILE[0], self.columns // TILE[1], 32, INNER_TILES // 2)
        self.packed = torch.empty(tiles, dtype=torch.int32, device=device)
        for part in row_chunks(padded, self.columns, device, TILE[0]):
            codes = weight.unpacked(part).codes
            codes = F.pad(codes, (0, 0, 0, part.stop - part.start - len(codes)))
            self.packed[_tiles(part)] = _pack(codes + self._moved(part))
            if not torch.equal(self._codes(part), codes):
                raise Refused("this GPU's int4 layout is not understood")
        # Scales as the kernel has them, zero points near the middle, and what is rounded off their
        # offsets: see the CPU's kernel.
        centre = self.zero.float() + space_above(self.zero, self.bits, 15, 8)
        s, z = repeated(self.scale, centre, weight.group_size, padded)
        s = s.bfloat16().float()
        offset = (8 - z) * s
        both = torch.stack((s, offset), -1).transpose(0, 1)
        self.scales_and_zeros = both.contiguous().to(torch.bfloat16)
        lost = lost_offsets(weight, offset)
        self.lost = None if lost is None else lost.t().to(torch.bfloat16)  # [groups, rows]
        check_product(self, weight)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.columns)
        if 0 < rows.shape[0] <= FEW:
            narrow = rows.to(torch.bfloat16).contiguous()
            y = torch.ops.aten._weight_int4pack_mm.default(
                narrow, self.packed, self.group, self.scales_and_zeros
            )
            y = y[:, : self.rows]
            if self.lost is not None:
                sums = narrow.unflatten(1, (len(self.lost), -1)).sum(-1)
                y = torch.addmm(y, sums, self.lost)
            y = y.to(x.dtype)
        elif torch.compiler.is_compiling():
            y = F.linear(rows, self._weight(slice(0, self.padded), x.dtype)[: self.rows])
        else:
            y = rows.new_empty(rows.shape[0], self.rows)
            for part in row_chunks(self.rows, self.columns, x.device, TILE[0]):
                y[:, part] = F.linear(rows, self._weight(part, x.dtype))
        return y.reshape(*x.shape[:-1], self.rows)

    def _weight(self, part: slice, dtype: torch.dtype) -> Tensor:
        """The weight's rows `part`, which starts at a whole tile, in `dtype`."""
        stop = -(-part.stop // TILE[0]) * TILE[0]
        codes = self._codes(slice(part.start, stop))[: part.stop - part.start]
        return scaled(codes, self.scale[part], self.zero[part], dtype)

    def _codes(self, rows: slice) -> Tensor:
        return _unpack(self.packed[_tiles(rows)], self.order) - self._moved(rows)

    def _moved(self, rows: slice) -> Tensor:
        """uint8 `[rows, columns]`: how far the codes are moved up; 0 for padding."""
        moved = space_above(self.zero[rows], self.bits, 15, 8)
        moved = F.pad(moved, (0, 0, 0, max(0, rows.stop - self.rows)))
        return moved.repeat_interleave(self.columns // moved.shape[1], 1)

    def unpacked(self) -> Codes:
        codes = self._codes(slice(0, self.padded))[: self.rows]
        return Codes(codes, self.scale, self.zero, self.bits)


def check_product(kernel: Kernel, weight: StoredWeight) -> None:
    """Compare the kernel with dequantize + matmul on some rows.

    Raises Refused when they differ by more than 1 % of the outputs' root mean square.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, kernel.columns, generator=generator).to(weight.codes.device)
    part = slice(0, min(256, kernel.rows))
    expected = x.bfloat16().float() @ weight.unpacked(part).dequantize().t()
    error = kernel(x.bfloat16())[:, part].float() - expected
    if not bool(error.square().mean() <= 1e-4 * expected.square().mean()):
        raise Refused(f"{type(kernel).__name__} gives other results than the plain path here")


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise Refused(f"tinygemm runs on CUDA, not on device {device.type}")
    if torch.cuda.get_device_capability(device)[0] < CAPABILITY:
        raise Refused("tinygemm needs a GPU of compute capability 8.0 or more")


def _tiles(rows: slice) -> slice:
    return slice(rows.start // TILE[0], rows.stop // TILE[0])


def _pack(codes: Tensor) -> Tensor:
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)


def _nibbles(packed: Tensor) -> Tensor:
    """All nibbles of `[row tiles, column tiles, 32, 4]` words: uint8 `[rows, columns, tile]`."""
    bytes_ = packed.flatten(2).view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(2)


def _tile_order(device: torch.device) -> Tensor:
    """int64 `[tile]`: which nibble of a packed tile holds each of its codes, row by row.

    Found by packing each place's own number, four bits at a time.
    """
    count = TILE[0] * TILE[1]
    number = torch.arange(count, device=device)
    held = torch.zeros_like(number)
    for shift in (0, 4, 8):
        part = (number >> shift & 15).to(torch.uint8).view(TILE)
        held |= _nibbles(_pack(part)).flatten().long() << shift
    if not torch.equal(held.sort().values, number):
        raise Refused("this GPU's int4 layout is not known")
    return held.argsort()


def _unpack(packed: Tensor, order: Tensor) -> Tensor:
    found = _nibbles(packed)[..., order]
    return found.unflatten(-1, TILE).transpose(1, 2).flatten(2).flatten(0, 1)


BITS = (1, 2, 4, 8)


class Gemlite(Kernel):
    """The weight in a gemlite layer, bfloat16 in and out."""

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__(weight)
        if weight.bits not in BITS:
            raise Refused(f"gemlite has no kernel for {weight.bits}-bit codes")
        if weight.group_size < 32 or self.columns % 32:
            raise Refused(f"groups of {weight.group_size} do not fit gemlite")
        device = weight.codes.device
        if device.type != "cuda":
            raise Refused(f"gemlite runs on CUDA, not on device {device.type}")
        self.name = f"gemlite {weight.bits}-bit"
        try:
            from gemlite.helper import A16Wn

            self.layer = A16Wn(device=device, dtype=torch.bfloat16).from_weights(
                weight.unpacked().codes,
                weight.scale.clone(),
                weight.zero.clone(),
                weight.bits,
                weight.group_size,
            )
            same = torch.equal(self.codes(), weight.codes)
        except ModuleNotFoundError as error:
            missing = error.name or "gemlite"
            raise Refused(
                "gemlite is not installed" if missing.startswith("gemlite") else f"no {missing}"
            ) from None
        except Exception as error:  # another version, another GPU: the plain path still runs
            raise Refused(f"gemlite failed ({str(error).splitlines()[:1]})") from None
        if not same:
            raise Refused("gemlite's layout is not understood")
        check_product(self, weight)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.columns).to(torch.bfloat16)
        return self.layer(rows).to(x.dtype).view(*x.shape[:-1], self.rows)

    def codes(self) -> Tensor:
        return self.layer.W_q.t().contiguous().view(torch.uint8)

    def unpacked(self) -> Codes:
        return Codes(unpack(self.codes(), self.bits), self.scale, self.zero, self.bits)
