"""The inner optimizer's state, as a snapshot holds it: without the tuned values, which are the tuner's to set."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..space import injection
from .held_snapshots import HeldSnapshots, Snapshot
from .state import AutotuneState, Order
from .trees import is_as_finite


def with_real_values(inner: Any) -> Any:
    """An inner state whose hyperparameters are real: ``inject_hyperparams`` gives them the type of the parameters."""

    def real(number: int, node: Any) -> Any:
        return node._replace(hyperparams={name: jnp.real(value) for name, value in node.hyperparams.items()})

    return injection.map_injected(inner, real)


def without_values(inner: Any) -> Any:
    """An inner state to be kept in a snapshot: hyperparameters come from the tuner, not from the past.

    Numbers of accumulated batches stay: they belong to the half-done accumulation beside them.
    """
    held = {(place.node, place.name) for place in injection.places(inner) if place.is_held}

    def strip(number: int, node: Any) -> Any:
        kept = {name: value for name, value in node.hyperparams.items() if (number, name) in held}
        return node._replace(hyperparams=kept)

    return injection.map_injected(inner, strip)


def with_values(stripped: Any, current: Any) -> Any:
    """A snapshot's inner state, with the hyperparameters of the current one."""
    values = [node.hyperparams for node in injection.injected(current)]
    return injection.map_injected(
        stripped, lambda number, node: node._replace(hyperparams={**values[number], **node.hyperparams})
    )


def with_left(
    order: Order, home: Array, params: Any, aux: tuple[Any, ...], inner: Any, snapshots: HeldSnapshots
) -> tuple[Any, HeldSnapshots]:
    """The inner state that belongs to where the last update went, and the snapshots after what was asked for since.

    Only what is whole is copied.
    """
    now = without_values(inner)
    is_whole = is_as_finite((now, aux), snapshots.read_at(jnp.zeros((), jnp.int32))[1:])
    snapshots = snapshots.written((order.save & is_whole, order.keep & is_whole), Snapshot, params, now, aux)
    past = snapshots.read_at(jnp.maximum(home - 1, 0)).inner
    return with_values(optax.tree.where(home > 0, past, now), inner), snapshots


def found_next(state: AutotuneState) -> Any:
    """The inner state with its counters as the next update finds them, once it has done what was left to it.

    Arrays are left as they are: which values are in force depends on counters alone.
    """
    course = state.course
    order = course.order
    goes_to_saved = jnp.where(order.restore | order.adopt, order.restore, course.home == 1)
    goes_to_kept = jnp.where(order.restore | order.adopt, order.adopt, course.home == 2)

    def choose(now: Any, saved: Any, *kept: Any) -> Any:
        if jnp.ndim(now) or not jnp.issubdtype(now.dtype, jnp.integer):
            return now
        new = jnp.where(goes_to_saved & ~order.save, saved, now)
        return jnp.where(goes_to_kept & ~order.keep, kept[0], new) if kept else new

    past = [slot.inner for slot in (state.saved, state.kept) if slot is not None]
    if not past:
        return state.inner
    return with_values(jax.tree.map(choose, without_values(state.inner), *past), state.inner)
