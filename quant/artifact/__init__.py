"""A quantized model on disk: safetensors + one JSON file + the transformers config beside it.

quantized.safetensors   packed codes, scales, zeros and unquantized tensors; tied ones once.
                        Not "model.safetensors": a stock from_pretrained must not take it for one
quant.json              what the tensors are: see `quant.artifact.description`
config.json  generation_config.json, and tokenizer files if the caller puts them there

Reading trusts nothing that the folder says.
"""

from __future__ import annotations

from quant.artifact.description import FORMAT, read_description
from quant.artifact.load import load_quantized
from quant.artifact.save import save_quantized

__all__ = ["FORMAT", "load_quantized", "read_description", "save_quantized"]
