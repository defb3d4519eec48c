"""User files -> model inputs: images, prompts, tokenizers, batches. The only package that opens images."""
