"""Which stages of a run are left, and running them in order."""
