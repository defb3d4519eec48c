"""From pixels to fused features."""
