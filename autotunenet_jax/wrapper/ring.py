"""What a tuned optimizer's state remembers of its run: the last decisions, steps that were not made, metrics, losses.

Four rings of fixed size lie in one vector of 32-bit words, one after the other, behind their counts: a step pays for
each array of its state, and a vector that is passed through is written in place. Writing a row costs the row alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..compiler import words
from ..controller.state import TunerState

CAPACITY = 64
"""Rows of the first three rings; a default plan has up to 50 decisions."""

LEVELS = 128
"""Rows of the last one: readings of the loss, ``save_every`` steps apart; runs of 1,000 to 25,000 steps have 50."""

START, DECIDED, HEARD, MEASURED, EXTENDED = range(5)
"""What an entry is of: the start, a decision, a loss, a validation metric, another budget."""

SKIPPED, HELD = 1, 2
"""Bits of a span: its steps are no part of the training; the stretch that they fell into did not advance."""

# Rings in order; each has one of the counts that the vector begins with.
_ENTRIES, _SPANS, _METRICS, _LEVELS = range(4)
_COUNTS = 4
_SPAN_WORDS, _METRIC_WORDS, _LEVEL_WORDS = 3, 3, 2


class Stretch(NamedTuple):
    """What the values in force follow from until the next entry; scalars, and two points of the unit cube.

    Attributes:
      phase: ``TRAIN``, ``SWEEP`` or ``FORK``.
      data_step: Index of the next batch as the tuner counts.
      segment_left: Steps until the next decision.
      segment_length: Steps of the whole segment.
      since_rollback: Steps since the last rollback.
      cools_from: Budget step from which the rates fall, to see whether training is only too hot.
      saved_data: Index of the batch that the round began with.
      total: Steps of the whole run; 0 for an open-ended one.
      check_every: Steps of a cool-down in training.
      incumbent: Hyperparameters in force outside forks.
      trial: Those of the running fork.
    """

    phase: Int[Array, "*n"]
    data_step: Int[Array, "*n"]
    segment_left: Int[Array, "*n"]
    segment_length: Int[Array, "*n"]
    since_rollback: Int[Array, "*n"]
    cools_from: Int[Array, "*n"]
    saved_data: Int[Array, "*n"]
    total: Int[Array, "*n"]
    check_every: Int[Array, "*n"]
    incumbent: Float[Array, "*n d"]
    trial: Float[Array, "*n d"]


class Ended(NamedTuple):
    """The fork that ended with a decision, and its round; of no meaning elsewhere.

    Attributes:
      x: Its hyperparameters, unit cube.
      score: To be minimised.
      steps: How many it ran.
      status: One of the ``FORK_*`` codes.
      p_better: Probability that it beats the one kept till then.
      lead: By how much, as the surrogate has it; NaN where there was none.
      deviation: Standard deviation of that.
      kept: The fork kept from then on; -1 for none.
      has_eval: Whether the round is scored by validation metrics.
      reference: Score of the state that all forks started from.
      kind: Of the round.
    """

    x: Float[Array, "*n d"]
    score: Float[Array, "*n"]
    steps: Int[Array, "*n"]
    status: Int[Array, "*n"]
    p_better: Float[Array, "*n"]
    lead: Float[Array, "*n"]
    deviation: Float[Array, "*n"]
    kept: Int[Array, "*n"]
    has_eval: Int[Array, "*n"]
    reference: Float[Array, "*n"]
    kind: Int[Array, "*n"]


class Entry(NamedTuple):
    """Something that changed the course of the run.

    Attributes:
      cause: What it is of.
      times: How often the same happened in a row, this being the last time.
      step: Budget step after which it happened.
      phase: Phase before it.
      outcome: Of the directive.
      verdict: Of the guard.
      restore: Whether the tuner asked for the saved state.
      is_back: Whether training went back to a snapshot.
      rewound: Budget step of that snapshot, where that happened in ordinary training; -1 elsewhere.
      has_fallen: Whether the rates have ever fallen by the training loss.
      retreats: How often training went back to its best state so far.
      loss: The loss heard.
      ended: The fork that ended.
      stretch: What is in force from here on.
    """

    cause: Int[Array, "*n"]
    times: Int[Array, "*n"]
    step: Int[Array, "*n"]
    phase: Int[Array, "*n"]
    outcome: Int[Array, "*n"]
    verdict: Int[Array, "*n"]
    restore: Int[Array, "*n"]
    is_back: Int[Array, "*n"]
    rewound: Int[Array, "*n"]
    has_fallen: Int[Array, "*n"]
    retreats: Int[Array, "*n"]
    loss: Float[Array, "*n"]
    ended: Ended
    stretch: Stretch


class MetricEntry(NamedTuple):
    """A validation metric, as the ring is told of it.

    Attributes:
      step: Budget step.
      metric: In the user's direction.
      is_settled: Whether it is one outside forks.
      always: Whether it is noted however near the last one is.
      spacing: Least distance to the last one otherwise, in steps.
      is_told: Whether it is a reading at all.
      words: The entry of what it changed, of `words_of`.
      is_event: Whether it changed anything.
    """

    step: Int[Array, ""]
    metric: Float[Array, ""]
    is_settled: Bool[Array, ""]
    always: Bool[Array, ""]
    spacing: Int[Array, ""]
    is_told: Bool[Array, ""]
    words: Int[Array, "width"]
    is_event: Bool[Array, ""]


class Contents(NamedTuple):
    """What is in a ring, oldest first; NumPy arrays.

    Attributes:
      entries: Entries, stacked.
      dropped: Older entries that are gone.
      spans: Last step, length and bits of steps that were not made, and the like.
      metrics: Step, metric and whether it was one outside forks.
      levels: Step and running level of the loss.
    """

    entries: Entry
    dropped: int
    spans: list[tuple[int, int, int]]
    metrics: list[tuple[int, float, bool]]
    levels: list[tuple[int, float]]


_FLOATS = {"loss", "score", "p_better", "lead", "deviation", "reference"}
_POINTS = {"incumbent", "trial", "x"}


def _template(dims: int) -> Entry:
    """Of each field the shape and dtype."""

    def made(kind: Any) -> Any:
        def leaf(name: str) -> jax.ShapeDtypeStruct:
            shape = (dims,) if name in _POINTS else ()
            return jax.ShapeDtypeStruct(shape, jnp.float32 if name in _FLOATS | _POINTS else jnp.int32)

        parts = {"ended": Ended, "stretch": Stretch}
        return kind(**{name: made(parts[name]) if name in parts else leaf(name) for name in kind._fields})

    return made(Entry)


def _begins(dims: int) -> list[int]:
    """Where each ring begins, and where the last one ends."""
    entries = CAPACITY * words.size(_template(dims))
    sizes = [entries, CAPACITY * _SPAN_WORDS, CAPACITY * _METRIC_WORDS, LEVELS * _LEVEL_WORDS]
    return [_COUNTS + sum(sizes[:number]) for number in range(len(sizes) + 1)]


def stretch_of(ts: TunerState) -> Stretch:
    """What the values that a state puts in force follow from."""
    return Stretch(
        phase=ts.phase,
        data_step=ts.data_step,
        segment_left=ts.segment_left,
        segment_length=ts.segment_length,
        since_rollback=ts.health.since_rollback,
        cools_from=ts.validation.cools_from,
        saved_data=ts.slots.saved_data,
        total=jnp.asarray(ts.plan.total, jnp.int32),
        check_every=jnp.asarray(ts.plan.check_every, jnp.int32),
        incumbent=ts.incumbent,
        trial=ts.trial,
    )


def with_stretch(ts: TunerState, held: Stretch, step: Int[Array, ""]) -> TunerState:
    """A state that puts in force what the one of a stretch did, just after a budget step."""
    return ts._replace(
        step=step,
        phase=held.phase,
        data_step=held.data_step,
        segment_left=held.segment_left,
        segment_length=held.segment_length,
        incumbent=held.incumbent,
        trial=held.trial,
        health=ts.health._replace(since_rollback=held.since_rollback),
        validation=ts.validation._replace(cools_from=held.cools_from),
        slots=ts.slots._replace(saved_data=held.saved_data),
        plan=ts.plan._replace(total=held.total, check_every=held.check_every),
    )


def no_fork(dims: int) -> Ended:
    """Where no fork ended."""
    zero, nan = jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, jnp.float32)
    none = jnp.full((), -1, jnp.int32)
    return Ended(jnp.zeros(dims, jnp.float32), nan, zero, zero, nan, nan, nan, none, zero, nan, zero)


def empty(dims: int) -> Int[Array, "words"]:
    """A ring in which nothing is yet."""
    return jnp.zeros(_begins(dims)[-1], jnp.int32)


def entry(ts: TunerState, *, cause: int, phase: Any, **fields: Any) -> Entry:
    """An entry of what led to a state; fields that are not given say nothing.

    Args:
      ts: The state after it.
      cause: One of the codes of this file.
      phase: Phase before it.
      fields: Of `Entry`.
    """
    given = {
        "times": 1,
        "outcome": 0,
        "verdict": 0,
        "restore": 0,
        "is_back": 0,
        "rewound": -1,
        "loss": jnp.nan,
        "ended": no_fork(ts.incumbent.shape[-1]),
        **fields,
    }
    return Entry(
        cause=jnp.int32(cause),
        phase=phase,
        step=ts.step,
        has_fallen=ts.validation.has_fallen,
        retreats=ts.validation.retreats,
        stretch=stretch_of(ts),
        **given,
    )


def words_of(made: Entry) -> Int[Array, "width"]:
    """An entry as the words that a ring holds of it."""
    like = _template(made.stretch.incumbent.shape[-1])
    return words.pack(jax.tree.map(lambda leaf, kind: jnp.asarray(leaf, kind.dtype).reshape(kind.shape), made, like))


def _put(ring: Array, dims: int, which: int, row: Array, *, flag: Array, over: Any = False) -> Array:
    """Writes a row where it is flagged, over the last one or after it."""
    begin, capacity, width = _begins(dims)[which], LEVELS if which == _LEVELS else CAPACITY, row.shape[0]
    count = ring[which]
    number = jnp.where(over, count - 1, count)
    at = (begin + (number % capacity) * width,)
    old = jax.lax.dynamic_slice(ring, at, (width,))
    ring = jax.lax.dynamic_update_slice(ring, jnp.where(flag, row, old), at)
    count = jnp.where(flag, number + 1, count)
    return jax.lax.dynamic_update_slice(ring, count[None], (which,))


def _last(ring: Array, dims: int, which: int, width: int) -> Array:
    """The newest row; of no meaning before the first."""
    begin, capacity = _begins(dims)[which], LEVELS if which == _LEVELS else CAPACITY
    place = begin + ((ring[which] - 1) % capacity) * width
    return jax.lax.dynamic_slice(ring, (place,), (width,))


def add_entry(ring: Array, row: Array, dims: int, *, flag: Bool[Array, ""]) -> Array:
    """Adds an entry where it is flagged. One that goes back to where the last one did takes its place.

    What lay between two such is undone by both, and a run that breaks again and again has one row.

    Args:
      ring: Of `empty`.
      row: Of `words_of`.
      dims: Of the space.
      flag: Whether to.
    """
    at, before = words.positions(_template(dims)), _last(ring, dims, _ENTRIES, row.shape[0])
    same = (row[at.cause] == HEARD) & (before[at.cause] == HEARD) & (row[at.rewound] >= 0)
    same &= (row[at.rewound] == before[at.rewound]) & (row[at.outcome] == before[at.outcome])
    same &= (row[at.outcome] > 0) & (ring[_ENTRIES] > 0)
    times = jnp.where(same, before[at.times] + row[at.times], row[at.times])
    row = jax.lax.dynamic_update_slice(row, times[None], (at.times,))
    return _put(ring, dims, _ENTRIES, row, flag=flag, over=same)


def add_span(ring: Array, dims: int, *, step: Array, bits: Array) -> Array:
    """Notes that a step was not made, or did not count; with those before it that were alike in one row."""
    before = _last(ring, dims, _SPANS, _SPAN_WORDS)
    joins = (ring[_SPANS] > 0) & (before[0] == step - 1) & (before[2] == bits)
    row = jnp.stack([step, jnp.where(joins, before[1], 0) + 1, bits]).astype(jnp.int32)
    return _put(ring, dims, _SPANS, row, flag=bits > 0, over=joins)


def add_metric(ring: Array, dims: int, made: MetricEntry) -> Array:
    """Adds a validation metric, and the entry of what it changed of the run."""
    before = _last(ring, dims, _METRICS, _METRIC_WORDS)
    is_due = made.is_told & ((ring[_METRICS] == 0) | (made.step - before[0] >= made.spacing) | made.always)
    # One state has one metric.
    is_due &= (ring[_METRICS] == 0) | (made.step != before[0])
    ring = _put(ring, dims, _METRICS, words.pack([made.step, made.metric, made.is_settled]), flag=is_due)
    return add_entry(ring, made.words, dims, flag=made.is_event)


def add_level(ring: Array, dims: int, *, step: Array, level: Array, flag: Array) -> Array:
    """Adds a reading of the loss's running level where it is flagged."""
    return _put(ring, dims, _LEVELS, words.pack([step, jnp.asarray(level, jnp.float32)]), flag=flag)


def read(ring: np.ndarray, dims: int) -> Contents:
    """What is in a ring. Host only."""
    begins, counts = _begins(dims), ring[:_COUNTS]

    def rows(which: int) -> np.ndarray:
        count, capacity = int(counts[which]), LEVELS if which == _LEVELS else CAPACITY
        table = ring[begins[which] : begins[which + 1]].reshape(capacity, -1)
        return table[[number % capacity for number in range(max(count - capacity, 0), count)]]

    number, real = (jax.ShapeDtypeStruct((), name) for name in ("int32", "float32"))
    steps, metrics, settled = words.read(rows(_METRICS), [number, real, number])
    return Contents(
        entries=words.read(rows(_ENTRIES), _template(dims)),
        dropped=max(int(counts[_ENTRIES]) - CAPACITY, 0),
        spans=[(last, length, bits) for last, length, bits in rows(_SPANS).tolist()],
        metrics=list(zip(steps.tolist(), metrics.tolist(), (settled > 0).tolist(), strict=True)),
        levels=list(zip(*(column.tolist() for column in words.read(rows(_LEVELS), [number, real])), strict=True)),
    )
