"""How good, large and fast a model is: metrics with intervals, benchmark tasks, speed, memory."""
