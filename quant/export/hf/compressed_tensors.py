"""A weight as compressed-tensors stores it: codes, scales, zero points, and the scheme beside them.

    w = (codes - zero) * scale      codes signed, zero 0 where the scheme is symmetric

The layout on disk is that of compressed-tensors 0.20 (github.com/vllm-project/compressed-tensors,
`compressors/pack_quantized`), written without the package: `weight_packed` is a little-endian bit
stream of `codes + 2**(bits - 1)` in int32 words along the row. Its loader's arithmetic is done in
the dtype of the scale, and `Packed.weight` does the same, so that what is measured is what loads.

Layers that vLLM joins into one (q/k/v, gate/up) must share one scheme. By reading vLLM
(`compressed_tensors/utils.py`): `should_ignore_layer` raises when only some parts of a joined layer
are ignored, and `find_matched_target` takes the scheme of the first part for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.codes import pack

WORD = 32
PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
Kind = Literal["symmetric", "asymmetric", "exact", "dynamic"]


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored.

    bits: of a code. group_size: weights that share a scale, None for a whole row. kind:
    "symmetric" (no zero point), "asymmetric" (an integer zero point), "exact" (a zero point that
    is a fraction: compressed-tensors keeps one under the strategy "block", with blocks of one
    row) or "dynamic" (symmetric int8 rows, and the input in int8 per token).
    """

    bits: int
    group_size: int | None
    kind: Kind = "symmetric"

    @property
    def format(self) -> str:
        """The name of the layout in `quantization_config`."""
        return INTEGER if self.kind == "dynamic" else PACKED

    def config(self, columns: int, zero_dtype: torch.dtype) -> dict[str, Any]:
        """The `weights` and `input_activations` of a config group; columns: the row's width."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.kind in ("symmetric", "dynamic"),
            "dynamic": False,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
        }
        if self.kind == "exact":
            weights |= {
                "strategy": "block",
                "group_size": None,
                "block_structure": [1, self.group_size or columns],
                "zp_dtype": str(zero_dtype),
            }
        activations = None
        if self.kind == "dynamic":
            activations = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "dynamic": True,
                "strategy": "token",
            }
        return {"weights": weights, "input_activations": activations, "output_activations": None}

    def __str__(self) -> str:
        size = "one scale per row" if self.group_size is None else f"groups of {self.group_size}"
        if self.kind == "dynamic":
            return f"int8 weights and inputs, {size}"
        return f"int{self.bits} {self.kind}, {size}"


@dataclass(frozen=True)
class Packed:
    """One weight `[out, in]` in a scheme.

    codes: int8 `[out, in]`, each within the `bits` of the scheme; scale: float `[out, groups]` in
    the dtype it is stored in; zero: int8 or float `[out, groups]`, None where symmetric.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out, in]` that compressed-tensors computes when it loads this."""
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(self.scale.dtype)
        if self.zero is not None:
            groups = groups - self.zero.to(self.scale.dtype).unsqueeze(-1)
        return (groups * self.scale.unsqueeze(-1)).flatten(1).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds, by the last part of the tensor's name."""
        if self.scheme.kind == "dynamic":
            return {"weight": self.codes, "weight_scale": self.scale}
        held = {
            "weight_packed": pack_words(self.codes, self.scheme.bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if self.scheme.kind == "exact":
            assert self.zero is not None
            held["weight_zero_point"] = self.zero
        elif self.zero is not None:  # integer zero points are packed down the columns
            words = pack_words(self.zero.T, self.scheme.bits)
            held["weight_zero_point"] = words.T.contiguous()
        return held


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 `[rows, n]`, each within `bits` bits, as int32 `[rows, ceil(n*bits/32)]`.

    Code i of a row takes the bits `[i * bits, (i + 1) * bits)` of the row's words, least
    significant first, with `2**(bits - 1)` added.
    """
    count = codes.shape[1]
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    padded = F.pad(unsigned, (0, -count % WORD))
    words = pack(padded, bits).contiguous().view(torch.int32)
    return words[:, : -(-count * bits // WORD)].contiguous()


def quantization_config(
    layers: Mapping[str, Packed], linear: list[str], dequantize: bool
) -> dict[str, Any]:
    """The `quantization_config` of a config.json.

    layers: what is packed, by module name; linear: every `torch.nn.Linear` of the stock model.
    With one scheme the target is the class, as vLLM's own models expect it, and the other layers
    are ignored by name; with several, every layer is a target by name. dequantize: transformers
    then unpacks while it loads, the only way in which it reads zero points and embeddings right;
    it knows but one scheme there.
    """
    schemes: dict[Scheme, list[str]] = {}
    for name, packed in layers.items():
        schemes.setdefault(packed.scheme, []).append(name)
    formats = sorted({scheme.format for scheme in schemes})
    assert not (dequantize and len(schemes) > 1)
    groups = {}
    for number, (scheme, names) in enumerate(schemes.items()):
        example = layers[names[0]]
        zero_dtype = torch.int8 if example.zero is None else example.zero.dtype
        targets = names
        if len(schemes) == 1:  # heads and embeddings are no Linear in vLLM: they need their names
            inner = [name for name in names if name in linear and "." in name]
            targets = ["Linear"] * bool(inner) + [name for name in names if name not in inner]
        group = {"targets": targets, **scheme.config(example.codes.shape[1], zero_dtype)}
        if len(formats) > 1:
            group["format"] = scheme.format
        groups[f"group_{number}"] = group
    made: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else MIXED,
        "config_groups": groups,
        "ignore": [name for name in linear if name not in layers],
    }
    if dequantize:
        made["dequantize"] = True
    return made


JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def joined_layers(names: Iterable[str]) -> list[list[str]]:
    """Groups of two or more layer names that vLLM makes one layer of."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        for kind, members in enumerate(JOINED):
            if last in members:
                found.setdefault((parent, kind), []).append(name)
    return [group for group in found.values() if len(group) > 1]


def agree(
    schemes: Mapping[str, Scheme | None],
) -> tuple[dict[str, Scheme | None], list[str]]:
    """One scheme for each joined layer: (schemes by layer name, a note for each change).

    schemes: every linear layer of the model, None where it stays in 16 bits. The most bits of the
    parts win (16 over 8 over 4), then the smallest groups; quantized inputs stay only where all
    parts have them.
    """
    agreed = dict(schemes)
    notes = []
    for group in joined_layers(schemes):
        shared = _strongest([schemes[name] for name in group])
        changed = [name for name in group if schemes[name] != shared]
        for name in changed:
            agreed[name] = shared
        if changed:
            others = ", ".join(name.rpartition(".")[2] for name in group)
            now = "16 bits" if shared is None else str(shared)
            was = ", ".join(f"{name} ({schemes[name] or '16 bits'})" for name in changed)
            notes.append(f"vLLM joins {others}, which must be stored alike: {was} is now {now}.")
    return agreed, notes


def _strongest(schemes: list[Scheme | None]) -> Scheme | None:
    known = [scheme for scheme in schemes if scheme is not None]
    if len(known) < len(schemes):
        return None
    if len(set(known)) == 1:
        return known[0]
    sizes = [scheme.group_size for scheme in known if scheme.group_size is not None]
    kinds = {scheme.kind for scheme in known}
    kind = known[0].kind if len(kinds) == 1 else "symmetric"
    size = min(sizes) if sizes and kind != "dynamic" else None
    return Scheme(max(scheme.bits for scheme in known), size, kind)
