"""The logit cache: a teacher's next-token distributions, compressed, by sequence key."""
