"""A step of decoding, one token of one sequence, in one call of the C++ op.

transformers runs some 25 modules and 20 tensor operations per layer and token; for a small model
on a CPU that takes longer than the products. Here all layers run in
`torch.ops.stillhouse_cpu.decode`, on the codes that the layers' kernels hold, with keys and values
in buffers that have room to grow.

It stands in for a model's `forward` where it computes the same: models of Llama's kind whose
matrices are in the op's layout or dense, a dynamic cache, no padding, no gradients, no hooks.
Anything else takes the ordinary way, with the same cache.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from quant.kernels import native
from quant.kernels.blocks import Blocks
from quant.layers.linear import QuantLinear

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
READ = {"input_ids", "past_key_values", "attention_mask", "position_ids"}  # arguments of forward
# What generate gives beside them, and the values that change nothing here.
IDLE: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True),
    "return_dict": (None, True),
    "logits_to_keep": (0, 1),
    "cache_position": (),  # any: positions are counted by the cache
}
SPACE = 256  # positions that a buffer of keys and values grows by, or a half of what it has


def decode_step(model: PreTrainedModel, arguments: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """The output of `model.forward(**given)`, or None where the ordinary way has to be taken."""
    ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
    if (
        not isinstance(ids, Tensor)
        or ids.shape != (1, 1)
        or ids.device.type != "cpu"
        or type(cache) is not DynamicCache
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or model.training
    ):
        return None
    for name, value in arguments.items():
        if name not in READ and value is not None:
            allowed = IDLE.get(name)
            if allowed is None or (allowed and not any(value is each for each in allowed)):
                return None
    base = model.base_model
    decoder = vars(base).get("_decoder")
    if not isinstance(decoder, Decoder) or not decoder.holds():
        decoder = Decoder(model)
        object.__setattr__(base, "_decoder", decoder)
    if decoder.reason or any(decoder.hooks):
        return None
    logits = decoder.step(
        ids, cache, arguments.get("attention_mask"), arguments.get("position_ids")
    )
    return None if logits is None else CausalLMOutputWithPast(logits=logits, past_key_values=cache)


class Decoder:
    """What the op needs of one model; `reason` says why it cannot take it, or is empty.

    It is made of the layers' kernels, and made again once these or other weights change.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.weights: list[Tensor] = []
        self.sizes: list[int] = []
        # By cache: the buffers, and the views of them that it was given.
        self.caches: WeakKeyDictionary[DynamicCache, tuple[list[Tensor], list[Any]]]
        self.caches = WeakKeyDictionary()
        linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
        self._kernels = [(layer, layer._active) for layer in linears]
        self.hooks = [  # of its modules: empty, or they have to be called
            hooks
            for module in model.modules()
            if module is not model
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._tensors = [
            (module._parameters, name, tensor, _version(tensor), tensor.data_ptr())
            for module in model.modules()
            for name, tensor in module._parameters.items()
            if tensor is not None
        ]
        try:
            self._read(model)
            self.reason = ""
        except _Unsupported as unsupported:
            self.reason = str(unsupported)

    def holds(self) -> bool:
        """Whether the model is still the one that this was made of."""
        return all(layer._active is kernel for layer, kernel in self._kernels) and all(
            held.get(name) is tensor
            and _version(tensor) == version
            and tensor.data_ptr() == address
            for held, name, tensor, version, address in self._tensors
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the model makes its own

    def _read(self, model: PreTrainedModel) -> None:
        family = next((f for f in FAMILIES if type(model).__name__ == f"{f}ForCausalLM"), None)
        if family is None or not type(model).__module__.startswith("transformers.models."):
            raise _Unsupported("another architecture")
        if not any(isinstance(kernel, Blocks) for _, kernel in self._kernels):
            raise _Unsupported("no layer in the op's layout")
        config: Any = model.config
        base: Any = model.base_model
        self.embed, self.rotary, self.layers = base.embed_tokens, base.rotary_emb, len(base.layers)
        attention = base.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.heads = config.num_attention_heads
        self.pairs = config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.vnni = native.use_vnni()
        if getattr(config, "hidden_act", None) != "silu" or config.num_hidden_layers != self.layers:
            raise _Unsupported("another activation or number of layers")
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        if getattr(config, "sliding_window", None) is not None or set(kinds) != {"full_attention"}:
            raise _Unsupported("sliding windows")
        for layer in base.layers:
            attention, mlp = layer.self_attn, layer.mlp
            parts = {"DecoderLayer": layer, "Attention": attention, "MLP": mlp}
            for part, module in parts.items():
                if type(module).__name__ != family + part or "forward" in vars(module):
                    raise _Unsupported(f"another {part}")
            if attention.scaling != self.head_dim**-0.5:
                raise _Unsupported("another scale of attention")
            self._norm(layer.input_layernorm)
            for name in ("q_proj", "k_proj", "v_proj"):
                self._matrix(getattr(attention, name))
            for name in ("q_norm", "k_norm"):
                self._norm(getattr(attention, name, None))
            self._matrix(attention.o_proj)
            self._norm(layer.post_attention_layernorm)
            for name in ("gate_proj", "up_proj", "down_proj"):
                self._matrix(getattr(mlp, name))
        self._norm(base.norm)
        self._matrix(model.get_output_embeddings(), head=True)

    def _norm(self, module: Any) -> None:  # noqa: ANN401
        if module is None:
            self.weights.append(torch.empty(0))
            return
        if not type(module).__name__.endswith("RMSNorm") or module.variance_epsilon != self.eps:
            raise _Unsupported("another norm")
        self.weights.append(_plain(module.weight))

    def _matrix(self, module: Any, head: bool = False) -> None:  # noqa: ANN401
        bias = module.bias
        if type(module) is nn.Linear:
            weight = _plain(module.weight)
            self.weights += [_in_16_bits(weight) if head else weight, torch.empty(0)]
            self.sizes += weight.shape
        elif isinstance(module, QuantLinear) and isinstance(module._active, Blocks):
            kernel = module._active
            self.weights += [kernel.packed, kernel.grid]
            self.sizes += [kernel.rows, kernel.columns]
        else:
            raise _Unsupported("a layer that is neither dense nor in the op's layout")
        self.weights.append(torch.empty(0) if bias is None else _plain(bias))

    def step(
        self, ids: Tensor, cache: DynamicCache, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor | None:
        """Logits `[1, 1, vocab]` of the next token, the cache longer by one position."""
        layers: list[Any] = cache.layers
        if len(layers) != self.layers:
            return None
        length = layers[0].get_seq_length()
        if mask is not None and (mask.shape != (1, length + 1) or not bool(mask.all())):
            return None
        if positions is None:
            positions = torch.tensor([[length]])
        elif positions.shape != (1, 1):
            return None
        x = self.embed(ids)
        spaces = self._spaces(cache, length, x.dtype)
        if spaces is None:
            return None
        cos, sin = self.rotary(x, positions)
        if cos.shape[-1] != self.head_dim:
            return None
        logits = torch.ops.stillhouse_cpu.decode(
            x.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            self.weights,
            self.sizes,
            spaces,
            length,
            self.heads,
            self.eps,
            self.vnni,
        )
        views = []
        for layer, space in zip(layers, spaces, strict=True):
            both = space.narrow(2, 0, length + 1)
            layer.keys, layer.values = both[:1], both[1:]
            views.append((layer.keys, layer.values))
        self.caches[cache] = spaces, views
        return logits

    def _spaces(self, cache: DynamicCache, length: int, dtype: torch.dtype) -> list[Tensor] | None:
        """Per layer a buffer `[2, key heads, space, head size]` that holds what the cache does and
        has a free position; None where the cache is not of this model's shape.

        After a step the cache's own tensors are views of the buffers. Where it has others by now,
        somebody else has been at work, and they are copied.
        """
        layers: list[Any] = cache.layers
        spaces, views = self.caches.get(cache, ([], []))
        if spaces and spaces[0].shape[2] > length:
            held = zip(layers, views, strict=True)
            if all(layer.keys is keys and layer.values is values for layer, (keys, values) in held):
                return spaces
        shape = (1, self.pairs, length, self.head_dim)
        if length == 0 or not all(_is_plain(layer, shape, dtype) for layer in layers):
            return None
        size = length + max(SPACE, length // 2)
        spaces = []
        for layer in layers:
            space = torch.empty(2, self.pairs, size, self.head_dim, dtype=dtype)
            space[0, :, :length] = layer.keys[0]
            space[1, :, :length] = layer.values[0]
            spaces.append(space)
        return spaces


class _Unsupported(Exception):
    """Why the ordinary way is taken."""


def _is_plain(layer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:  # noqa: ANN401
    """Whether a layer of a cache has keys and values of this shape, and does nothing to them."""
    both: tuple[Tensor, Tensor] = (layer.keys, layer.values)
    return type(layer) is DynamicLayer and all(
        held.shape == shape and held.dtype == dtype and held.device.type == "cpu" for held in both
    )


def _version(tensor: Tensor) -> int:
    """Counts changes in place; of tensors made in inference mode nothing counts them."""
    return 0 if tensor.is_inference() else tensor._version


def _plain(tensor: Tensor) -> Tensor:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    if tensor.device.type != "cpu" or tensor.dtype not in kinds or not tensor.is_contiguous():
        raise _Unsupported("a weight on another device, or of another dtype")
    return tensor.detach()


def _in_16_bits(weight: Tensor) -> Tensor:
    """The same values in bfloat16 where they are such: half the bytes to read for each token."""
    if weight.dtype == torch.float32:
        narrow = weight.bfloat16()
        if torch.equal(narrow.float(), weight):
            return narrow
    return weight
