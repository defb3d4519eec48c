"""Composer callbacks; their class names are part of the checkpoint format."""
