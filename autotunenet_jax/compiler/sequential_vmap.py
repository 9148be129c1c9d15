"""Batches of large functions, one member after the other.

Measured on jax 0.10.2, CPU. What a decision works on fits into a core's cache, what a batch of them works on does not:
in one call each takes longer than alone. And of a batch of factorisations JAX makes tasks for XLA's threads, and keeps
the one that it runs on waiting for them: where as many devices as there are threads do so at once, for ever. Switched
off by ``AUTOTUNENET_COMPILER_OFF=sequential_vmap``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import custom_batching

from .switches import is_on


def sequential_vmap(*, static_argnums: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``jax.custom_batching.sequential_vmap`` on CPUs only, with static arguments; elsewhere a batch is a batch.

    Args:
      static_argnums: Arguments that are no arrays.

    Returns:
      A decorator for pure functions of positional arguments; they lose their reverse-mode derivatives.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if jax.default_backend() != "cpu" or not is_on("sequential_vmap"):
                return function(*args)
            static = {number: args[number] for number in static_argnums}

            @custom_batching.sequential_vmap
            def member(*given: Any) -> Any:
                others = iter(given)
                return function(*(static[n] if n in static else next(others) for n in range(len(args))))

            return member(*(arg for number, arg in enumerate(args) if number not in static))

        return call

    return decorate
