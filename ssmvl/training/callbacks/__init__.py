"""Composer callbacks. Their class names are part of the checkpoint format."""
