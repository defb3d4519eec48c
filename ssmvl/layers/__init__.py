"""Modules made of ops: norms, MLPs, mixers with their state, residual blocks."""
