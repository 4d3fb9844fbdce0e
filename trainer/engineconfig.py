"""The DeepSpeed configuration of a training, and what a spec may lay over it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.spec import DistillSpec

# Sections of DeepSpeed's configuration that may be given: they change how fast a training runs, in
# how much memory, and what it tells of itself; never what is learnt.
FREE = (
    "comms_logger",
    "communication_data_type",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization",
)
# Keys that are made from others of the spec, which own them.
OWNED = {
    "train_batch_size": "distill.tokens_per_step",
    "train_micro_batch_size_per_gpu": "distill.micro_batch",
    "gradient_accumulation_steps": "distill.tokens_per_step and distill.micro_batch",
    "gradient_clipping": "distill.max_grad_norm",
    "zero_optimization.stage": "distill.zero_stage",
    "zero_optimization.offload_optimizer": "distill.offload",
    "zero_optimization.offload_param": "distill.offload",
    "zero_optimization.cpu_offload": "distill.offload",
    "zero_optimization.cpu_offload_param": "distill.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "distill.offload",
    "zero_optimization.zenflow": "distill.offload",
    "zero_optimization.compute_grad_norm": "distill.max_grad_norm",
    "zero_force_ds_cpu_optimizer": "distill.offload",
    "bf16": "distill.dtype",
    "fp16": "distill.dtype",
    "amp": "distill.dtype",
    "torch_autocast": "distill.dtype",
    "data_types": "distill.dtype",
    "optimizer": "distill.learning_rate, distill.weight_decay and distill.betas",
    "zero_allow_untested_optimizer": "distill.learning_rate and the keys beside it",
    "scheduler": "distill.schedule and distill.warmup_ratio",
    "activation_checkpointing": "distill.activation_checkpointing",
    "checkpoint": "distill.checkpoint_minutes and distill.keep_checkpoints",
    "aio": "distill.offload",
    "tensorboard": "tracking",
    "csv_monitor": "tracking",
    "wandb": "tracking",
    "comet": "tracking",
}
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def training_config(
    spec: DistillSpec, micro_batch: int, accumulation: int, world: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for training; master weights and gradients are float32.

    offload: cpu keeps master weights and optimizer state in host memory, where torch's own AdamW
    updates them (ZeRO-Offload, Ren et al., 2021).
    """
    zero: dict[str, Any] = {"stage": spec.zero_stage}
    if spec.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": _has_gpu()}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "zero_optimization": zero,
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": spec.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the CPU too; DeepSpeed's needs a compiler on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
    return merged(config, spec.deepspeed)


def merged(config: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `overlay` laid over it, section by section; neither is changed."""
    result = dict(config)
    for key, value in overlay.items():
        under = result.get(key)
        if isinstance(value, Mapping):
            result[key] = merged(under if isinstance(under, Mapping) else {}, value)
        else:
            result[key] = _number(value)
    return result


def _number(value: Any) -> Any:
    """YAML has 1e6 as a text, where 1.0e+6 is a number."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def overlay_faults(spec: DistillSpec) -> list[str]:
    """One line per key of `distill.deepspeed` that is another key's, or none of DeepSpeed's.

    Costs the import of DeepSpeed where there is such a key.
    """
    overlay = spec.deepspeed
    faults = []
    if not isinstance(overlay.get("zero_optimization", {}), Mapping):
        faults.append(
            f"distill.deepspeed.zero_optimization: got {overlay['zero_optimization']!r}; may be a "
            "section, e.g. {reduce_bucket_size: 50000000}"
        )
    for path in _paths(overlay):
        key = f"distill.deepspeed.{path}"
        if path in OWNED:
            faults.append(f"{key}: may not be given; {OWNED[path]} says it")
        elif "." not in path and path not in FREE:
            faults.append(f"{key}: is not taken by this version; may be one of {', '.join(FREE)}")
    if faults or not overlay:
        return faults
    return _deepspeed_faults(spec)


def _paths(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _deepspeed_faults(spec: DistillSpec) -> list[str]:
    """What DeepSpeed's own reading of the configuration has to say, and keys that it skips."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    read = _Read(training_config(spec, 1, 1, 1))
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        return [
            f"distill.deepspeed: {error.title.removeprefix('DeepSpeed')}: "
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']} (got {fault['input']!r})"
            for fault in error.errors()
        ]
    except Exception as error:  # its own checks raise many kinds
        reason = " ".join(str(error).split())[:300]
        return [f"distill.deepspeed: DeepSpeed does not take it: {reason}"]
    return [
        f"distill.deepspeed.{path}: is no key that DeepSpeed reads"
        for path in _paths(spec.deepspeed)
        # What is deeper is inside of sections that know all their keys, or hold any.
        if path.count(".") < 2 and path not in read.seen
    ]


class _Read(dict[str, Any]):
    """A configuration that remembers which of its keys were asked for, by their dotted paths."""

    def __init__(
        self, values: Mapping[str, Any], prefix: str = "", seen: set[str] | None = None
    ) -> None:
        self.prefix, self.seen = prefix, set() if seen is None else seen
        super().__init__(
            {
                key: _Read(value, f"{prefix}{key}.", self.seen)
                if isinstance(value, dict)
                else value
                for key, value in values.items()
            }
        )

    def __getitem__(self, key: str) -> Any:
        self.seen.add(self.prefix + key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary."""
        self.seen.add(self.prefix + key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        # Without it `**` would copy the values behind our back.
        return super().__iter__()

    def items(self) -> Any:
        """As of a dictionary; who goes through all of it reads all of it."""
        self.seen |= {self.prefix + key for key in self}
        return super().items()

    def __copy__(self) -> _Read:
        return self
