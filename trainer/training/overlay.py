"""What of DeepSpeed's configuration a spec may give, below `distill.deepspeed`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from cluster.storage.section import Section
from trainer.spec.errors import SpecReader
from trainer.spec.sections import DistillSpec
from trainer.training.engine import training_config


class CommsLogger(Section):
    """DeepSpeed's log of collectives."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default_factory=list)
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(Section):
    """DeepSpeed's count of operations; it checks none of these itself."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: int = Field(1, ge=1)
    module_depth: int = Field(-1, ge=-1)
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class Overlay(Section):
    """What of DeepSpeed's configuration may be given: it changes how fast a training runs, in how
    much memory, and what it tells of itself; never what is learnt or how a training resumes."""

    zero_optimization: dict[str, Any] = Field(default_factory=dict)  # read by DeepSpeed itself
    comms_logger: CommsLogger = CommsLogger()
    dump_state: bool = False
    flops_profiler: FlopsProfiler = FlopsProfiler()
    memory_breakdown: bool = False
    steps_per_print: int = Field(1 << 30, ge=1)
    wall_clock_breakdown: bool = False


class _Distill(Section):
    deepspeed: Overlay


class _Spec(Section):
    distill: _Distill


_READER = SpecReader(_Spec, lambda spec, at_fault: [])
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
    "communication_data_type": "distill.dtype",
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
# Keys that no other says, and why they may not be given.
REFUSED = {
    "gradient_predivide_factor": "it changes how gradients are summed",
    "prescale_gradients": "it changes how gradients are summed",
    "zero_optimization.zero_quantized_gradients": "it trains with other gradients",
    "zero_optimization.zero_quantized_weights": "it trains with other weights",
    "zero_optimization.zero_quantized_nontrainable_weights": "it trains with other weights",
    "zero_optimization.zero_hpz_partition_size": "checkpoints of it do not load everywhere",
    "zero_optimization.mics_shard_size": "checkpoints of it do not load everywhere",
    "zero_optimization.mics_hierarchical_params_gather": "checkpoints of it do not load everywhere",
    "zero_optimization.load_from_fp32_weights": "a resumed training would be another",
    "zero_optimization.elastic_checkpoint": "checkpoints here are elastic by themselves",
    "zero_optimization.legacy_stage1": "checkpoints of it do not load everywhere",
    "zero_optimization.round_robin_gradients": "checkpoints of it do not load everywhere",
    "zero_optimization.sub_group_size": "checkpoints of it do not load everywhere",
    "zero_optimization.parameter_alignment": "checkpoints of it do not load everywhere",
    "zero_optimization.pipeline_loading_checkpoint": "it changes how a training resumes",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
}


def overlay_faults(spec: DistillSpec) -> list[str]:
    """One line per key of `distill.deepspeed` that is another key's, unknown, or no such value.

    Costs the import of DeepSpeed where the rest is sound.
    """
    if not spec.deepspeed:
        return []
    faults, rest = [], copy.deepcopy(spec.deepspeed)
    for section, key, path in list(_keys(rest)):
        if not isinstance(key, str):
            where = ".".join(["distill.deepspeed", *path.split(".")[:-1]])
            why = f"{where}: has the key {key!r}, which is no text; keys of DeepSpeed are"
        elif path in OWNED:
            why = f"distill.deepspeed.{path}: may not be given; {OWNED[path]} says it"
        elif path in REFUSED:
            why = f"distill.deepspeed.{path}: may not be given; {REFUSED[path]}"
        else:
            continue
        faults.append(why)
        del section[key]
    faults += _READER.read({"distill": {"deepspeed": rest}})[1]
    return faults or _zero_faults(spec)


def _keys(section: dict[Any, Any], prefix: str = "") -> Iterator[tuple[dict[Any, Any], Any, str]]:
    """Every key with the section it is of and its dotted path, from the inside out."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        yield section, key, f"{prefix}{key}"


def _zero_faults(spec: DistillSpec) -> list[str]:
    """What DeepSpeed's own reading of the configuration has to say."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        DeepSpeedConfig(training_config(spec, 1, 1, 1))
    except ValidationError as error:
        # All other sections have been read already.
        return [_zero_line(fault) for fault in error.errors()]
    except Exception as error:  # its own checks raise many kinds
        reason = " ".join(str(error).split())[:300]
        return [f"distill.deepspeed: DeepSpeed does not take it: {reason}"]
    return []


def _zero_line(fault: Any) -> str:  # noqa: ANN401
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    path = ".".join(["zero_optimization", *map(str, fault["loc"])])
    key = f"distill.deepspeed.{path}"
    if fault["type"] != "extra_forbidden":
        return f"{key}: {fault['msg'].removeprefix('Value error, ')} (got {fault['input']!r})"
    names = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    taken = {f"zero_optimization.{name}": name for name in names}
    known = [name for full, name in taken.items() if full not in OWNED and full not in REFUSED]
    if len(fault["loc"]) > 1:  # of a section within, whose keys these are not
        return f"{key}: unknown key"
    close = difflib.get_close_matches(str(fault["loc"][0]), known, n=1, cutoff=0.7)
    if close:
        return f"{key}: unknown key; did you mean distill.deepspeed.zero_optimization.{close[0]}?"
    return f"{key}: unknown key; may be {', '.join(known)}"
