"""What one loss makes of the course of a tuned optimizer's run."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from ..compiler import packing
from ..compiler.single_kernel import single_kernel
from ..compiler.stored_program import named, stored_program
from ..controller import when
from ..controller.state import FORK, Directive
from . import memory_drift
from .state import Course, Memory, Order, Settings, advanced, no_order


class _Heard(NamedTuple):
    """The course after the loss, what it asks for, and whether the tuner has something to decide."""

    packed: packing.Packed
    directive: Directive
    is_due: Bool[Array, ""]


def take_loss(
    settings: Settings, packed: packing.Packed, loss: Any, *, lag: Array, is_usable: Array, is_away: Array
) -> tuple[packing.Packed, Directive]:
    """Tells the tuner one loss.

    Args:
      settings: Of the wrapper.
      packed: The course of the run before.
      loss: Scalar; of the step just done.
      lag: Steps before that one whose losses were never reported.
      is_usable: Whether the loss and its gradients are finite.
      is_away: Whether the parameters are on their way back to a snapshot: then the loss tells nothing, but the budget
        is spent.

    Returns:
      The course after, and what the tuner asks for; `interpret` reads it.
    """
    heard = _hear(settings, packed, jnp.asarray(loss, jnp.float32), lag, is_usable, is_away)

    def decided(packed: packing.Packed, first: Directive) -> tuple[packing.Packed, Directive]:
        course = _unpack(settings, packed)
        ts, second, _ = settings.core.decide(course.tuner)
        return packing.pack(course._replace(tuner=ts)), second._replace(verdict=first.verdict)

    return when(heard.is_due, decided, heard.packed, heard.directive)


@single_kernel(static_argnums=(0,))
def _unpack(settings: Settings, packed: packing.Packed) -> Course:
    return packing.unpack(packed, settings.layout)


def _like_heard(settings: Settings, packed: packing.Packed, *_: Any) -> _Heard:
    return named(_Heard, packed=packed, directive=named(Directive))


@stored_program(like=_like_heard, static_argnums=(0,))
@single_kernel(static_argnums=(0,))
def _hear(
    settings: Settings, packed: packing.Packed, loss: Array, lag: Array, is_usable: Array, is_away: Array
) -> _Heard:
    """The cheap half: the tuner's tick. A loss that is not heard only lets time pass."""
    course: Course = packing.unpack(packed, settings.layout)
    loss, is_heard = jnp.where(is_usable, loss, jnp.nan), ~is_away
    ts, drift = advanced(course.tuner, lag), course.drift
    if drift is not None:
        drift, loss = memory_drift.feed(drift, ts, loss)
    after, directive, is_due = settings.core.tick(ts, loss)
    after = optax.tree.where(is_heard, after, ts._replace(step=ts.step + 1, data_step=ts.data_step + 1))
    copies = ("save", "restore", "keep", "adopt")
    directive = directive._replace(**{name: getattr(directive, name) & is_heard for name in copies})
    return _Heard(packing.pack(course._replace(tuner=after, drift=drift)), directive, is_due & is_heard)


def interpret(
    settings: Settings, before: Course, after: Course, lag: Array, directive: Directive
) -> tuple[Course, Order]:
    """Reads what the tuner asks for as the memory mode can carry it out.

    Args:
      settings: Of the wrapper.
      before: The course before the loss.
      after: The course that `take_loss` gave.
      lag: As for `take_loss`.
      directive: What it gave with the course.

    Returns:
      The course with its books put right, and the copies to make.
    """
    past, ts = advanced(before.tuner, lag), after.tuner
    if after.drift is not None:
        ts = memory_drift.tighten(settings.core.space, past, ts)
        return after._replace(tuner=ts, drift=memory_drift.mark(after.drift, past, ts)), no_order()
    return _interpret(settings.memory, before, after, directive)


def _interpret(memory: Memory, before: Course, after: Course, directive: Directive) -> tuple[Course, Order]:
    if memory == "keep-winner":
        return after, Order(directive.save, directive.keep, directive.restore, directive.adopt)
    # Without a kept copy a winner that is no longer running is lost: its steps are, too.
    held = before.tuner.round
    is_lost = directive.adopt & (before.tuner.phase == FORK)
    lost = jnp.where(is_lost, held.steps[jnp.maximum(held.kept, 0)], 0)
    ts = after.tuner._replace(discarded=after.tuner.discarded + lost)
    off = jnp.zeros((), bool)
    return after._replace(tuner=ts), Order(directive.save, off, directive.restore | directive.adopt, off)
