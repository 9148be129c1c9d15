"""Which of this package's tricks are in use: all, but for those that ``AUTOTUNENET_COMPILER_OFF`` names.

The variable holds names out of `SWITCHES`, separated by commas, or ``all``. It is read as programs are traced.
"""

import os

SWITCHES = ("single_kernel", "sequential_vmap", "blas_threads", "packing", "one_turn", "cpu_queue", "seldom_run")
_VARIABLE = "AUTOTUNENET_COMPILER_OFF"


def is_on(name: str) -> bool:
    """Whether a trick is in use."""
    off = os.environ.get(_VARIABLE, "")
    return off != "all" and name not in off.split(",")
