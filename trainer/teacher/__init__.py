"""Capture: the teacher runs over sequences, its distributions go to the logit cache."""
