"""Text becomes a corpus: sources, distinct documents, tokens, packed sequences in three parts."""
