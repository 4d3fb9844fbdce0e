"""The sections of the spec that training reads, their rules, and reading them."""
