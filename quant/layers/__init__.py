"""Quantized layers: packed codes, products and lookups, and the decoding step."""
