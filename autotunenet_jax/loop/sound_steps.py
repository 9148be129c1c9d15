"""A step that breaks the training state does not happen: told on the device, without a look from the host."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .train_step_contract import parts_of


class Trained(NamedTuple):
    """What came of one step.

    Attributes:
      state: After it, or as before where the step broke it.
      loss: As the user's function gave it.
      told: The same, NaN where the step did not happen.
      metrics: By name.
    """

    state: Any
    loss: Array
    told: Array
    metrics: Mapping[str, Any]


def _inexact(tree: Any) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def count_non_finite(tree: Any) -> Int[Array, ""]:
    """How many real and complex numbers of a tree are not finite."""
    counts = (jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32) for leaf in _inexact(tree))
    return sum(counts, jnp.zeros((), jnp.int32))


def _is_all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether a tree holds nothing but finite numbers, in one pass.

    Zero times anything else is NaN, and a product with a vector is several times faster than a reduction by ``any``.
    """
    is_finite = jnp.ones((), bool)
    for leaf in _inexact(tree):
        wide = leaf.astype(jnp.float32) if leaf.dtype.itemsize < 2 else leaf
        probed = wide @ jnp.zeros(wide.shape[-1], wide.dtype) if wide.ndim else wide * 0
        is_finite &= jnp.isfinite(jnp.sum(probed))
    return is_finite


def _is_untrained(new: Any, old: Any) -> Bool[Array, ""]:
    """Whether a step left all matrices as they were, and so trained nothing; without matrices, all vectors."""
    pairs = list(zip(_inexact(new), _inexact(old), strict=True))
    trained = [pair for pair in pairs if pair[0].ndim >= 2] or [pair for pair in pairs if pair[0].ndim == 1]
    is_same = jnp.array(bool(trained))
    for a, b in trained:
        is_same &= jnp.all(a == b)
    return is_same


def sound_step(new: Any, old: Any, loss: Array) -> tuple[Any, Array]:
    """The state after a step, or the one before where the step broke it; and the loss, NaN where it did.

    A step is sound whose loss is finite and whose state holds no more numbers that are not finite than the one before:
    a mask of infinities does no harm. A step that has skipped its own update because its loss is not finite, as under
    dynamic loss scaling, keeps what else it changed, or its scale would never fall. Jit-able; donate ``old``.

    Args:
      new: State after the step.
      old: State before it, of the same structure.
      loss: Real scalar of the step.

    Returns:
      One of the two states, whole, and the loss to be told.

    Cost: one pass over ``new`` and a copy of it, for ``old`` cannot be written over before the verdict.
    """
    is_finite = jnp.isfinite(loss)

    def compared(new: Any, old: Any, loss: Array) -> tuple[Any, Array]:
        is_whole = count_non_finite(new) <= count_non_finite(old)
        is_kept = is_whole & (is_finite | _is_untrained(new, old))
        state = jax.tree.map(lambda a, b: jnp.where(is_kept, a, b), new, old)
        return state, jnp.where(is_whole & is_finite, loss, jnp.nan)

    return jax.lax.cond(is_finite & _is_all_finite(new), lambda new, old, loss: (new, loss), compared, new, old, loss)


def train(
    train_step: Callable[..., Any], state: Any, batch: Any, hyperparams: Mapping[str, Any], *, has_aux: bool
) -> Trained:
    """One step by the user's function, which may write into the state that it is given, as a merged NNX model does."""
    own = jax.tree.map(lambda leaf: leaf, state)
    new, loss, metrics = parts_of(train_step(own, batch, hyperparams), has_aux=has_aux)
    new, told = sound_step(new, state, loss)
    return Trained(new, loss, told, metrics)
