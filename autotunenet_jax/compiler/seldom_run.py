"""Programs that run a few times in a run: optimising them takes longer than it ever saves.

Measured on jax 0.10.2, CPU (``benchmarks.overhead``): the decision of `fit` compiles in 2.4 s of processor time,
without this in 3.7 s. Switched off by ``AUTOTUNENET_COMPILER_OFF=seldom_run``; on other devices it changes nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from .switches import is_on

_UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def seldom_run(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``jax.jit`` of a function that is called seldom; ``options`` are ``jax.jit``'s."""

    @functools.cache
    def compiled() -> Any:
        # Asked for at the first call: it initialises JAX's devices.
        is_cheap = is_on("seldom_run") and jax.default_backend() == "cpu"
        return jax.jit(function, compiler_options=_UNOPTIMISED if is_cheap else None, **options)

    return functools.wraps(function)(lambda *args: compiled()(*args))
