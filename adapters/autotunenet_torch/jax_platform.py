"""Keeps JAX on the CPU, and off the accelerator's memory, before it is imported."""

import os
import sys
import warnings

# JAX reads the variable once, on import: whoever imported JAX earlier, or set the variable, has made the choice.
if "jax" not in sys.modules:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    # Workers of a data loader are forked, and never call JAX. A user's own filters would show its warning again.
    from jax._src import xla_bridge

    if hasattr(xla_bridge, "_at_fork_handler_installed"):
        xla_bridge._at_fork_handler_installed = True
