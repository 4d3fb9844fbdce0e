"""The cells of a sweep: what they are measured on, the work on their machines, what is kept."""
