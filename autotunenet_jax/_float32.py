"""Everything in 32 bits, whatever the program around it computes in."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_float32(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs or traces a function as without ``jax_enable_x64``: the tuner's state keeps its types from step to step."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if jnp.result_type(float) == jnp.float32:
            return function(*args, **kwargs)
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return call
