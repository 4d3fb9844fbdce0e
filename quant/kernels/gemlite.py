"""gemlite's Triton kernels on CUDA, if the package is installed: codes of 1, 2, 4 and 8 bits.

github.com/dropbox/gemlite (0.5): `A16Wn.from_weights` takes unpacked codes, scales and zero points
of any fraction. It keeps the codes as a little-endian bit stream along the columns, in words of 32
bits, transposed: the bytes that `quant.codes` makes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codes import Codes, unpack
from quant.kernels.kernel import Kernel, Refused, StoredWeight
from quant.kernels.tinygemm import check_product

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
