"""Capture: the teacher runs over sequences, its distributions go to the logit cache."""

from trainer.teacher.job import Capture, missing, wanted
from trainer.teacher.run import capture

__all__ = ["Capture", "capture", "missing", "wanted"]
