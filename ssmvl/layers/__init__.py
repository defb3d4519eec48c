"""Modules built from the ops: norms, MLPs, mixers with their states, residual blocks."""
