"""Export to folders that stock transformers and vLLM load."""
