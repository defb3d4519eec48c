"""Vision: pixels -> fused features."""
