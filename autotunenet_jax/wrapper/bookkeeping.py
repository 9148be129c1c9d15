"""The bookkeeping of one update: what it reads from the course of the run as it begins, and writes as it ends.

Numbers alone: no array that is trained is touched here.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ..compiler import packing
from ..compiler.single_kernel import single_kernel
from ..controller.state import Directive
from .loss import interpret
from .state import Order, Settings, in_force, no_order

# A transformation after this one may shorten updates, as clipping does: a way back then takes several of them. One
# that stops them for good must not stop training with them.
MAX_ATTEMPTS = 64

# Gradients whose norm is so many times the largest before are an accident, unless they go on: with each in a row that
# is passed over ten times as much is taken for usual. Measured on small networks (both losses, with and without
# momentum, warm-up and a last layer of zeros, rates from 1e-3 to 1) and on sparse rows: training that goes well sees
# at most 2.7 times, from zeros 8.4; only what explodes at once, by a rate of 1, sees more than 140.
_OUT_OF_LINE, _YIELDING = 1e3, 10.0
# What was seen counts less with time.
_MEMORY = 0.999


class Opened(NamedTuple):
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
      accidents: Gradients in a row that were out of line with it.
    """

    values: dict[str, Array]
    left: Order
    is_left: Array
    home: Array
    attempts: Array
    is_returning: Array
    lag: Array
    largest: Array
    accidents: Array


class Closed(NamedTuple):
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
def passed(settings: Settings, packed: packing.Packed) -> packing.Packed:
    """The course one step later, of an optimizer that is not tuned."""
    course = packing.unpack(packed, settings.layout)
    return packing.pack(course._replace(lag=course.lag + 1))


@single_kernel(static_argnums=(0, 1))
def opened(settings: Settings, is_silent: bool, packed: packing.Packed) -> Opened:
    """What an update begins with; ``is_silent`` where it comes without its loss."""
    course = packing.unpack(packed, settings.layout)
    # What is left from the last update, or was asked for since by a loss or a metric; its parameters are here now.
    left = course.order
    is_left = left.restore | left.adopt
    home = jnp.where(is_left, _home(left), course.home)
    attempts = jnp.where(is_left, MAX_ATTEMPTS, course.attempts)
    values = in_force(settings, course._replace(order=no_order(), home=home, attempts=attempts), is_silent=is_silent)
    return Opened(
        values=values,
        left=left,
        is_left=left.save | left.keep | (home > 0),
        home=home,
        attempts=attempts,
        is_returning=(home > 0) & (attempts > 0),
        lag=course.lag,
        largest=course.largest,
        accidents=course.accidents,
    )


@single_kernel(static_argnums=(0,))
def closed(
    settings: Settings,
    before: packing.Packed,
    after: packing.Packed,
    directive: Directive | None,
    opened: Opened,
    square: Array,
    is_taken: Array,
    away: Array,
) -> Closed:
    """The course after an update.

    Args:
      settings: Of the wrapper.
      before: The course before it.
      after: The course after its loss and what was decided.
      directive: What the tuner asks for; None where no loss came.
      opened: What the update began with.
      square: Its gradients' squared norm.
      is_taken: Whether it is the inner optimizer's own.
      away: Whether the parameters are on their way to a snapshot.
    """
    past, course = (packing.unpack(packed, settings.layout) for packed in (before, after))
    order = no_order()
    if directive is not None:
        course, order = interpret(settings, past, course, opened.lag, directive)
    returns = order.restore | order.adopt
    is_back = returns | away
    ts = course.tuner
    is_over = (ts.plan.total > 0) & (ts.step >= ts.plan.total)
    no = jnp.zeros((), bool)
    largest = jnp.maximum(jnp.sqrt(square), _MEMORY * opened.largest)
    is_usual, is_unknown = is_in_line(opened, square), away | ~jnp.isfinite(square)
    course = course._replace(
        order=no_order(),
        lag=past.lag + 1 if directive is None else jnp.zeros_like(past.lag),
        is_spoiled=~is_taken & ~away if directive is None else no,
        home=jnp.where(returns, _home(order), jnp.where(away, opened.home, 0)),
        attempts=jnp.where(returns, MAX_ATTEMPTS, jnp.where(away, opened.attempts - 1, 0)),
        is_reverted=is_back | ~is_taken,
        largest=jnp.where(is_unknown | ~is_usual, opened.largest, largest),
        accidents=jnp.where(is_unknown, opened.accidents, jnp.where(is_usual, 0, opened.accidents + 1)),
    )
    asked = order.save | order.keep | is_back | is_over
    return Closed(packed=packing.pack(course), order=order, is_asked=asked)


def is_in_line(opened: Opened, square: Array) -> Array:
    """Whether gradients of that squared norm are no accident, after those before."""
    limit = _OUT_OF_LINE * opened.largest * _YIELDING ** opened.accidents.astype(jnp.float32)
    return (opened.largest == 0.0) | (jnp.sqrt(square) <= limit)


def _home(order: Order) -> Array:
    return jnp.where(order.restore, 1, jnp.where(order.adopt, 2, 0)).astype(jnp.int32)


@single_kernel(static_argnums=(0,))
def sent_home(
    settings: Settings, packed: packing.Packed, is_whole: Array, order: Order
) -> tuple[packing.Packed, Array]:
    """The course and where it leads: to a snapshot where the run is not whole."""
    course = packing.unpack(packed, settings.layout)
    is_lost = ~is_whole & (course.home == 0)
    slot = jnp.where(order.keep & ~order.save, settings.slots, 1).astype(jnp.int32)
    course = course._replace(
        home=jnp.where(is_lost, slot, course.home),
        attempts=jnp.where(is_lost, MAX_ATTEMPTS, course.attempts),
        is_reverted=course.is_reverted | is_lost,
    )
    return packing.pack(course), course.home
