"""How many bytes a model really takes, and how many bits per weight that is."""

from __future__ import annotations

from torch import Tensor, nn

from quant.linear import quant_linears


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of the model holds: (tensors by name, each once; {tied name: kept name}).

    Covers parameters and persistent buffers; packed codes, scales and zeros are among them.
    """
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Two parameter objects may share one storage; on the meta device all pointers are 0.
        key: object = id(tensor)
        if tensor.device.type != "meta" and tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key in names:
            tied[name] = names[key]
        else:
            names[key] = name
            kept[name] = tensor.detach()
    return kept, tied


def parameter_count(model: nn.Module) -> int:
    """Number of weights, tied ones once; of a quantized model: of the model it was made from."""
    plain = sum(parameter.numel() for parameter in model.parameters())
    layers = {id(layer): layer for layer in quant_linears(model).values()}.values()
    return plain + sum(layer.out_features * layer.in_features for layer in layers)


def true_bytes(model: nn.Module) -> int:
    """All bytes of codes, scales, zeros and unquantized tensors, tied ones once."""
    kept, _ = stored_tensors(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def true_bits_per_weight(model: nn.Module) -> float:
    """`true_bytes` in bits over `parameter_count`: scales, embeddings and head included."""
    return 8 * true_bytes(model) / parameter_count(model)


def dense_bytes(model: nn.Module, bytes_per_weight: int = 2) -> int:
    """Bytes of the unquantized model as deployed, in 16 bits unless told otherwise."""
    return parameter_count(model) * bytes_per_weight
