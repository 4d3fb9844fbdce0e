"""Capture: the teacher runs over sequences, its distributions go to the logit cache.

What is named here is imported when it is asked for, so that the arithmetic of `placement` can be
had without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.teacher.job import Capture, missing, wanted
    from trainer.teacher.run import capture

__all__ = ["Capture", "capture", "missing", "wanted"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "capture":
        from trainer.teacher import run

        return run.capture
    from trainer.teacher import job

    return getattr(job, name)
