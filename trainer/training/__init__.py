"""Training: the loop, its data and signals, the student, checkpoints, the best weights."""
