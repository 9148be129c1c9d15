"""The state of `autotune`, and what it says: which hyperparameters are in force, and what a loss makes of it."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..compiler import packing
from ..controller.core import Core
from ..controller.rollback import select
from ..controller.state import FORK, TRAIN, TunerState, later
from ..controller.validation_monitor import is_heard, kept_at_once
from ..space import injection
from . import memory_drift, ring
from .held_snapshots import HeldSnapshots, Snapshot

Memory = Literal["keep-winner", "rewind", "drift"]
MEMORIES = ("keep-winner", "rewind", "drift")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything static that the compiled update depends on.

    Attributes:
      core: The controller.
      memory: Which copies are kept.
      is_max: Whether the validation metric is maximised.
      is_on: Whether the tuner runs at all.
      layout: How the course of the run is packed.
      max_share: As the user gave it.
      digests: Fingerprint of space, plan and policy: a state of another optimizer is one of another structure.
      made_by: That of the optimizer which began the run; another one where the budget was extended since.
    """

    core: Core
    memory: Memory
    is_max: bool
    is_on: bool
    layout: packing.Layout
    max_share: float | None = None
    digests: tuple[int, ...] = ()
    made_by: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        """How many snapshots are held."""
        return {"keep-winner": 2, "rewind": 1, "drift": 0}[self.memory] if self.is_on else 0


class Order(NamedTuple):
    """The copies a directive asks for; bool scalars, in the order they are carried out."""

    save: Bool[Array, ""]
    keep: Bool[Array, ""]
    restore: Bool[Array, ""]
    adopt: Bool[Array, ""]


class Course(NamedTuple):
    """What the wrapper knows of the run, the arrays being trained apart.

    A transformation can only add an update to the parameters, so the way back to a snapshot is the update that leads
    there, and a later transformation, such as clipping, may shorten it. Until the parameters have arrived, or the
    attempts are used up, ``home`` says where they are going, losses are not heard, and updates lead on to it.

    Attributes:
      tuner: What the tuner knows.
      start: Values the run started from, in the order of the space.
      lag: Steps taken since a loss was last reported.
      order: Copies to make before the next step, asked for by `observe` and `observe_eval`.
      is_spoiled: Whether the last update, without its loss, was not made.
      home: 0, or the snapshot that the parameters are on their way back to: 1 saved, 2 kept. The inner state follows
        with the next update.
      attempts: Updates left for getting there.
      is_reverted: Whether the last update was not the optimizer's: not made, or a way back.
      largest: Largest norm of the gradients so far, forgotten slowly.
      accidents: Gradients in a row that were out of line with it.
      drift: Running levels of the loss; None but in drift mode.
    """

    tuner: TunerState
    start: tuple[Array, ...]
    lag: Int[Array, ""]
    order: Order
    is_spoiled: Bool[Array, ""]
    home: Int[Array, ""]
    attempts: Int[Array, ""]
    is_reverted: Bool[Array, ""]
    largest: Float[Array, ""]
    accidents: Int[Array, ""]
    drift: memory_drift.Drift | None


class AutotuneState(NamedTuple):
    """The state of `autotune`: the tuner, the inner optimizer and their snapshots.

    Attributes:
      packed: The `Course` of the run, its hundred small arrays in four: a step pays for each array of its state.
      inner: State of the inner optimizer.
      snapshots: The saved snapshot and the kept one, as far as the memory mode has them; a number without parameters.
      aux: State of the training step's own, as the last update that was made left it.
      record: What happened, see `ring`; None where nothing is tuned.
      settings: Static; no array in it.
    """

    packed: packing.Packed
    inner: Any
    snapshots: HeldSnapshots | Array | None
    aux: tuple[Any, ...]
    record: Int[Array, "words"] | None
    settings: Settings

    @property
    def course(self) -> Course:
        """What is packed."""
        packed = jax.tree.map(injection.unboxed, self.packed, is_leaf=injection.is_box)
        return packing.unpack(packed, self.settings.layout)

    @property
    def tuner(self) -> TunerState:
        """What the tuner knows."""
        return self.course.tuner

    @property
    def held(self) -> HeldSnapshots | None:
        """The snapshots, if there is anything to copy."""
        return self.snapshots if isinstance(self.snapshots, HeldSnapshots) else None

    @property
    def saved(self) -> Snapshot | None:
        """The saved snapshot; None where the memory mode has none."""
        return None if self.held is None else self.held.read(0)

    @property
    def kept(self) -> Snapshot | None:
        """The kept snapshot, likewise."""
        return self.held.read(1) if self.settings.memory == "keep-winner" and self.held is not None else None


def no_order() -> Order:
    """Nothing to copy; four arrays of their own, so that each can be donated."""
    return Order(*(jnp.zeros((), bool) for _ in range(4)))


def advanced(ts: TunerState, steps: Array) -> TunerState:
    """The tuner's state ``steps`` unreported steps later: time passes, and a stretch waits for a loss to end it."""
    after = later(ts, steps)
    return after._replace(segment_left=jnp.where(steps > 0, jnp.maximum(after.segment_left, 1), ts.segment_left))


def in_force(settings: Settings, course: Course, *, is_silent: bool | Array = False) -> dict[str, Array]:
    """Values for the next step, by name.

    Args:
      settings: Of the wrapper.
      course: Before the step.
      is_silent: Whether the step comes without its loss; the very first one then is no part of an experiment.
    """
    core, ts, lag = settings.core, course.tuner, course.lag
    start = dict(zip(core.space.names, course.start, strict=True))
    if not settings.is_on:
        return start
    values = core.hyperparams(advanced(ts, lag))
    # Without losses there is no experiment to run: the values in force outside experiments, and the schedule.
    waits = (ts.phase != TRAIN) & (lag >= ts.segment_left)
    is_unheard = (ts.step == 0) & ((lag > 0) | is_silent)
    resting = advanced(ts, lag)._replace(phase=jnp.full_like(ts.phase, TRAIN))
    calm = core.hyperparams(resting)
    factor = core.schedule(resting)
    exact = {
        name: value * factor if role == "rate" else value
        for (name, value), role in zip(start.items(), core.space.roles, strict=True)
    }
    return {
        name: jnp.where(is_unheard, exact[name], jnp.where(waits, calm[name], values[name])).astype(values[name].dtype)
        for name in values
    }


def write_in_force(inner: Any, values: dict[str, Array]) -> Any:
    """The inner state with the tuned values that it has a place for."""
    return injection.write(inner, values, injection.resolve(values, inner))


def take_metric(settings: Settings, course: Course, given: Array) -> tuple[Course, ring.MetricEntry]:
    """Tells the tuner a validation metric of the current parameters; the next update keeps the best ones."""
    given = jnp.asarray(given, jnp.float32)
    metric = -given if settings.is_max else given
    ts = advanced(course.tuner, course.lag)
    is_told = is_heard(course.tuner, given) & (jnp.isfinite(given) | (course.lag == 0))
    drift, fed = course.drift, metric
    if drift is not None:
        felt, fed = memory_drift.feed_eval(drift, ts, metric)
        drift = select(is_told, felt, drift)
    told = select(is_told, settings.core.observe_eval(ts, fed), ts)
    # The way back from a metric that rises leads to the kept snapshot.
    if settings.memory == "keep-winner":
        held, keeps = kept_at_once(told)
        # On the way back to a snapshot, the inner state is still another one: that of a step later is kept then.
        keeps &= is_told & (course.home == 0) & ~course.order.restore & ~course.order.adopt
        seen, slots = select(keeps, (held.validation, held.slots), (told.validation, told.slots))
        tuner = course.tuner._replace(window=told.window, validation=seen, slots=slots, incumbent=told.incumbent)
        course = course._replace(order=course.order._replace(keep=course.order.keep | keeps))
    else:
        seen = course.tuner.validation._replace(level=told.validation.level)
        tuner = course.tuner._replace(window=told.window, validation=seen)
    after = ts._replace(validation=tuner.validation, incumbent=tuner.incumbent)
    return course._replace(tuner=tuner, drift=drift), _noted(ts, after, given, is_told)


def _noted(before: TunerState, after: TunerState, metric: Array, is_told: Array) -> ring.MetricEntry:
    seen, past = after.validation, before.validation
    is_score = (before.phase == FORK) & (before.segment_left == 1)
    is_last = (before.plan.total > 0) & (before.plan.total - before.step <= 1)
    has_moved = jnp.any(after.incumbent != before.incumbent)
    return ring.MetricEntry(
        step=before.step,
        metric=metric,
        is_settled=(before.phase == TRAIN) | (before.step == 0),
        always=is_score | is_last,
        # As near as two readings that count may be.
        spacing=jnp.asarray(before.plan.check_every * 4 // 5),
        is_told=is_told,
        words=ring.words_of(ring.entry(after, cause=ring.MEASURED, phase=before.phase)),
        is_event=(seen.retreats != past.retreats) | (seen.cools_from != past.cools_from) | has_moved,
    )
