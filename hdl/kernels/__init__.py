"""One file an operation of the hot path: its formula in plain PyTorch, and the fused version beside it."""
