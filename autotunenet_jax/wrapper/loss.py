"""What one loss makes of the course of a tuned optimizer's run."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..compiler import packing
from ..compiler.one_turn import when
from ..compiler.single_kernel import single_kernel
from ..controller.loss_monitor import DIVERGED, SPIKE
from ..controller.rollback import select
from ..controller.state import FORK, OUTCOME_NONE, TRAIN, Directive, Round, TunerState
from . import memory_drift, ring
from .state import Course, Memory, Order, Settings, advanced, no_order


class Ticked(NamedTuple):
    """What a loss comes to, before anything is decided.

    Attributes:
      packed: The course after it.
      directive: What it asks for.
      is_due: Whether the tuner has something to decide.
      is_event: Whether it changed the course of the run by itself.
      bits: What is noted of the step, see `ring.add_span`.
      is_reading: Whether the level of the loss is to be noted.
      is_noted: Whether any of these.
    """

    packed: packing.Packed
    directive: Directive
    is_due: Bool[Array, ""]
    is_event: Bool[Array, ""]
    bits: Int[Array, ""]
    is_reading: Bool[Array, ""]
    is_noted: Bool[Array, ""]


def take_loss(
    settings: Settings,
    packed: packing.Packed,
    record: Any,
    loss: Any,
    *,
    lag: Array,
    is_usable: Array,
    is_made: Array,
) -> tuple[packing.Packed, Directive, Array]:
    """Tells the tuner one loss, see `tick`, and lets it decide where that is due; see `note`."""
    loss = jnp.asarray(loss, jnp.float32)
    ticked = tick(settings, packed, loss, lag, is_usable, is_made)

    def noted(after: packing.Packed, directive: Directive, record: Array) -> tuple[packing.Packed, Directive, Array]:
        return note(settings, packed, ticked._replace(packed=after, directive=directive), record, loss, lag)

    return when(ticked.is_noted, noted, ticked.packed, ticked.directive, record)


def note(
    settings: Settings, before: packing.Packed, ticked: Ticked, record: Array, loss: Array, lag: Array
) -> tuple[packing.Packed, Directive, Array]:
    """The decision where one is due, and what the ring is told of the loss; nothing where there is nothing to note.

    Args:
      settings: Of the wrapper.
      before: The course of the run before the loss.
      ticked: What that came to.
      record: The ring of what happened.
      loss: As for `tick`.
      lag: Likewise.

    Returns:
      The course after, what the tuner asks for, which `interpret` reads, and the ring.
    """

    def decided(packed: packing.Packed, first: Directive, _: Round) -> tuple[packing.Packed, Directive, Round]:
        course = _unpack(settings, packed)
        ts, second, held = settings.core.decide(course.tuner)
        return packing.pack(course._replace(tuner=ts)), second._replace(verdict=first.verdict), held

    held = _unpack(settings, ticked.packed).tuner.round
    after, directive, held = when(ticked.is_due, decided, ticked.packed, ticked.directive, held)
    words, step, level = _told(settings, before, after, directive, held, loss, lag, ticked.is_due)
    dims = settings.core.space.dims
    record = ring.add_entry(record, words, dims, flag=ticked.is_due | ticked.is_event)
    record = ring.add_span(record, dims, step=step, bits=ticked.bits)
    return after, directive, ring.add_level(record, dims, step=step, level=level, flag=ticked.is_reading)


def _unpack(settings: Settings, packed: packing.Packed) -> Course:
    return packing.unpack(packed, settings.layout)


@single_kernel(static_argnums=(0,))
def _told(
    settings: Settings,
    before: packing.Packed,
    after: packing.Packed,
    directive: Directive,
    held: Round,
    loss: Array,
    lag: Array,
    is_due: Array,
) -> tuple[Array, Array, Array]:
    """The entry of a loss or of a decision as words, its step, and the level of the loss."""
    past, course = (packing.unpack(packed, settings.layout) for packed in (before, after))
    new, order = interpret(settings, past, course, lag, directive)
    ts, slots, in_train = new.tuner, past.tuner.slots, past.tuner.phase == TRAIN
    is_back = order.restore | order.adopt
    # A state that the tuner distrusts is dated before the run.
    dated = jnp.maximum(jnp.where(order.restore, slots.saved_step, slots.kept_step), 0)
    fork = held.fork
    ended = ring.Ended(
        x=held.x[fork],
        score=held.score[fork],
        steps=held.steps[fork],
        status=held.status[fork],
        p_better=held.p_better[fork],
        lead=held.lead[fork],
        deviation=held.deviation[fork],
        kept=held.kept,
        has_eval=held.has_eval,
        reference=held.reference,
        kind=ts.plan.kind[held.index],
    )
    made = ring.entry(
        ts,
        cause=ring.HEARD,
        phase=past.tuner.phase,
        outcome=directive.outcome,
        verdict=directive.verdict,
        restore=directive.restore,
        is_back=is_back,
        rewound=jnp.where(is_back & in_train, dated, -1),
        loss=loss,
        ended=ended,
    )
    made = made._replace(cause=jnp.where(is_due, ring.DECIDED, ring.HEARD))
    return ring.words_of(made), ts.step, ts.health.monitor.short * ts.health.scale


@single_kernel(static_argnums=(0,))
def tick(
    settings: Settings, packed: packing.Packed, loss: Array, lag: Array, is_usable: Array, is_made: Array
) -> Ticked:
    """The cheap half: the tuner's tick.

    Args:
      settings: Of the wrapper.
      packed: The course of the run before.
      loss: Scalar; of the step just done.
      lag: Steps before that one whose losses were never reported.
      is_usable: Whether the loss and its gradients are finite.
      is_made: Whether the step was the optimizer's own.
    """
    course: Course = packing.unpack(packed, settings.layout)
    loss = jnp.where(is_usable, loss, jnp.nan)
    ts, drift = advanced(course.tuner, lag), course.drift
    if drift is not None:
        drift, loss = memory_drift.feed(drift, ts, loss)
    after, directive, is_due = settings.core.tick(ts, loss)
    # A loss that stays not finite after the way back is no event: such steps are spans.
    is_high = (directive.verdict == SPIKE) | (directive.verdict == DIVERGED)
    acts = (directive.outcome != OUTCOME_NONE) | directive.restore | directive.adopt | is_high
    is_event = ((ts.phase == TRAIN) & acts) | jnp.any(after.incumbent != ts.incumbent)
    waits = (ts.phase != TRAIN) & (after.segment_left == ts.segment_left)
    return _ticked(course._replace(drift=drift), after, directive, is_due, is_event, ~is_made, waits)


@single_kernel(static_argnums=(0,))
def ticked_or_away(settings: Settings, packed: packing.Packed, ticked: Ticked, lag: Array, is_away: Array) -> Ticked:
    """The tick, or one without a loss where the parameters are on their way to a snapshot: only time passes."""
    course: Course = packing.unpack(packed, settings.layout)
    ts, no = advanced(course.tuner, lag), jnp.zeros((), bool)
    later = ts._replace(step=ts.step + 1, data_step=ts.data_step + 1)
    copies = dict.fromkeys(("save", "restore", "keep", "adopt"), no)
    directive = ticked.directive._replace(**copies)
    away = _ticked(course, later, directive, no, no, ~no, ts.phase != TRAIN)
    return select(is_away, away, ticked)


def _ticked(
    course: Course,
    after: TunerState,
    directive: Directive,
    is_due: Array,
    is_event: Array,
    is_skipped: Array,
    waits: Array,
) -> Ticked:
    bits = jnp.where(is_skipped, ring.SKIPPED, 0) + jnp.where(waits, ring.HELD, 0)
    is_reading = after.step % after.plan.save_every == 0
    return Ticked(
        packed=packing.pack(course._replace(tuner=after)),
        directive=directive,
        is_due=is_due,
        is_event=is_event,
        bits=bits.astype(jnp.int32),
        is_reading=is_reading,
        is_noted=is_due | is_event | (bits > 0) | is_reading,
    )


def interpret(
    settings: Settings, before: Course, after: Course, lag: Array, directive: Directive
) -> tuple[Course, Order]:
    """Reads what the tuner asks for as the memory mode can carry it out.

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
