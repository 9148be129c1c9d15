"""Linear algebra on one thread for as long as a decision takes.

JAX factorises matrices on the CPU by SciPy's BLAS. On matrices as small as a decision's its threads mostly wait for
each other, and where other processes want the cores too they wait for whole time slices of the scheduler.

Measured on jax 0.10.2 with SciPy's OpenBLAS. Switched off by ``AUTOTUNENET_COMPILER_OFF=blas_threads``.
"""

import contextlib
import functools
from typing import Any

from .switches import is_on


@functools.cache
def _libraries() -> Any:
    import scipy.linalg.cython_blas  # noqa: F401  (what JAX calls: loaded now, so that it is found)
    import threadpoolctl

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def one_blas_thread() -> Any:
    """A context in which BLAS starts no threads, for a decision of the tuner. Cost: some 10 microseconds."""
    return _libraries().limit(limits=1) if is_on("blas_threads") else contextlib.nullcontext()
