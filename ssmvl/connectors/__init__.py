"""From fused features to visual tokens."""
