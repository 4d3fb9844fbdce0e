"""A model built from a config alone: no memory for its weights, and no trust in the config.

A config of a few bytes can ask for a model of any size, or for code of its own. So a model is
first built on the meta device, where tensors have no memory, with no more of them than the weights'
file has; only when all shapes were compared with that file is it built with its computed buffers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cluster.storage.strict_json import MIB, broken, read_object, shown

CONFIG, GENERATION = "config.json", "generation_config.json"
# Keys whose value transformers takes as the name of code to load.
CODE_KEYS = re.compile(r"auto_map|custom_(pipelines|generate)|.*(attn|experts)_implementation.*")
# Keys whose value transformers may turn into as many objects before any tensor is made.
COUNT_KEYS = re.compile(r"(.*_)?(num|n|max)_.*|.*(layer|label|type|expert|head).*")
COUNT_LIMIT = 1 << 24
SPARE_LAYERS = 1000  # some configs have a count of layers that they do not use
CALLS_EACH = 100  # calls of torch for each tensor of the model while it is built; seen: below 10
COMPUTED_LIMIT = 256 * MIB  # buffers that are computed: tables of frequencies and positions
AGAIN = "copy the whole folder again"


def read_config(folder: Path, tensors: int) -> PreTrainedConfig:
    """The transformers config of a folder whose weights' file has `tensors` tensors.

    Raises ValueError (one line) when it is missing or broken, asks for code that is not part of
    transformers, or has counts that no such file can belong to.
    """
    path = folder / CONFIG
    found = read_object(path)
    for key, value in _walk(found):
        if CODE_KEYS.fullmatch(key):
            raise broken(
                path,
                f"{key} is {shown(value)}: it asks for code from elsewhere, which is never run; "
                "only architectures that are part of transformers load",
            )
        if type(value) is int and COUNT_KEYS.fullmatch(key):
            limit = tensors + SPARE_LAYERS if "layer" in key else COUNT_LIMIT
            if value > limit:
                raise broken(
                    path,
                    f"{key} is {shown(value)}, may be at most {limit} where the weights are "
                    f"{tensors} tensors; {AGAIN}",
                )
    if not isinstance(found.get("model_type"), str):
        raise broken(path, f"model_type is {shown(found.get('model_type'))}; must be a name")
    with _told(path, "transformers cannot read it"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def check_generation_config(folder: Path) -> bool:
    """Whether the folder has a generation config. Raises ValueError (one line) for a broken one."""
    path = folder / GENERATION
    if not path.exists():
        return False
    for key, value in _walk(read_object(path)):
        if CODE_KEYS.fullmatch(key):
            raise broken(path, f"{key} is {shown(value)}: code from elsewhere is never run")
        if key.endswith("token_id") and not _is_id(value):
            raise broken(
                path,
                f"{key} is {shown(value)}; must be a token id, a list of them, or null; {AGAIN}",
            )
    return True


def _is_id(value: object) -> bool:
    """Whether it is what transformers takes for a special token: an id, some, or none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return all(type(each) is int for each in ids)


def checked_meta_model(config: PreTrainedConfig, path: Path, tensors: int) -> PreTrainedModel:
    """The model of a config on the meta device: names and shapes, without any memory.

    Raises ValueError (one line) when transformers cannot build it, or when it is far larger than
    the `tensors` tensors that are there for it.
    """
    with (
        _told(path, "transformers cannot build a causal language model from it"),
        torch.device("meta"),
        _Bounded(CALLS_EACH * (tensors + 20), path),
    ):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    stored = set(model.state_dict())
    computed = sum(b.nbytes for name, b in model.named_buffers() if name not in stored)
    if computed > COMPUTED_LIMIT:
        raise broken(
            path,
            f"it asks for {shown(computed)} bytes of computed buffers; at most {COMPUTED_LIMIT} "
            f"are made; {AGAIN}",
        )
    return model


def hollow_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with its computed buffers, and weights on the meta device."""
    with EmptyOnMeta():
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )


class EmptyOnMeta(TorchFunctionMode):
    """Within the block `torch.empty` (how layers allocate weights) gives tensors without memory.

    All else is computed as usual, so that buffers which are not stored, such as a rotary
    embedding's frequencies, get their values: under `torch.device("meta")` they would be lost.
    """

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict | None = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Bounded(TorchFunctionMode):
    """Within the block torch may be called so many times: no config asks for layers for ever."""

    def __init__(self, calls: int, path: Path) -> None:
        super().__init__()
        self.calls = calls
        self.path = path

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict | None = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        self.calls -= 1
        if self.calls < 0:
            raise _TooLarge(
                self.path, f"its model has far more tensors than the weights' file; {AGAIN}"
            )
        return func(*args, **(kwargs or {}))


class _TooLarge(ValueError):
    def __init__(self, path: Path, text: str) -> None:
        super().__init__(str(broken(path, text)))


@contextlib.contextmanager
def _told(path: Path, text: str) -> Iterator[None]:
    """Turns whatever transformers raises for a bad config into one line that names the file."""
    try:
        yield
    except _TooLarge:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise broken(path, f"{text} ({cause}); {AGAIN}") from None


def _walk(found: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Every key with its value, also in nested objects; a list's items have the list's key."""
    left: list[tuple[str, object]] = list(found.items())
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, item) for item in value]
