"""A teacher whose weights are shared out over a group of ranks: DeepSpeed ZeRO-3, forward only.

DeepSpeed gathers a module's weights before the module runs and drops them after it, within the
process group that the weights were partitioned over. Groups are independent: nothing here waits
for a rank of another group once the engine is there.

Mixtures of experts need care. ZeRO-3 gathers a module's weights when the module is called, and all
ranks of a group must gather the same ones in the same order. An expert that is a module of its own
is called only on the ranks whose tokens chose it, and the others would wait for ever. So the module
around such experts is made a leaf: all that is in it is gathered before it runs, whoever is called.
Experts held as one tensor need nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.losses.fused_linear import Head, head_of
from trainer.models.head import check_head
from trainer.models.load import count_parameters
from trainer.teacher.load import stream_model
from trainer.worker import Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedConfig, PreTrainedModel

# How configs name the number of experts.
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def check_shardable(config: PreTrainedConfig) -> None:
    """Raises ValueError, one line, if ZeRO-3 cannot shard a model of this transformers config."""
    from trainer.models.load import meta_model

    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"teacher.sharding: zero3 does not work for a quantized {config.model_type}; use "
            "sharding: none on workers with enough memory"
        )
    if has_experts(config) and not _expert_modules(meta_model(config)):
        raise ValueError(
            f"teacher.sharding: zero3 does not work for {config.model_type}, a mixture of experts "
            "whose experts this version does not find; use sharding: none on workers with enough "
            "memory"
        )


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a transformers config is of a mixture of experts."""
    text = config.get_text_config()
    return any(_count(getattr(text, name, None)) > 1 for name in COUNTS)


def _count(value: Any) -> int:  # noqa: ANN401
    """A number of experts; some configs give one for each layer."""
    return max(value, default=0) if isinstance(value, (list, tuple)) else int(value or 0)


def _expert_modules(model: nn.Module) -> list[nn.Module]:
    """Modules named for experts that hold weights, or hold modules that do."""
    return [
        module
        for name, module in model.named_modules()
        if "expert" in name.rpartition(".")[2].lower()
        or ("expert" in type(module).__name__.lower() and next(module.parameters(False), None))
    ]


def mark_leaves(model: nn.Module) -> list[nn.Module]:
    """Makes the modules around experts that are modules of their own leaves; returns them."""
    from deepspeed.utils import set_z3_leaf_module

    leaves = [
        module
        for module in model.modules()
        if any(
            isinstance(child, (nn.ModuleList, nn.ModuleDict)) and "expert" in name.lower()
            for name, child in module.named_children()
        )
    ]
    for module in leaves:
        set_z3_leaf_module(module, True)
    return leaves


# Elements that are gathered ahead at most, for modules that run next.
PREFETCH = 50_000_000
# glibc's mallopt parameter, and the values for it here and (its own upper end) everywhere else.
M_MMAP_THRESHOLD, GIVE_BACK, KEEP = -3, 1 << 20, 32 << 20


class ShardedEngine:
    """The sharded module, called like the module itself; every rank of the group calls it alike."""

    def __init__(self, engine: DeepSpeedEngine, group: Worker) -> None:
        self._engine, self._group = engine, group

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The module's outputs; collective within the group."""
        with torch.no_grad(), _same_within(self._group):
            outputs = self._engine(*args, **kwargs)
        # The head's weight is read outside its own module. From the next pass on DeepSpeed would
        # gather it before the first layer and hold it to the end.
        root = self._engine.module
        for parameter in root.head().parameters():
            for module in root.modules():
                module._external_params.pop(id(parameter), None)
        return outputs

    @contextmanager
    def gathered_head(self, vocab: int) -> Iterator[Head]:
        """The model's output head, whole as long as the context lasts; collective in the group."""
        import deepspeed

        root = self._engine.module
        with deepspeed.zero.GatheredParameters(list(root.head().parameters()), modifier_rank=None):
            head = head_of(root.module.model, vocab)
            # Plain tensors: what uses them knows nothing of the partitions behind them.
            bias = None if head.bias is None else head.bias.data
            yield replace(head, weight=head.weight.data, bias=bias)

    def held(self) -> int:
        """Bytes of weights on this rank now: its partition, and what is gathered."""
        return sum(
            tensor.numel() * tensor.element_size()
            for parameter in self._engine.module.parameters()
            for tensor in (parameter.ds_tensor, parameter.data)
        )

    def close(self) -> None:
        """Frees the weights; DeepSpeed's module-wide lists would keep them for good."""
        module = self._engine.module
        self._engine.destroy()
        forget(module)
        for parameter in module.parameters():
            empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            parameter.ds_tensor.data = parameter.data = empty
        _give_back_from(KEEP)


class _Root(nn.Module):
    """What the engine wraps: the module, and a look at the model's head in the same surroundings.

    The module has its causal language model as `model`.
    """

    def __init__(self, module: nn.Module, vocab: int) -> None:
        super().__init__()
        self.module, self.vocab = module, vocab

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The module's outputs; without arguments the check of the head."""
        if args:
            return self.module(*args, **kwargs)
        model: Any = self.module.model
        check_head(model, self.vocab)
        return None

    def head(self) -> nn.Module:
        """The model's output head."""
        model: Any = self.module.model
        return model.get_output_embeddings()


def load_sharded(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    group: Worker,
    wrap: Callable[[Any], nn.Module],
    vocab: int,
) -> ShardedEngine:
    """`wrap(model)` over a model of which each rank of `group` holds its share; collective.

    Beyond its share a rank holds at most the largest layer: a block of the model, its embeddings or
    its head, whichever is largest. Collective over all ranks, as DeepSpeed makes process groups of
    its own. Raises ValueError for a checkpoint that does not fit, and for a head that this version
    does not know.
    """
    import deepspeed

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 1 << 30,
    }
    if group.device.type == "cpu":
        _give_back_from(GIVE_BACK)
    with group.limiting():
        init = deepspeed.zero.Init(data_parallel_group=group.group, config_dict_or_path=settings)

        def take(parameters: list[Any]) -> None:
            for parameter in parameters:
                init._convert_to_deepspeed_param(parameter)
                parameter.partition()

        model = stream_model(folder, config, dtype, group.device, take)
        mark_leaves(model)
        settings["zero_optimization"] |= _limits(model)
        root = _Root(wrap(model), vocab).eval()
        engine, *_ = deepspeed.initialize(model=root, config=settings)
    sharded = ShardedEngine(engine, group)
    sharded()
    return sharded


def forget(module: nn.Module) -> None:
    """Takes an engine's module out of DeepSpeed's list, which would keep its weights for good.

    An engine of ZeRO-3 enters its module there, and `destroy` leaves it.
    """
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]


def largest_layer(model: Any) -> int:  # noqa: ANN401
    """Elements of the largest block of a model, or of its head, or of all that is outside those."""
    blocks = _blocks(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    head = model.get_output_embeddings() or nn.Identity()  # without one it is refused later
    own = {id(p) for p in head.parameters()} - {id(p) for p in model.base_model.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside | own]
    return max([count_parameters(part) for part in [*blocks, head]] + [sum(map(_size, rest))])


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that a model is stacked of, and whatever else it has in lists."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for module in lists for block in module]


def _size(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _limits(model: Any) -> dict[str, Any]:  # noqa: ANN401
    """DeepSpeed's settings that keep no more gathered than the largest layer of `model`."""
    blocks = _blocks(model)
    piece = max((_size(p) for block in blocks for p in block.parameters()), default=0)
    return {
        # What is gathered ahead may go over the limit by one parameter.
        "stage3_max_live_parameters": max(0, largest_layer(model) - piece),
        "stage3_prefetch_bucket_size": min(PREFETCH, max(map(count_parameters, blocks), default=0)),
        # No weight stays gathered because it is small, or because it will be needed again.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        # One buffer per parameter; else all are gathered into one and copied out of it.
        "stage3_allgather_sequential": True,
    }


def _give_back_from(size: int) -> None:
    """Lets freed memory of `size` bytes and more go back to the system at once.

    Weights come and go with every layer. glibc would soon keep what is freed for later, in pieces
    that add up to more than the whole model.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)
    except (OSError, AttributeError):
        return  # another C library has no such habit, and no such function


@contextmanager
def _same_within(group: Worker) -> Iterator[None]:
    """DeepSpeed's check that ranks run the same modules, among the ranks of `group` alone.

    DeepSpeed makes it over all ranks, which would tie together groups that work apart.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    def check(numbers: list[int]) -> None:
        if group.share(list(numbers)) != list(numbers):
            raise RuntimeError("ranks of one group ran different modules of the teacher")

    own = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = check
    try:
        yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = own
