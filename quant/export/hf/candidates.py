"""The ways in which a quantized model's layers can be stored, to be chosen among on KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.codes import Codes
from quant.export.hf.compressed_tensors import Packed, Scheme, agree
from quant.export.hf.requantize import absmax, rounded_zeros, same_codes, searched
from quant.layers.linear import QuantEmbedding, QuantWeight, quant_weights

GROUP_SIZES = (128, 64, 32)  # and whole rows: what vLLM's int4 and int8 kernels (Marlin) run
PORTABLE = ("symmetric", "asymmetric")  # transformers and vLLM load them
ALONE = ("exact", "bf16")  # nothing to choose beside them
WEIGHED = "scales searched by what the inputs weigh"


@dataclass(frozen=True)
class LayerFormats:
    """schemes: of each layer that is packed; notes: what a user should know of them."""

    schemes: dict[str, Scheme]
    notes: list[str]
    dequantize: bool = False  # see `quantization_config`


@dataclass(frozen=True)
class Candidate:
    """One way of storing all layers; `pack` makes it."""

    name: str
    dequantize: bool
    pack: Callable[[], dict[str, Packed]]


def portable_plan(model: PreTrainedModel, linear: Sequence[str]) -> LayerFormats:
    """int4 for codes of up to 4 bits, int8 for more, in groups that vLLM runs.

    linear: the names of every `torch.nn.Linear` of the stock model. Tables that are looked up, and
    heads tied to them, stay in 16 bits. Raises ValueError for a group size that cannot be cut.
    """
    layers = quant_weights(model)
    # One group may fill the narrower rows of a model: that alone is no reason for two schemes.
    rows = all(layers[name].group_size == layers[name].columns for name in linear if name in layers)
    wanted: dict[str, Scheme | None] = {
        name: _portable(name, layers[name], rows) if name in layers else None for name in linear
    }
    for name in tied_names(model):
        wanted.pop(name, None)
    agreed, notes = agree(wanted)
    schemes = {name: scheme for name, scheme in agreed.items() if scheme is not None}
    for name, scheme in schemes.items():
        cut = layers[name].group_size
        if scheme.group_size not in (None, cut) and wanted[name] == scheme:
            notes.append(f"{name}: groups of {cut} are stored as groups of {scheme.group_size}.")
    return LayerFormats(schemes, notes)


def exact_plan(model: PreTrainedModel) -> LayerFormats:
    """The codes with their fractional zero points, which transformers loads and vLLM does not.

    Where all layers share one scheme, transformers can unpack while it loads: that takes tables
    and tied heads too. Otherwise those stay in 16 bits.
    """
    layers = quant_weights(model)
    tied = tied_names(model)
    wanted = {name: _exact(layer) for name, layer in layers.items() if name not in tied}
    note = "vLLM refuses this folder: its kernels have no zero points that are fractions."
    if len(set(wanted.values())) == 1 and next(iter(wanted.values())).kind == "exact":
        return LayerFormats(wanted, [note], dequantize=True)
    tables = [name for name in wanted if isinstance(layers[name], QuantEmbedding)]
    notes = [note]
    if model.dtype == torch.bfloat16:  # that of the codes is float16
        notes.append(
            "Scales and zero points are rounded to bf16, since layers that differ are not unpacked "
            "on loading: the codes are kept, the weights move a little."
        )
    return LayerFormats({name: wanted[name] for name in wanted if name not in tables}, notes)


def candidates(
    model: PreTrainedModel,
    plan: LayerFormats,
    formats: Sequence[str],
    original: Mapping[str, Tensor] | None,
    importance: Mapping[str, Tensor] | None,
) -> list[Candidate]:
    """What can be tried for a plan, the first being the default.

    original: 16-bit weights `[out, in]` by layer name; importance: float `[in]` by layer name.
    Raises ValueError (one line) when none of the formats holds all layers of the plan.
    """
    sources = Sources(model, original, importance)
    kinds = {scheme.kind for scheme in plan.schemes.values()}
    if kinds <= {"exact", "dynamic"}:
        return [Candidate("the codes as they are", plan.dequantize, sources.as_they_are(plan))]
    made = [
        Candidate(f"symmetric: {name}", False, sources.packing(plan.schemes, rule))
        for name, rule in sources.rules()
        if "symmetric" in formats
    ]
    whole = set(plan.schemes.values())
    # Zero points load only where transformers unpacks while loading, which knows but one scheme;
    # and vLLM's kernels have integer zero points for int4 alone.
    if "asymmetric" in formats and len(whole) == 1 and next(iter(whole)).bits == 4:
        shifted = {
            name: Scheme(4, scheme.group_size, "asymmetric")
            for name, scheme in plan.schemes.items()
        }
        rules = [*sources.rules(), ("zero points rounded, from the codes", _rounded)]
        made += [
            Candidate(f"asymmetric: {name}", True, sources.packing(shifted, rule))
            for name, rule in rules
            if rule is not _absmax
        ]
    if not made:
        stored = "; ".join(sorted({str(scheme) for scheme in whole}))
        raise ValueError(
            'formats=["asymmetric"] holds models whose layers are all 4-bit in groups of one size; '
            f'this one is stored as {stored}: ask for formats=["symmetric"]'
        )
    return made


def tied_names(model: PreTrainedModel) -> set[str]:
    """The output head, where its weight is that of the input embeddings."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return {name for name, module in model.named_modules() if module is head}


Rule = Callable[["Sources", str, Scheme], Packed]


@dataclass(frozen=True)
class Sources:
    """Where the weights of a candidate come from."""

    model: PreTrainedModel
    original: Mapping[str, Tensor] | None
    importance: Mapping[str, Tensor] | None

    def rules(self) -> Iterator[tuple[str, Rule]]:
        """The ways to make a layer, by name; the default first."""
        yield "scales searched, from the codes", _searched
        yield "largest weight, from the codes", _absmax
        if self.importance is not None:
            yield f"{WEIGHED}, from the codes", _weighed
        if self.original is not None:
            yield "scales searched, from the original", _searched_original
            if self.importance is not None:
                yield (
                    "scales searched by what the inputs weigh, from the original",
                    _weighed_original,
                )

    def packing(self, schemes: Mapping[str, Scheme], rule: Rule) -> Callable[[], dict[str, Packed]]:
        """Makes every layer by `rule`; those that need none as they are."""

        def pack() -> dict[str, Packed]:
            return {
                name: (_same if scheme.kind == "dynamic" else rule)(self, name, scheme)
                for name, scheme in schemes.items()
            }

        return pack

    def as_they_are(self, plan: LayerFormats) -> Callable[[], dict[str, Packed]]:
        """Keeps every layer's codes."""
        # While unpacking, transformers takes scales in any dtype; otherwise in the model's.
        dtype = torch.float16 if plan.dequantize else self.dtype
        return lambda: {
            name: same_codes(self.codes(name), scheme, dtype)
            for name, scheme in plan.schemes.items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return self.model.dtype

    def codes(self, name: str) -> Codes:
        """Of a layer, on the CPU."""
        held = quant_weights(self.model)[name].unpacked()
        return Codes(held.codes.cpu(), held.scale.cpu(), held.zero.cpu(), held.bits)


def _searched(of: Sources, name: str, scheme: Scheme) -> Packed:
    codes = of.codes(name)
    return searched(codes.dequantize(), codes, scheme, of.dtype)


def _absmax(of: Sources, name: str, scheme: Scheme) -> Packed:
    return absmax(of.codes(name).dequantize(), scheme, of.dtype)


def _weighed(of: Sources, name: str, scheme: Scheme) -> Packed:
    assert of.importance is not None
    codes = of.codes(name)
    return searched(codes.dequantize(), codes, scheme, of.dtype, of.importance[name])


def _searched_original(of: Sources, name: str, scheme: Scheme) -> Packed:
    assert of.original is not None
    return searched(of.original[name], None, scheme, of.dtype)


def _weighed_original(of: Sources, name: str, scheme: Scheme) -> Packed:
    assert of.original is not None and of.importance is not None
    return searched(of.original[name], None, scheme, of.dtype, of.importance[name])


def _rounded(of: Sources, name: str, scheme: Scheme) -> Packed:
    codes = of.codes(name)
    return rounded_zeros(codes.dequantize(), codes, scheme, of.dtype)


def _same(of: Sources, name: str, scheme: Scheme) -> Packed:
    return same_codes(of.codes(name), scheme, of.dtype)


def _portable(name: str, layer: QuantWeight, rows: bool) -> Scheme:
    if getattr(layer, "activations", None) == "int8":
        return Scheme(8, None, "dynamic")
    bits = 4 if layer.bits <= 4 else 8
    if layer.group_size == layer.columns and (rows or layer.columns not in GROUP_SIZES):
        return Scheme(bits, None)
    for size in GROUP_SIZES:
        if layer.group_size % size == 0:
            return Scheme(bits, size)
    raise ValueError(
        f"layer {name} has groups of {layer.group_size}; the formats that vLLM and transformers "
        f"share have groups of {', '.join(map(str, GROUP_SIZES))} or whole rows: quantize again "
        'with a multiple of 32, or ask for formats=["exact"], which transformers alone loads'
    )


def _exact(layer: QuantWeight) -> Scheme:
    if getattr(layer, "activations", None) == "int8":
        return Scheme(8, None, "dynamic")
    return Scheme(layer.bits, layer.group_size, "exact")
