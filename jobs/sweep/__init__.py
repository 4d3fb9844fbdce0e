"""The sweep: which cells are left, the tasks that make and measure them, what is kept."""
