"""``python -m autotunenet_jax``."""

import sys

import jax

from .commands.command_line import main

if __name__ == "__main__":
    # A training may be using the accelerator.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
