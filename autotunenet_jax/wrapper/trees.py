"""Tree arithmetic of `autotune`: what is finite, what is a copy, and the update that brings parameters back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ..space import injection
from .copies import HeldSnapshots, Snapshot, strong
from .state import AutotuneState, Order

# Parameters count as back where they should be when this close, relative to their norm, or within this share of the
# rounding of their type. From there another way back would be exact, but it takes a batch.
_ARRIVED, _ARRIVED_EPS = 1e-5, 0.25


def _is_inexact(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def copied(tree: Any) -> Any:
    """Real copies of every array of a tree; nothing is shared with it."""
    return jax.tree.map(strong, tree)


def squared_norm(tree: Any) -> Float[Array, ""]:
    """Sum of the squares of all real and complex numbers; not finite where one of them, or the square of one, is not.

    Products of vectors take a CPU a fifth of the time that a test of each entry takes.
    """
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree):
        if not (_is_inexact(leaf) and leaf.size):
            continue
        for part in (jnp.real(leaf), jnp.imag(leaf)) if jnp.iscomplexobj(leaf) else (leaf,):
            flat = part.astype(jnp.float32).reshape(-1)
            total += jnp.vdot(flat, flat)
    return total


def is_as_finite(tree: Any, before: Any) -> Bool[Array, ""]:
    """Whether every number is finite that was before: an optimizer may hold an infinity for "none yet"."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(before), strict=True)
    flags = [jnp.all(jnp.isfinite(now) | ~jnp.isfinite(then)) for now, then in pairs if _is_inexact(now)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.ones((), bool)


def kept_finite(is_taken: Array, params: Any, updates: Any) -> Any:
    """An update that is taken, zero where it would make a parameter overflow; otherwise all zeros."""
    after = updates if params is None else moved(params, updates)
    return jax.tree.map(lambda u, a: jnp.where(is_taken & jnp.isfinite(a), u, 0), updates, after)


def as_seen(params: Any) -> Any:
    """Parameters as the inner optimizer sees them: those below 32 bits in float32.

    ``inject_hyperparams`` rounds its values to the parameters' type: in bfloat16 a decay of 0.999 would be 1.
    """

    def widen(leaf: Any) -> Any:
        is_narrow = _is_inexact(leaf) and jnp.finfo(leaf.dtype).bits < 32
        return leaf.astype(jnp.float32) if is_narrow else leaf

    return jax.tree.map(widen, params)


def moved(params: Any, updates: Any) -> Any:
    """Parameters after an update, as ``optax.apply_updates`` makes them."""
    return jax.tree.map(lambda p, u: jnp.asarray(p + u).astype(p.dtype), params, updates)


def way(params: Any, target: Any, updates: Any) -> Any:
    """The update from ``params`` to ``target``, in the dtypes of ``updates``; never beyond what a float can hold."""

    def difference(p: Array, t: Array, u: Array) -> Array:
        if not _is_inexact(p) or jnp.iscomplexobj(p):
            return (t - p).astype(u.dtype)
        wide = jnp.promote_types(p.dtype, jnp.float32)
        largest = float(jnp.finfo(u.dtype).max)
        return jnp.clip(t.astype(wide) - p.astype(wide), -largest, largest).astype(u.dtype)

    return jax.tree.map(difference, params, target, updates)


def has_arrived(params: Any, target: Any) -> Bool[Array, ""]:
    """Whether parameters lie so close to a target that training on is training on from the target."""
    away, size = jnp.zeros(()), jnp.zeros(())
    tolerance = _ARRIVED
    for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True):
        if _is_inexact(p):
            tolerance = max(tolerance, _ARRIVED_EPS * float(jnp.finfo(p.dtype).eps))
            p, t = jnp.abs(p - t).astype(jnp.float32), jnp.abs(t).astype(jnp.float32)
            away, size = away + jnp.sum(p * p), size + jnp.sum(t * t)
    return jnp.isfinite(away) & (away <= tolerance**2 * size)


def cast_like(new: Any, old: Any) -> Any:
    """``new`` with the dtypes of ``old``, and no weak types: a state keeps its types from step to step."""

    def cast(a: Any, b: Any) -> Any:
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            return a
        a = jnp.asarray(a)
        return (a if jnp.iscomplexobj(b) else jnp.real(a)).astype(b.dtype)

    return jax.tree.map(cast, new, old)


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
    values: list[dict[str, Any]] = []

    def collect(number: int, node: Any) -> Any:
        values.append(node.hyperparams)
        return node

    injection.map_injected(current, collect)
    return injection.map_injected(
        stripped, lambda number, node: node._replace(hyperparams={**values[number], **node.hyperparams})
    )


def with_left(
    order: Order, home: Array, params: Any, aux: tuple[Any, ...], inner: Any, snapshots: HeldSnapshots
) -> tuple[Any, HeldSnapshots]:
    """The inner state that belongs to where the last update went, and the snapshots after what was asked for since.

    Only what is whole is copied.

    Args:
      order: What `observe` and `observe_eval` asked for.
      home: The snapshot that the parameters have been sent to: 1 saved, 2 kept, or 0.
      params: The parameters now.
      aux: What goes with them.
      inner: State of the inner optimizer.
      snapshots: Before.
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
