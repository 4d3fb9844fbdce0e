"""A run seen from outside: its status, its progress, stopping it, and its Ray jobs."""
