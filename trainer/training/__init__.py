"""What a training leaves on storage to go on from: checkpoints, and the best weights."""
