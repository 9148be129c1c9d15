"""One update of a tuned optimizer: the inner one's, what the tuner hears of it, and the copies that it asks for."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..compiler import packing
from ..compiler.single_kernel import single_kernel
from ..compiler.stored_program import named, stored_program
from ..controller import when
from ..controller.state import Directive
from . import aux_state, budget, inner_state, notices, trees
from .held_snapshots import HeldSnapshots, Snapshot
from .loss import interpret, take_loss
from .state import AutotuneState, Order, Settings, in_force, no_order, write_in_force

# A transformation after this one may shorten updates, as clipping does: a way back then takes several of them. One
# that stops them for good must not stop training with them.
_MAX_ATTEMPTS = 64

# Gradients whose norm is so many times the largest before are an accident, unless they go on: with each that is passed
# over ten times as much is taken for usual. Measured on small networks (both losses, with and without momentum, warm-up
# and a last layer of zeros, rates from 1e-3 to 1) and on sparse rows: training that goes well sees at most 2.7 times,
# from zeros 8.4; only what explodes at once, by a rate of 1, sees more than 140.
_OUT_OF_LINE, _YIELDING = 1e3, 10.0
# What was seen counts less with time.
_MEMORY = 0.999


def update(
    optimizer: Any,
    seen: Callable[[Any], Any],
    updates: Any,
    state: AutotuneState,
    params: Any = None,
    *,
    value: Any = None,
    aux: Any = None,
    **extra_args: Any,
) -> tuple[Any, AutotuneState]:
    """The update of `autotune`, whose first two arguments it binds: the inner optimizer, and how that sees parameters.

    Raises:
      ValueError: No parameters, a loss that is no scalar, or ``aux`` of another structure than before.
    """
    budget.check(state)
    _check(state, params, value)
    if value is None:
        notices.warn(state, stacklevel=2)
    settings = state.settings
    step = functools.partial(_step, optimizer, seen, extra_args if value is None else {**extra_args, "value": value})
    if not settings.is_on:
        new, inner = step(updates, params, updates, state.inner)
        return new, state._replace(inner=inner, packed=_passed(settings, state.packed))

    state, given_aux = aux_state.with_room(state, aux)
    opened = _open(settings, value is None, state.packed)
    inner, snapshots, away = state.inner, state.held, jnp.zeros((), bool)
    if snapshots is not None:
        bring = functools.partial(_brought, opened, params, state.aux)
        away, inner, snapshots = when(opened.is_left, bring, away, inner, snapshots)
    square = trees.squared_norm(updates)
    is_finite = jnp.isfinite(square) if value is None else jnp.isfinite(square) & jnp.isfinite(value)
    is_made = is_finite & _is_in_line(opened.largest, square) & ~away
    inner = write_in_force(inner, opened.values)

    # A loop of one turn or none: where the update is not made, nothing of it happens, and otherwise all of it in place.
    is_alike = params is None or jax.tree.structure(params) == jax.tree.structure(updates)
    room = updates if is_alike else optax.tree.zeros_like(params)

    def made(room: Any, inner: Any) -> tuple[Any, Any]:
        return step(room, params, room if is_alike else updates, inner)

    new, inner = when(is_made, made, room, inner)
    is_taken = is_made & jnp.isfinite(trees.squared_norm(new))
    packed, record, directive = state.packed, state.record, None
    if value is not None:
        flags = {"is_usable": is_finite & (is_taken | ~is_made), "is_away": away, "is_made": is_taken}
        packed, directive, record = take_loss(settings, packed, record, value, lag=opened.lag, **flags)
    closed = _close(settings, state.packed, packed, directive, opened, square, is_taken, away)
    kept_aux = optax.tree.where(is_taken, given_aux, state.aux)
    state = state._replace(packed=closed.packed, inner=inner, aux=kept_aux, record=record)
    is_going, new, state = _obeyed(closed, is_taken, params, new, state, snapshots)
    return trees.kept_finite(is_taken | is_going, params, new), state


def _check(state: AutotuneState, params: Any, value: Any) -> None:
    if params is None and state.held is not None:
        raise ValueError(
            "autotune needs the parameters to bring them back: call update(grads, state, params, value=loss). "
            'Only memory="drift" works without.'
        )
    if value is None:
        return
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"value must be the loss, a real scalar; got shape {value.shape} of {value.dtype}. "
            "Average it over the batch first."
        )


def _brought(
    opened: "_Opened", params: Any, aux: tuple[Any, ...], away: Array, inner: Any, snapshots: HeldSnapshots
) -> tuple[Array, Any, HeldSnapshots]:
    """Whether the parameters are still on their way to a snapshot, and `inner_state.with_left`."""
    left = opened.left
    inner, snapshots = inner_state.with_left(left, opened.home, params, aux, inner, snapshots)
    target = snapshots.read_at(jnp.maximum(opened.home - 1, 0)).params
    return away | (opened.is_returning & ~trees.has_arrived(params, target)), inner, snapshots


def _step(
    optimizer: Any, seen: Callable[[Any], Any], told: dict[str, Any], like: Any, params: Any, gradients: Any, inner: Any
) -> tuple[Any, Any]:
    """The inner optimizer's update, in the types of ``like``, and its state, in the types that it had."""
    optimise = optax.with_extra_args_support(optimizer).update
    new, stepped = optimise(gradients, inner, None if params is None else seen(params), **told)
    return jax.tree.map(lambda u, old: u.astype(old.dtype), new, like), trees.cast_like(stepped, inner)


def _obeyed(
    closed: "_Closed", is_taken: Array, params: Any, new: Any, state: AutotuneState, snapshots: HeldSnapshots | None
) -> tuple[Array, Any, AutotuneState]:
    """Makes the copies that were asked for; seldom, and apart from what every step does.

    Returns:
      Whether the update is a way back, the update as it was or that, and the state.
    """
    is_going = jnp.zeros((), bool)
    if snapshots is None:
        return is_going, new, state

    def obey(is_going: Array, new: Any, inner: Any, aux: Any, packed: packing.Packed, snapshots: HeldSnapshots) -> Any:
        # Only what is whole is copied; what is not goes back to what was. Parameters are: no update makes one infinite,
        # and none could bring an infinite one back.
        saved = snapshots.read_at(jnp.zeros((), jnp.int32))
        is_whole = trees.is_as_finite((inner_state.without_values(inner), aux), (saved.inner, saved.aux))
        order, settings = closed.order, state.settings

        def here(new: Any, inner: Any, aux: Any) -> Snapshot:
            after = trees.moved(params, trees.kept_finite(is_taken, params, new))
            return Snapshot(after, inner_state.without_values(inner), aux)

        flags = (order.save & is_whole, order.keep & is_whole)
        snapshots = snapshots.written(flags, here, new, inner, aux)
        packed, home = _sent_home(settings, packed, is_whole, order)
        target = snapshots.read_at(jnp.maximum(home - 1, 0))
        is_back = home > 0
        new = optax.tree.where(is_back, trees.way(params, target.params, new), new)
        return is_going | is_back, new, inner, optax.tree.where(is_back, target.aux, aux), packed, snapshots

    carried = (is_going, new, state.inner, state.aux, state.packed, snapshots)
    is_going, new, inner, aux, packed, snapshots = when(closed.is_asked, obey, *carried)
    return is_going, new, state._replace(inner=inner, aux=aux, packed=packed, snapshots=snapshots)


@single_kernel(static_argnums=(0,))
def _sent_home(
    settings: Settings, packed: packing.Packed, is_whole: Array, order: Order
) -> tuple[packing.Packed, Array]:
    """The course and where it leads: to a snapshot where the run is not whole."""
    course = packing.unpack(packed, settings.layout)
    is_lost = ~is_whole & (course.home == 0)
    slot = jnp.where(order.keep & ~order.save, settings.slots, 1).astype(jnp.int32)
    course = course._replace(
        home=jnp.where(is_lost, slot, course.home),
        attempts=jnp.where(is_lost, _MAX_ATTEMPTS, course.attempts),
        is_reverted=course.is_reverted | is_lost,
    )
    return packing.pack(course), course.home


class _Opened(NamedTuple):
    """What an update begins with.

    Attributes:
      values: Hyperparameters in force.
      left: Copies that `observe` and `observe_eval` asked for.
      is_left: Whether there are any, or the inner state has to follow the parameters to a snapshot.
      home: The snapshot on the way to which the parameters are: 1 saved, 2 kept, or 0.
      attempts: Updates left for getting there.
      is_returning: Whether they may not be there yet.
      lag: Steps since a loss was last reported.
      largest: The largest norm of the gradients so far.
    """

    values: dict[str, Array]
    left: Order
    is_left: Array
    home: Array
    attempts: Array
    is_returning: Array
    lag: Array
    largest: Array


class _Closed(NamedTuple):
    """What an update ends with, the arrays being trained apart.

    Attributes:
      packed: The course of the run.
      order: The copies to make.
      is_asked: Whether any array is copied, or is to be looked at once more since the run is over.
    """

    packed: packing.Packed
    order: Order
    is_asked: Array


@single_kernel(static_argnums=(0,))
def _passed(settings: Settings, packed: packing.Packed) -> packing.Packed:
    """The course one step later, of an optimizer that is not tuned."""
    course = packing.unpack(packed, settings.layout)
    return packing.pack(course._replace(lag=course.lag + 1))


def _like_opened(settings: Settings, *_: Any) -> _Opened:
    return named(_Opened, values=dict.fromkeys(settings.core.space.names, "value"), left=named(Order))


@stored_program(like=_like_opened, static_argnums=(0, 1))
@single_kernel(static_argnums=(0, 1))
def _open(settings: Settings, is_silent: bool, packed: packing.Packed) -> _Opened:
    course = packing.unpack(packed, settings.layout)
    # What is left from the last update, or was asked for since by a loss or a metric; its parameters are here now.
    left = course.order
    is_left = left.restore | left.adopt
    home = jnp.where(is_left, _home(left), course.home)
    attempts = jnp.where(is_left, _MAX_ATTEMPTS, course.attempts)
    values = in_force(settings, course._replace(order=no_order(), home=home, attempts=attempts), is_silent=is_silent)
    return _Opened(
        values=values,
        left=left,
        is_left=left.save | left.keep | (home > 0),
        home=home,
        attempts=attempts,
        is_returning=(home > 0) & (attempts > 0),
        lag=course.lag,
        largest=course.largest,
    )


def _like_closed(settings: Settings, packed: packing.Packed, *_: Any) -> _Closed:
    return named(_Closed, packed=packed, order=named(Order))


@stored_program(like=_like_closed, static_argnums=(0,))
@single_kernel(static_argnums=(0,))
def _close(
    settings: Settings,
    before: packing.Packed,
    after: packing.Packed,
    directive: Directive | None,
    opened: _Opened,
    square: Array,
    is_taken: Array,
    away: Array,
) -> _Closed:
    past, course = (packing.unpack(packed, settings.layout) for packed in (before, after))
    order = no_order()
    if directive is not None:
        course, order = interpret(settings, past, course, opened.lag, directive)
    returns = order.restore | order.adopt
    is_back = returns | away
    ts = course.tuner
    is_over = (ts.plan.total > 0) & (ts.step >= ts.plan.total)
    no = jnp.zeros((), bool)
    faded, norm = _MEMORY * opened.largest, jnp.sqrt(square)
    seen = jnp.where(_is_in_line(opened.largest, square), jnp.maximum(norm, faded), _YIELDING * opened.largest)
    course = course._replace(
        order=no_order(),
        lag=past.lag + 1 if directive is None else jnp.zeros_like(past.lag),
        is_spoiled=~is_taken & ~away if directive is None else no,
        home=jnp.where(returns, _home(order), jnp.where(away, opened.home, 0)),
        attempts=jnp.where(returns, _MAX_ATTEMPTS, jnp.where(away, opened.attempts - 1, 0)),
        is_reverted=is_back | ~is_taken,
        largest=jnp.where(away | ~jnp.isfinite(square), opened.largest, seen),
    )
    asked = order.save | order.keep | is_back | is_over
    return _Closed(packed=packing.pack(course), order=order, is_asked=asked)


def _is_in_line(largest: Array, square: Array) -> Array:
    """Whether gradients of that squared norm are no accident, after some of that largest norm."""
    return (largest == 0.0) | (jnp.sqrt(square) <= _OUT_OF_LINE * largest)


def _home(order: Order) -> Array:
    return jnp.where(order.restore, 1, jnp.where(order.adopt, 2, 0)).astype(jnp.int32)
