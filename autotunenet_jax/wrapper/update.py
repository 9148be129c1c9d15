"""One update of a tuned optimizer: the inner one's, what the tuner hears of it, and whatever else there is to do."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array

from ..arguments import scalar
from ..compiler.one_turn import usually, when
from . import aux_state, bookkeeping, budget, notices, trees
from .carry_out import Carried, Given, carry_out
from .loss import Ticked, tick
from .state import AutotuneState, write_in_force


def update(
    make: Callable[..., tuple[Any, AutotuneState]],
    make_at_once: Callable[..., tuple[Any, AutotuneState]],
    axis_name: Any,
    digests: tuple[int, ...],
    updates: Any,
    state: AutotuneState,
    params: Any = None,
    *,
    value: Any = None,
    aux: Any = None,
    **extra_args: Any,
) -> tuple[Any, AutotuneState]:
    """The update of `autotune`, which binds the rest of it, `made`, plain and compiled, the axis, and its digests.

    Outside of a step that is compiled it is compiled by itself: every loop in it would be, anew at every call.

    Raises:
      TypeError: A loss that is no real number, or goes by another name than ``value``.
      ValueError: A state of another optimizer, no parameters, a loss that is no scalar, or ``aux`` of another structure
        than before.
    """
    budget.check(state, digests)
    if value is None and "loss" in extra_args:
        raise TypeError("the loss goes by optax's name for it: update(grads, opt_state, params, value=loss).")
    params = trees.arrays_of(params, updates)
    _check(state, params, value, axis_name)
    notices.tell_of_queue(updates)
    if value is None:
        notices.tell(state)
    told = extra_args if value is None else {**extra_args, "value": value}
    arguments = updates, state, params, value, aux, told
    return (make_at_once if _are_known(arguments) else make)(*arguments)


def _are_known(arguments: Any) -> bool:
    """Whether all are arrays and numbers, of no step that is being compiled."""
    leaves = jax.tree.leaves(arguments)
    return all(isinstance(leaf, jax.typing.ArrayLike) and not isinstance(leaf, Tracer) for leaf in leaves)


def made(
    optimizer: Any,
    seen: Callable[[Any], Any],
    axis_name: Any,
    updates: Any,
    state: AutotuneState,
    params: Any,
    value: Any,
    aux: Any,
    told: dict[str, Any],
) -> tuple[Any, AutotuneState]:
    """The update, once there is nothing to be said about its arguments; ``told`` is what the inner optimizer is."""
    settings = state.settings
    step = functools.partial(_step, optimizer, seen, told)
    if not settings.is_on:
        new, inner = step(updates, params, updates, state.inner)
        return new, state._replace(inner=inner, packed=bookkeeping.passed(settings, state.packed))

    state, given_aux = aux_state.with_room(state, aux)
    opened = bookkeeping.opened(settings, value is None, state.packed)
    square, value, is_finite = _size(updates, value, axis_name)
    # Gradients make room for the update, where they can: what is not made of them stays them.
    is_alike = params is None or jax.tree.structure(params) == jax.tree.structure(updates)
    room = updates if is_alike else optax.tree.zeros_like(params)
    given = Given(
        settings=settings,
        step=lambda room, inner: step(room, params, room if is_alike else updates, inner),
        params=params,
        aux=given_aux,
        loss=None if value is None else jnp.asarray(value, jnp.float32),
        before=state.packed,
        opened=opened,
        square=square,
        is_finite=is_finite,
        is_fit=is_finite & bookkeeping.is_in_line(opened, square),
        ticked=None,
    )
    is_taken, new, inner = _usual(given, room, state)
    ticked, closed = _close(given, state, is_taken)
    given = given._replace(ticked=ticked)
    on = Carried(
        is_taken=is_taken,
        new=new,
        inner=inner,
        aux=optax.tree.where(is_taken, given_aux, state.aux),
        packed=closed.packed,
        record=state.record,
        snapshots=state.held,
    )
    on = _rest(given, closed, on)
    snapshots = state.snapshots if on.snapshots is None else on.snapshots
    state = state._replace(packed=on.packed, inner=on.inner, snapshots=snapshots, aux=on.aux, record=on.record)
    return trees.kept_finite(on.is_taken, params, on.new), state


def _size(updates: Any, value: Any, axis_name: Any) -> tuple[Array, Array | None, Array]:
    """The gradients' squared norm, the loss, and whether both are finite."""
    square, value = trees.squared_norm(updates), None if value is None else jnp.asarray(value)
    if axis_name is not None:
        # Not finite on one replica, not finite on all.
        square, value = jax.lax.pmean((square, value), axis_name)
    return square, value, jnp.isfinite(square) if value is None else jnp.isfinite(square) & jnp.isfinite(value)


def _usual(given: Given, room: Any, state: AutotuneState) -> tuple[Array, Any, Any]:
    """The inner optimizer's update, unless anything was left to this one to do first.

    Returns:
      Whether it was made, the update or the room for it, and the inner state.
    """
    opened, before = given.opened, state.inner
    inner = write_in_force(before, opened.values)
    is_made = given.is_fit
    if state.held is not None:
        is_made &= ~opened.is_left
        still = jax.tree.map(lambda old, now: now if now is old else jnp.where(opened.is_left, old, now), before, inner)
    else:
        still = inner
    new, inner = usually(is_made, given.step, room, still)
    return is_made & jnp.isfinite(trees.squared_norm(new)), new, inner


def _close(given: Given, state: AutotuneState, is_taken: Array) -> tuple[Ticked | None, bookkeeping.Closed]:
    """What the loss comes to, and the course of the run after this update."""
    opened, ticked, directive, packed = given.opened, None, None, state.packed
    if given.loss is not None:
        # What was left to this update comes before the optimizer's, of which then only the gradients are known yet.
        is_made = is_taken if state.held is None else is_taken | (given.is_fit & opened.is_left)
        is_usable = given.is_finite & (is_made | ~given.is_fit)
        ticked = tick(given.settings, state.packed, given.loss, opened.lag, is_usable, is_made)
        packed, directive = ticked.packed, ticked.directive
    no = jnp.zeros((), bool)
    closed = bookkeeping.closed(given.settings, state.packed, packed, directive, opened, given.square, is_taken, no)
    return ticked, closed


def _rest(given: Given, closed: bookkeeping.Closed, on: Carried) -> Carried:
    """Whatever else there is to do in this update, which mostly is nothing."""
    flags = [] if given.ticked is None else [given.ticked.is_noted]
    flags += [] if on.snapshots is None else [given.opened.is_left, closed.is_asked]
    if flags:
        (on,) = when(functools.reduce(jnp.logical_or, flags), functools.partial(carry_out, given), on)
    return on


def _check(state: AutotuneState, params: Any, value: Any, axis_name: Any) -> None:
    if params is None and state.held is not None:
        raise ValueError(
            "autotune needs the parameters to bring them back: call update(grads, state, params, value=loss). "
            'Only memory="drift" works without.'
        )
    if value is None:
        return
    value = scalar("loss, value,", value)
    # Known where jax.shard_map checks it; where not, a mean and a loss of one replica look the same.
    kind = getattr(jax.typeof(value), "mat", None)
    differs = getattr(kind, "varying", frozenset()) - set(axis_name if isinstance(axis_name, tuple) else (axis_name,))
    if differs:
        names = ", ".join(map(repr, sorted(differs)))
        raise ValueError(
            f"value, the loss, is another on each replica along {names}, which would decide each for itself. "
            f"Name the axis, as in autotune(..., axis_name={names}), or give the mean, jax.lax.pmean(value, {names})."
        )


def _step(
    optimizer: Any, seen: Callable[[Any], Any], told: dict[str, Any], like: Any, params: Any, gradients: Any, inner: Any
) -> tuple[Any, Any]:
    """The inner optimizer's update, in the types of ``like``, and its state, in the types that it had."""
    optimise = optax.with_extra_args_support(optimizer).update
    takes = inspect.signature(optimise).parameters
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in takes.values()):
        # Some of optax's own refuse a loss that they have no use for, such as sam.
        told = {name: each for name, each in told.items() if name in takes}
    new, stepped = optimise(gradients, inner, None if params is None else seen(params), **told)
    return jax.tree.map(lambda u, old: u.astype(old.dtype), new, like), trees.cast_like(stepped, inner)
