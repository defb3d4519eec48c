"""Pure functions on tensors: one reference path in plain PyTorch each."""
