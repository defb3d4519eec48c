"""From a user's files to model inputs: images, prompts, tokenizers, batches; the only room that opens images."""
