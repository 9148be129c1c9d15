"""Everything in 32 bits, no more and no fewer, whatever the program around it computes in.

No trick, and so without a switch: results depend on it.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_float32(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs or traces a function in float32 throughout.

    As without ``jax_enable_x64``, since the tuner's state keeps its types from step to step; and with products of
    matrices in full precision, since GPUs and TPUs otherwise round what they multiply to 10 or 7 bits, which no
    covariance matrix survives.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.default_matmul_precision("highest"):
            if jnp.result_type(float) == jnp.float32:
                return function(*args, **kwargs)
            with jax.enable_x64(False):
                return function(*args, **kwargs)

    return call
