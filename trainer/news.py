"""What a training's events say in a line, for whoever watches; the same for all launchers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def line_of(event: Mapping[str, Any]) -> str | None:
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
