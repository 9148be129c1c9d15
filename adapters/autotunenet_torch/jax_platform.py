"""Keeps JAX on the CPU, and off the accelerator's memory, before it is imported."""

import os
import sys
import warnings

# JAX reads the variable once, on import: whoever imported JAX earlier, or set the variable, has made the choice.
if "jax" not in sys.modules:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def prepare() -> None:
    """To be called before JAX is imported here: processes that are forked later never call it, and are not warned."""
    if "jax" in sys.modules:
        return
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    # A user's own filters would show the warning again.
    from jax._src import xla_bridge

    if hasattr(xla_bridge, "_at_fork_handler_installed"):
        xla_bridge._at_fork_handler_installed = True
