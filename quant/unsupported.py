"""What of a model cannot be quantized: fused experts, layers with a forward of their own.

Such weights stay in 16 bits. Where they are many, a model that is called 4-bit would not be one:
they are refused by name, unless the caller lists them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class LayersError(ValueError):
    """What is wrong with the argument `layers` (see `quant.targets.find_targets`), one line.

    pattern: the entry at fault; None: one is missing. keep: names and globs that have to be listed
    as None. A caller whose users write neither says so in its own words: `line`.
    """

    argument = "layers"

    def __init__(self, what: str, pattern: str | None = None, keep: Sequence[str] = ()) -> None:
        self.what, self.pattern, self.keep = what, pattern, tuple(keep)
        listed = ", ".join(f"{each!r}: None" for each in keep)
        super().__init__(self.line(f"layers[{pattern!r}]:", f"layers={{{listed}}}"))

    def line(self, entry: str, keep: str) -> str:
        """The fault, with the caller's words for the entry and for listing what `keep` has."""
        parts = (entry if self.pattern is not None else "", self.what, keep if self.keep else "")
        return " ".join(part for part in parts if part)

    def __reduce__(self) -> tuple[type[LayersError], tuple[str, str | None, tuple[str, ...]]]:
        return type(self), (self.what, self.pattern, self.keep)


# Share of the weights, in percent, that may stay in 16 bits without being listed: short
# convolutions, state-space matrices, gates of a recurrence.
SMALL_PERCENT = 1.0
# Classes whose weights choose experts: [experts, hidden], tiny, and one wrong choice costs more
# than their bytes. All formats in use leave them as they are.
ROUTER = re.compile(r"Router|TopKGating|MoE(V\d+)?Gate$")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes exactly what `nn.Linear` does, and nobody reads its weight."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not isinstance(module, NonDynamicallyQuantizableLinear)  # read by MultiheadAttention
    )


def is_matrix(module: nn.Module) -> bool:
    """Whether the module holds one weight that can become codes of a linear layer."""
    return type(module) is Conv1D or is_plain_linear(module)


def matches(pattern: str, name: str) -> bool:
    """Whether the glob matches `name` (a module's or a weight's) or a module that it lies in."""
    parts = name.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(fnmatchcase(each, pattern) for each in above)


def inside(name: str, names: Collection[str]) -> bool:
    """Whether the module `name` is one of `names` or lies in one of them."""
    return any(name == other or name.startswith(f"{other}.") for other in names)


def kept_modules(model: PreTrainedModel) -> dict[str, str]:
    """Modules that stay in 16 bits with all below them, and why: {name: reason}.

    Routers of experts and their gates; towers that read no text (vision, audio).
    """
    reasons = {}
    for name, module in model.named_modules():
        if ROUTER.search(type(module).__name__) or name.endswith("shared_expert_gate"):
            reasons[name] = "router"
        elif (
            isinstance(module, PreTrainedModel)
            and module is not model
            and getattr(module, "main_input_name", "input_ids")
            not in ("input_ids", "inputs_embeds")
        ):
            reasons[name] = "tower of another modality"
    return reasons


@dataclass(frozen=True)
class Unsupported:
    """A weight that cannot become codes; `name` is its own, `module` holds it."""

    name: str
    module: nn.Module
    weight: Tensor

    @property
    def strict(self) -> bool:
        """Whether it is a linear layer of a kind of its own: refused however small it is."""
        linear = isinstance(self.module, nn.Linear)
        return linear and not isinstance(self.module, NonDynamicallyQuantizableLinear)


def unsupported_weights(model: PreTrainedModel, skipped: Collection[str]) -> list[Unsupported]:
    """Weights of more than one dimension that are no linear layer's and no table's.

    What lies in the modules `skipped` is left out.
    """
    found = []
    for name, module in model.named_modules():
        if is_matrix(module) or isinstance(module, nn.Embedding) or inside(name, skipped):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.is_floating_point() and sum(size > 1 for size in weight.shape) > 1:
                found.append(Unsupported(f"{name}.{own}" if name else own, module, weight))
    return found


def check_unsupported(model: PreTrainedModel, left: list[Unsupported]) -> None:
    """Raise LayersError (one line) for weights that would stay in 16 bits and are not few.

    It names them, their share of the weights and what leaves them so knowingly.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    few = sum(item.weight.numel() for item in left) <= total * SMALL_PERCENT / 100
    refused = [item for item in left if item.strict or not few]
    if not refused:
        return
    share = 100 * sum(item.weight.numel() for item in refused) / total
    kinds = []
    for kind in dict.fromkeys(type(item.module) for item in refused):
        first, *rest = [item for item in refused if type(item.module) is kind]
        shape = ", ".join(map(str, first.weight.shape))
        more = f" and {len(rest)} more" if rest else ""
        kinds.append(f"{first.name} [{shape}]{more} of {kind.__name__}")
    raise LayersError(
        f"{type(model).__name__} has weights that cannot be quantized and would stay in 16 bits, "
        f"{share:.1f} % of all: {'; '.join(kinds)}; to leave them so knowingly, say",
        keep=_patterns(model, refused),
    )


def _patterns(model: PreTrainedModel, refused: list[Unsupported]) -> list[str]:
    """Globs that match what is refused and no layer that can be quantized, modules first."""
    others = [name for name, module in model.named_modules() if is_matrix(module)]
    patterns = []
    for item in refused:
        *path, own = item.name.split(".")
        ends = ["*." + ".".join(path[-length:]) for length in range(1, len(path))]
        alone = (end for end in (*ends, f"*.{own}") if not any(matches(end, n) for n in others))
        patterns.append(next(alone, item.name))
    return list(dict.fromkeys(patterns))
