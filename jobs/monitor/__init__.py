"""A run as it is now: what its driver publishes of it, what it is asked for, what a reader says."""
