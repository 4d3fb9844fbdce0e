"""Models: finding, loading and building them, heads, hidden states, LoRA, slices."""
