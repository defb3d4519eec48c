"""A run's checkpoints: stored, resumed from, pruned and exported."""
