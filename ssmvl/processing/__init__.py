"""User files -> model inputs: images, prompts, tokenizers, batches. The only room that opens images."""
