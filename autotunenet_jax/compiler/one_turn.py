"""Functions that are carried out at nearly every step: by selection, or on CPUs in a loop of one turn or none.

A device answers the host, which waits for it, whether a loop turns. On a CPU that costs nothing, and what passes
through a loop stays in its place, where selected arrays of a donated state are copied.

Measured on jax 0.10.2, CPU: AdamW of a million parameters at batches of 64 takes 6.2 ms of processor time, wrapped 7.3
ms, by selection 9.4 ms. Switched off by ``AUTOTUNENET_COMPILER_OFF=one_turn``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .switches import is_on


def usually(condition: Array, function: Callable[..., Any], *operands: Any) -> Any:
    """``function(*operands)`` where the condition holds, else the operands as they are; it holds at nearly every step.

    Args:
      condition: Bool scalar.
      function: Pure; returns as many trees as it takes, of the same structures and types.
      operands: Trees of arrays.
    """
    if jax.default_backend() != "cpu" or not is_on("one_turn"):
        return optax.tree.where(condition, function(*operands), operands)

    def turn(carry: Any) -> Any:
        return jnp.zeros_like(condition), function(*carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], turn, (condition, operands))[1]
