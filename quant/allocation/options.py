"""What each layer of a model may become, and the bytes that each choice takes in the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel

from quant.artifact.sizes import layer_slots, plain_tensors
from quant.codes import BLOCK
from quant.quant_spec import CHANNEL, DYNAMIC, GroupSize, QuantSpec
from quant.targets import Layers, Target, Targets, find_targets
from trainer.models.load import meta_model

SIXTEEN = "16b"  # key of the option that leaves a layer as it is
SIXTEEN_BYTES = 2  # of a weight that is not quantized, whatever dtype the model is loaded in


@dataclass(frozen=True)
class Option:
    """One choice for one layer. spec: how it is quantized; None: it stays in 16 bits. bytes: those
    of its codes, scales and zeros in the file, or of its 16-bit weights."""

    spec: QuantSpec | None
    bytes: int

    @property
    def key(self) -> str:
        """Names it among the options of its layer, e.g. ``3b-g64``, ``16b``."""
        if self.spec is None:
            return SIXTEEN
        size = self.spec.group_size
        return f"{self.spec.bits}b-{size if size == CHANNEL else f'g{size}'}"


@dataclass(frozen=True)
class Options:
    """layers: {name of the layer: its options, smallest first}. fixed_bytes: of all else that the
    file holds: norms, biases, what stays in 16 bits."""

    layers: dict[str, tuple[Option, ...]]
    fixed_bytes: int

    def total(self, chosen: Mapping[str, Option]) -> int:
        """Bytes of the model with these options, one for each layer."""
        return self.fixed_bytes + sum(option.bytes for option in chosen.values())

    def of(self, layers: Layers) -> dict[str, Option]:
        """The options that a spec (or None) of each layer stands for.

        Raises ValueError (one line) for a layer or a spec that is not among the options.
        """
        found = {}
        for name, options in self.layers.items():
            if name not in layers:
                raise ValueError(f"layer {name} has no spec; may be one of {_keys(options)}")
            spec = layers[name]
            match = next((option for option in options if option.spec == spec), None)
            if match is None:
                raise ValueError(f"layer {name} has no option {spec}; may be {_keys(options)}")
            found[name] = match
        return found

    @property
    def smallest(self) -> int:
        """Bytes of the smallest model that the options allow."""
        return self.fixed_bytes + sum(options[0].bytes for options in self.layers.values())

    @property
    def sixteen_bit(self) -> int:
        """Bytes of the model with every weight in 16 bits, an option that every layer has."""
        kept = (o for options in self.layers.values() for o in options if o.spec is None)
        return self.fixed_bytes + sum(option.bytes for option in kept)


def layer_options(
    model: PreTrainedModel | PreTrainedConfig,
    base: QuantSpec,
    choices: Iterable[tuple[int, GroupSize]],
    keep_16bit: Iterable[str] = (),
) -> Options:
    """The options of every layer that `base` quantizes: all `choices` that fit it, and 16 bits.

    base: its method, and whether embeddings and head are layers to choose for (tied, they are
    one); its bits and group size do not count. choices: (bits, group size); a group size that does
    not divide a layer is left out for it, as is one that is the same as another (a row of 64 in
    groups of 64 and per channel). keep_16bit: names or globs of modules that are no choice. A model
    on the meta device, or a config, is enough.

    Raises ValueError (one line) as `find_targets` does, for no choice at all, int8-dynamic, and
    layers that share a weight with another module, whose bytes depend on what that becomes.
    """
    model = meta_model(model)
    points = list(dict.fromkeys(choices))
    if not points:
        raise ValueError("choices is empty; may be pairs of bits and group size, e.g. [(4, 64)]")
    if base.method == DYNAMIC:
        raise ValueError(f"{DYNAMIC} has one width: there is nothing to choose; may be hqq or rtn")
    specs = [replace(base, bits=bits, group_size=size) for bits, size in points]
    targets = _targets(model, base, dict.fromkeys(keep_16bit))
    _check_shared(model, targets)
    layers = {name: _options(target, specs) for name, target in targets.layers.items()}
    weights = sum(target.weights for target in targets.layers.values())
    return Options(layers, _sixteen_bit_bytes(model) - SIXTEEN_BYTES * weights)


def uniform_bytes(
    model: PreTrainedModel | PreTrainedConfig, spec: QuantSpec, keep_16bit: Iterable[str] = ()
) -> int:
    """`true_bytes` of the model quantized by `spec` everywhere, without quantizing it.

    Raises ValueError (one line) as `find_targets` does.
    """
    model = meta_model(model)
    targets = find_targets(model, spec, dict.fromkeys(keep_16bit))
    _check_shared(model, targets)
    saved = sum(SIXTEEN_BYTES * t.weights - _bytes(t, spec) for t in targets.layers.values())
    return _sixteen_bit_bytes(model) - saved


def _targets(model: PreTrainedModel, base: QuantSpec, kept: Layers) -> Targets:
    """What `base` quantizes, whatever its group size: one per channel divides every row."""
    return find_targets(model, QuantSpec(8, CHANNEL, base.method, base.embeddings, base.head), kept)


def _options(target: Target, specs: Iterable[QuantSpec]) -> tuple[Option, ...]:
    found: dict[tuple[int, int], Option] = {}
    for spec in specs:
        size = _size(target, spec)
        if size % BLOCK == 0 and target.columns % size == 0:
            found.setdefault((spec.bits, size), Option(spec, _bytes(target, spec)))
    sixteen = Option(None, SIXTEEN_BYTES * target.weights)
    return tuple(sorted([*found.values(), sixteen], key=lambda option: option.bytes))


def _size(target: Target, spec: QuantSpec) -> int:
    return target.columns if spec.group_size == CHANNEL else int(spec.group_size)


def _bytes(target: Target, spec: QuantSpec) -> int:
    """Bytes of the file's tensors of a quantized layer."""
    slots = layer_slots(target.rows, target.columns, spec.bits, _size(target, spec))
    return sum(slot.bytes for slot in slots.values())


def _sixteen_bit_bytes(model: PreTrainedModel) -> int:
    """Bytes of all that a file of the unquantized model holds, floats in 16 bits, tied ones once:
    what `quantize` makes of weights that it does not quantize."""
    tensors, _ = plain_tensors(model)
    return sum(
        tensor.numel() * (SIXTEEN_BYTES if tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors.values()
    )


def _check_shared(model: PreTrainedModel, targets: Targets) -> None:
    """No weight of a target may be held by a module that is not the target's."""
    _, tied = plain_tensors(model)
    for name, target in targets.layers.items():
        own = {f"{each}.weight" for each in (*target.names, *target.head_names)}
        for one, other in tied.items():
            if (one in own) != (other in own):
                outside = other if one in own else one
                raise ValueError(
                    f"layer {name} shares its weight with {outside.removesuffix('.weight')}: its "
                    "bytes depend on what that becomes; keep it in 16 bits, or quantize uniformly"
                )


def _keys(options: Iterable[Option]) -> str:
    return ", ".join(option.key for option in options)
