"""Whether a logit cache says what its teacher says."""
