"""Loading a DeepSpeed checkpoint on another number of ranks: its universal format.

DeepSpeed's own converter takes the shards of all ranks apart into one folder per parameter, from
which every rank of another group reads its part (https://www.deepspeed.ai/tutorials/
universal-checkpointing). What its loader leaves wrong is set right here.
"""

from __future__ import annotations

import argparse
import io
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch


def convert(saved: Path, target: Path) -> str | None:
    """Makes a universal checkpoint in `target` of one saved by ZeRO 1, 2 or 3 in `saved`.

    Returns why it failed, in one line, or None.
    """
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(saved),
        output_folder=str(target),
        # In this process: one with threads and a device must not fork.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # Below stage 3 it asks for a note that only tensor parallelism makes.
        inject_missing_state=True,
    )
    talk = io.StringIO()
    try:
        with redirect_stdout(talk), redirect_stderr(talk):
            ds_to_universal.main(arguments)
    except Exception as error:  # it raises anything, assertions without a word too
        traceback.print_exc()
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"DeepSpeed could not convert it for another number of workers ({why})"
    return None


def load(engine: Any, folder: str, tag: str) -> str | None:
    """Loads the universal checkpoint `folder/tag` into a fresh engine; collective.

    Frozen parameters keep the values they were built with. Returns why there was nothing to load,
    or None.
    """
    optimizer = engine.optimizer.optimizer
    ours = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    config = engine._config  # read at loading alone, by `engine.load_universal_checkpoint()`
    config.load_universal_checkpoint = True
    try:
        path, _ = engine.load_checkpoint(folder, tag=tag)
    finally:
        config.load_universal_checkpoint = False
    if path is None:
        return "DeepSpeed found nothing to load in its universal checkpoint"
    # Under ZeRO-3 every group has been given the hyperparameters of the first.
    for group, values in zip(optimizer.param_groups, ours, strict=True):
        group.update(values)
    _own_steps(optimizer)
    return None


def _own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Gives each state a step counter of its own, where the optimizer wants it.

    Under ZeRO-3 the loader hands one tensor to all, and each group's update would count it up.
    """
    on_device = any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    for parameter, state in optimizer.state.items():
        step = state.get("step")
        if torch.is_tensor(step):
            state["step"] = step.clone().to(parameter.device if on_device else step.device)
