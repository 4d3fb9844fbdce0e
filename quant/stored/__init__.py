"""A quantized model on disk: how it is written, and read by one who trusts nothing it says."""
