"""A quantized model on disk: safetensors + one JSON file + the transformers config beside it.

quantized.safetensors   packed codes, scales, zeros and unquantized tensors; tied ones once.
                        Not "model.safetensors": a stock from_pretrained must not take it for one
quant.json              what the tensors are: see `quant.stored.description`
config.json  generation_config.json, and tokenizer files if the caller puts them there
"""

from __future__ import annotations

from quant.stored.description import FORMAT, read_description
from quant.stored.load import load_quantized
from quant.stored.save import save_quantized

__all__ = ["FORMAT", "load_quantized", "read_description", "save_quantized"]
