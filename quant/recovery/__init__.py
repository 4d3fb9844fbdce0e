"""Training the scales of a quantized model whose codes stay."""
