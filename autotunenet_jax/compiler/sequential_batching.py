"""Batches of large functions, one member after the other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap


def one_by_one(*, static_argnums: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Runs a function under ``jax.vmap`` on a CPU as a loop over the batch.

    What a decision works on fits into a core's cache, what a batch of them works on does not: in one call each takes
    longer than alone. Some hundred factorisations in one call can also wait for each other for ever, where XLA runs
    several threads. Elsewhere a batch is a batch.

    Args:
      static_argnums: Arguments that are no arrays.

    Returns:
      A decorator for pure functions of positional arguments; they lose their reverse-mode derivatives.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if jax.default_backend() != "cpu":
                return function(*args)
            static = {number: args[number] for number in static_argnums}
            return _member(function, static)(*(arg for number, arg in enumerate(args) if number not in static))

        return call

    return decorate


def _member(function: Callable[..., Any], static: dict[int, Any]) -> Callable[..., Any]:
    @custom_vmap
    def member(*given: Any) -> Any:
        others = iter(given)
        return function(*(static[n] if n in static else next(others) for n in range(len(static) + len(given))))

    @member.def_vmap
    def _(axis_size: int, is_batched: Any, *given: Any) -> Any:
        leaves, structure = jax.tree.flatten(given)
        flags = jax.tree.leaves(is_batched)

        def one(batched: list[Any]) -> Any:
            each = iter(batched)
            merged = [next(each) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)]
            return member(*jax.tree.unflatten(structure, merged))

        found = jax.lax.map(one, [leaf for flag, leaf in zip(flags, leaves, strict=True) if flag])
        return found, jax.tree.map(lambda _: True, found)

    return member
