"""A quantized transformers model that saves itself as what it is.

It stays an instance of its own class (isinstance, config.architectures and what transformers asks
of a class hold on), with `quant_spec` and a `save_pretrained` of ours.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, TypeVar

from transformers import PreTrainedModel

from quant.layers.decode import decode_step
from quant.quant_spec import QuantSpec

Model = TypeVar("Model", bound=PreTrainedModel)

# What stock `save_pretrained` takes and its defaults. Another value asks for what one file of
# codes cannot give; `is_main_process` is honoured.
STOCK: dict[str, tuple[Any, ...]] = {
    "state_dict": (None,),
    "push_to_hub": (False,),
    "max_shard_size": (None, "50GB"),
    "variant": (None,),
    "token": (None,),
    "safe_serialization": (None, True),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
}


class QuantizedModel:
    """What a quantized model has beside all that its own class gives it."""

    quant_spec: QuantSpec

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write codes, config and description into the folder, for `quant.artifact.load_quantized`.

        Other processes than the main one write nothing. Raises ValueError (one line) for an
        argument of transformers' own `save_pretrained` that cannot be honoured.
        """
        from quant.artifact.save import save_quantized

        for name, value in kwargs.items():
            allowed = STOCK.get(name, ())
            if not any(value is each or value == each for each in allowed):
                default = f"; may be {allowed[0]!r}" if allowed else "; there is no such argument"
                raise ValueError(
                    f"save_pretrained: {name}={_short(value)} cannot be honoured for a quantized "
                    f"model, whose codes are saved as one file of this project{default}"
                )
        if is_main_process:
            model: Any = self
            model.config.architectures = [type(self).__name__]  # as transformers does
            save_quantized(model, Path(save_directory), self.quant_spec)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises ValueError: transformers could not load what it would upload."""
        raise ValueError(
            "push_to_hub: transformers cannot load a quantized model of this project; export it "
            "(quant.export) and upload that folder, or upload the folder of save_pretrained"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises ValueError: codes cannot grow."""
        raise ValueError(
            "resize_token_embeddings: the model is quantized; resize the 16-bit model and "
            "quantize that"
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a tied head works on the embedding's codes already."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is made at run time and has no name to be found by: name the original.
        reduced: Any = super().__reduce_ex__(max(2, protocol.__index__()))
        return (_bare, (type(self).__mro__[2],), *reduced[2:])


def mark_quantized(model: Model, spec: QuantSpec) -> Model:
    """Give a model whose layers are quantized its `quant_spec` and `save_pretrained`, in place.

    It can be copied and pickled, and is still of its class.
    """
    kind: Any = type(model)
    model.__class__ = quantized_class(kind)
    model.quant_spec = spec  # type: ignore[assignment]
    return model


@functools.cache
def quantized_class(original: Any) -> Any:  # noqa: ANN401
    """`original` with the methods of `QuantizedModel`, under the same name; one for each class.

    Calling it (and so its `from_pretrained`) makes an `original`, which is not quantized.
    """
    if issubclass(original, QuantizedModel):
        return original
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__new__": lambda cls, *args, **kwargs: original(*args, **kwargs),
        "forward": _with_decode_step(original.forward),
    }
    return type(original.__name__, (QuantizedModel, original), names)


def _with_decode_step(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, but a single token of what the C++ op can run goes through that."""

    @functools.wraps(forward)  # transformers looks at its arguments
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        made = None if args else decode_step(self, kwargs)
        return forward(self, *args, **kwargs) if made is None else made

    return either


def _bare(original: Any) -> Any:  # noqa: ANN401
    """An empty quantized `original`: what pickle and copy fill with state."""
    return object.__new__(quantized_class(original))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"<{type(value).__name__}>"
