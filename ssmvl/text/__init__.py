"""Tokenizers, prompts and the processor: no weights, picklable."""
