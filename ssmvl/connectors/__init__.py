"""Connectors: fused features -> visual tokens."""
