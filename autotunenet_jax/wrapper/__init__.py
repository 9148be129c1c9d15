"""The controller inside an optax optimizer: `autotune`, its state with the copies it needs, and its accessors."""
