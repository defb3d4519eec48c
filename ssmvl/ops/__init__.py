"""Pure functions on tensors, each with a reference implementation in plain PyTorch."""
