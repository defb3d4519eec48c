"""Checkpoints of a run: storing, resuming, pruning and exporting them."""
