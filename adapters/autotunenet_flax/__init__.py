"""Flax modules for hyperparameters that change while a run goes on: `autotunenet_flax.nnx` and `.linen`."""
