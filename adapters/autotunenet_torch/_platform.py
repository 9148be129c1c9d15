"""Keeps JAX on the CPU, and off the accelerator's memory, before it is imported."""

import os
import sys
from typing import Any

# JAX reads the variable once, on import: whoever imported JAX earlier, or set the variable, has made the choice.
if "jax" not in sys.modules:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def engine_device() -> Any:
    """Where the engine's arrays live: JAX's CPU if it has one, else what the user's ``JAX_PLATFORMS`` leaves."""
    import jax

    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
