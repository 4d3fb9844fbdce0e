"""A quantized model on disk: how it is read, by one who trusts nothing that it says."""
