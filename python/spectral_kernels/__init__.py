"""Fast kernels for matrix-aware optimizers."""
