"""What a training's events and failures say in a line; the same for all launchers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_event(event: Mapping[str, Any]) -> str | None:
    """A line for an event that is worth one by itself; None for the others."""
    stage = event.get("stage", "")
    if event["event"] == "resume":
        saved, world = event.get("saved_by"), event.get("world")
        others = f", which {saved} ranks saved and {world} go on with" if saved != world else ""
        return f"{stage}: continues from the checkpoint of step {event['step']}{others}"
    if event["event"] == "evaluation":
        words = f"perplexity on select {event['select_perplexity']:.2f}"
        if event.get("select_forward_kl") is not None:
            words += f", KL to the teacher {event['select_forward_kl']:.4f}"
        return f"{stage}: step {event['step']}, {words}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU's or this machine's memory does not suffice."""
    # By its name: to tell a line must not cost the import of torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch has no type of its own for the CPU.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def failure_reason(error: BaseException) -> str:
    """Why a rank failed, in one line; where memory did not suffice, what would need less."""
    why = " ".join(str(error).split())[:600] or type(error).__name__
    if not is_out_of_memory(error):
        return why
    return (
        f"out of memory ({why[:300]}); lower distill.micro_batch (in capture "
        "resources.capture.batch_tokens), or set distill.activation_checkpointing: true, "
        "distill.zero_stage: 3 or distill.offload: cpu"
    )
