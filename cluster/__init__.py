"""Work on a Ray cluster: session, workers, fan-out, nodes. Knows nothing of models."""
