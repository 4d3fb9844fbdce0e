"""A run while it works: directory, context of its stages, heartbeat, requests, log."""
