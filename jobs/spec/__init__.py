"""The spec: what it holds, and how it is read."""
