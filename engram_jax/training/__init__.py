"""A run: optimizers, state, step, loop, checkpoints and records."""
