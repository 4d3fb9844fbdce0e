"""Bits and group sizes layer by layer within a number of bytes; `quant.allocate` is the door."""
