"""Carrying out a directive inside a compiled step, on the training state and the two copies of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..compiler.one_turn import when
from ..controller.rollback import select
from ..controller.state import OUTCOME_ROLLBACK, Directive


class Copies(NamedTuple):
    """The training state and the two copies of it that directives speak of."""

    state: Any
    saved: Any
    kept: Any


def carry_out(directive: Directive, copies: Copies) -> Copies:
    """Carries a directive out, in the order that `Directive` gives. Jit-able; donate ``copies``.

    Cost: nothing where the directive asks for nothing, one pass over the state for each copy.
    """
    asks = directive.save | directive.keep | directive.restore | directive.adopt
    (copies,) = when(asks, lambda copies: (_carried_out(directive, copies),), copies)
    return copies


def _carried_out(directive: Directive, copies: Copies) -> Copies:
    state, saved, kept = copies
    saved = select(directive.save, state, saved)
    kept = select(directive.keep, state, kept)
    state = select(directive.restore, saved, state)
    state = select(directive.adopt, kept, state)
    return Copies(state, saved, kept)


def refresh_keys(directive: Directive, state: Any, count: jax.Array) -> Any:
    """After a rollback, folds the number of rollbacks into every typed PRNG key of the state; else changes nothing.

    The data moves on after a rollback; with this, dropout masks and noise are others too. Raw ``uint32`` keys cannot be
    told from counters and are left alone.
    """
    leaves, treedef = jax.tree.flatten(state)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    if not places:
        return state

    def fold(keys: list[jax.Array]) -> list[jax.Array]:
        each = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        return [each(key.reshape(-1), count).reshape(key.shape) for key in keys]

    keys = [leaves[i] for i in places]
    keys = jax.lax.cond(directive.outcome == OUTCOME_ROLLBACK, fold, lambda keys: keys, keys)
    for i, key in zip(places, keys, strict=True):
        leaves[i] = key
    return treedef.unflatten(leaves)
