"""Keeps JAX on the CPU, and off the accelerator's memory, before it is imported."""

import os
import sys

# JAX reads the variable once, on import: whoever imported JAX earlier, or set the variable, has made the choice.
if "jax" not in sys.modules:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
