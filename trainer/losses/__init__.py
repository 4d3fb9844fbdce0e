"""Losses against a teacher's distributions, fused with the output head."""
