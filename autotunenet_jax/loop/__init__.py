"""`fit`, the ready training loop for JAX, with its checks and its progress line."""
