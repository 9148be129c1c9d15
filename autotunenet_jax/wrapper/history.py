"""The history of a tuned optimizer: what its state remembers, read on the host and told as `fit` tells a run."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from ..controller.plan import MAX_FORKS
from ..controller.schedule import shape_of
from ..controller.state import (
    FORK,
    OUTCOME_RETRIED,
    OUTCOME_ROLLBACK,
    PHASES,
    TRAIN,
    Directive,
    Round,
    TunerState,
    empty_round,
)
from ..history.history import History
from ..session.notices import notices
from ..session.progress import Progress
from ..session.recorder import Recorder
from ..space.search_space import SearchSpace
from . import ring
from .accessors import tuned_state
from .notices import HOW
from .state import AutotuneState, Course, Settings, advanced, in_force

# Most records of training steps; beyond, they are thinned, but for those where something changes.
_MOST_RECORDS = 3500

_LOWERED = "Training became unhealthy: the rates were lowered. Nothing is undone without snapshots."
_DROPPED = "The record begins here: {count} older decisions are not in the state any more."


def history(opt_state: Any) -> History:
    """What happened in the run of a tuned optimizer: the `History` that `fit` returns. Host only.

    The state remembers its last 64 decisions, rollbacks and the like, and of validation metrics as many; a plan for a
    known ``total_steps`` has fewer. From them follows what was in force at each step, exactly. ``loss`` is known only
    where it was noted, at decisions and every fiftieth of the budget (at least 20 steps, at most 500), and NaN
    elsewhere. Batches were not rewound for forks: the ``data_step`` of a record is its step.

    Example:
        >>> import optax
        >>> from autotunenet_jax import autotune
        >>> optimizer = autotune(optax.sgd, {"learning_rate": (1e-3, 1.0)}, total_steps=1000)
        >>> params, state = jnp.ones(3), optimizer.init(jnp.ones(3))
        >>> updates, state = optimizer.update(2 * params, state, params, value=jnp.sum(params**2))
        >>> history(state)
        History(1 records, 0 rounds, 0 events, 0.0 % of the steps on forks not kept, 0.0 % undone)

    Args:
      opt_state: As for `hyperparams`, between two steps.

    Returns:
      The history up to here; inside a round the running fork counts as kept. Where older decisions are gone,
      ``summary["dropped"]`` says how many, and there are no schedules.

    Raises:
      TypeError: Called inside a compiled function.
      ValueError: There is no tuned optimizer in it, or the state is one of several runs.

    Cost:
      Some ten milliseconds, and the compilation of the schedule at the first call.
    """
    state = tuned_state(opt_state)
    settings = state.settings
    leaves = jax.tree.leaves(state)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError("a history is read on the host: call it with the state that the compiled function returned.")
    made = History(settings.core.space.names, mode="max" if settings.is_max else "min", is_paired=False)
    if state.record is None:
        made.describe(settings.core.space)
        return made
    if state.record.ndim > 1:
        raise ValueError(
            "this is the state of several runs, as jax.vmap makes them; a history is that of one. "
            "Take one: jax.tree.map(lambda leaf: leaf[0], opt_state)."
        )
    return _HistoryBuilder(state, made).finished()


class _Tuned(NamedTuple):
    """What `notices` looks at."""

    space: SearchSpace
    mode: str
    total_steps: int | None


class _HistoryBuilder:
    """Tells a recorder of a run, entry by entry."""

    def __init__(self, state: AutotuneState, made: History):
        self.settings, self.history = state.settings, made
        self.course: Course = jax.device_get(state.course)
        self.space = state.settings.core.space
        self.held = ring.read(np.asarray(state.record), self.space.dims)
        undoes = state.settings.memory != "drift"
        self.recorder = Recorder(made, self.space, Progress(0, is_on=False), (), log=None, undoes=undoes)
        self.forks: list[ring.Ended] = []
        self.spans: list[tuple[int, int]] = []
        self.fork_start = self.retreats = 0
        self.incumbent = np.zeros(self.space.dims, np.float32)
        # Whether the record begins in the middle of a round, which then is not told.
        self.is_partial = False

    def finished(self) -> History:
        """Everything, in order."""
        entries, ts = self.held.entries, self.course.tuner
        steps = [int(step) for step in entries.step]
        last = int(ts.step) + int(self.course.lag)
        rows = _records(self.settings, self.course, self.held, last)
        self._begin(_entry_at(entries, 0))
        place = 0
        for number in range(1, len(steps)):
            while place < len(rows) and rows[place]["step"] <= steps[number]:
                self._add(rows[place], _entry_at(entries, number - 1))
                place += 1
            self._tell(_entry_at(entries, number), is_over=0 < int(ts.plan.total) <= steps[number] + 1)
        for row in rows[place:]:
            self._add(row, _entry_at(entries, len(steps) - 1))
        for end, length, bits in self.held.spans:
            if bits & ring.SKIPPED:
                self.history.discard(end - length, end)
        if int(ts.phase) != TRAIN and not self.is_partial:
            self.recorder.abandon(last, len(self.forks))
        for step, metric, is_settled in self.held.metrics:
            self.recorder.add_eval(step, metric, is_settled=is_settled)
        self.recorder.discarded_steps = int(ts.discarded)
        self._note_what_is_told(last)
        self.recorder.finish(last, int(ts.rollbacks), total=int(ts.plan.total), dropped=self.held.dropped)
        return self.history

    def _note_what_is_told(self, last: int) -> None:
        """Events of what the user should know by now."""
        ts, held = self.course.tuner, self.history
        tuned = _Tuned(self.space, held.mode, int(ts.plan.total) or None)
        is_over = 0 < int(ts.plan.total) <= last
        for notice in notices(tuned, ts, rounds=held.rounds, evals=held.evals, is_over=is_over, how=HOW):
            self.recorder.note(last, notice.kind, notice.message)

    def _begin(self, first: ring.Entry) -> None:
        step, phase = int(first.step), int(first.stretch.phase)
        self.retreats, self.incumbent = int(first.retreats), first.stretch.incumbent
        self.fork_start = step
        if self.held.dropped:
            self.is_partial = phase != TRAIN
            self.recorder.note(step, "dropped", _DROPPED.format(count=self.held.dropped))
        elif phase != TRAIN:
            self.recorder.begin_round(step, phase)

    def _add(self, row: dict[str, Any], entry: ring.Entry) -> None:
        phase = int(entry.stretch.phase)
        fork = len(self.forks) if phase == FORK else -1
        self.history.add({**row, "phase": PHASES[phase], "round": len(self.history.rounds), "fork": fork})

    def _tell(self, entry: ring.Entry, *, is_over: bool) -> None:
        cause, step = int(entry.cause), int(entry.step)
        if cause == ring.DECIDED:
            self._tell_decision(entry)
        elif cause == ring.HEARD:
            self._tell_loss(entry)
        elif cause == ring.MEASURED and int(entry.retreats) > self.retreats:
            self.recorder.retreat(step, is_over=is_over)
        elif cause == ring.MEASURED and np.any(entry.stretch.incumbent > self.incumbent):
            self.recorder.climb(step)
        elif cause == ring.EXTENDED:
            self.recorder.extended(step, int(entry.stretch.total))
        self.retreats, self.incumbent = int(entry.retreats), entry.stretch.incumbent

    def _tell_loss(self, entry: ring.Entry) -> None:
        step, times = int(entry.step), int(entry.times)
        outcome, verdict = int(entry.outcome), int(entry.verdict)
        if outcome == OUTCOME_ROLLBACK and int(entry.rewound) < 0:
            self.recorder.note(step, "lowered", _LOWERED)
            return
        told = {"step": step, "rewound": int(entry.rewound), "verdict": verdict, "outcome": outcome}
        before = len(self.history.events)
        self.recorder.log({**told, "has_fallen": bool(entry.has_fallen)}, int(entry.phase))
        self.recorder.flush()
        if times > 1 and len(self.history.events) > before:
            self.history.events[-1]["message"] += f" So it was {times} times in a row."

    def _tell_decision(self, entry: ring.Entry) -> None:
        before, after, step = int(entry.phase), int(entry.stretch.phase), int(entry.step)
        if self.is_partial:
            self.is_partial = after != TRAIN
            return
        has_ended = before == FORK and (after == TRAIN or bool(entry.restore))
        if has_ended and int(entry.outcome) != OUTCOME_RETRIED:
            self.forks.append(entry.ended)
            self.spans.append((self.fork_start, step))
        if before != TRAIN or after != TRAIN:
            self.fork_start = step
        chosen = self.space.decode(jnp.asarray(entry.stretch.incumbent))
        kind, report = int(entry.ended.kind), self._report(entry)
        self.recorder.decided(step, before, after, _directive(entry), report, kind, chosen)
        if after == TRAIN:
            self._lose_winner(entry)
            self.forks, self.spans = [], []

    def _report(self, entry: ring.Entry) -> Round:
        """The round as it was decided on."""
        held: Round = jax.device_get(empty_round(self.space.dims, 0))
        names = ("x", "score", "steps", "status", "p_better", "lead", "deviation")
        columns = {name: np.array(getattr(held, name)) for name in names}
        for number, fork in enumerate(self.forks[:MAX_FORKS]):
            for name, column in columns.items():
                column[number] = getattr(fork, name)
        ended = entry.ended
        return held._replace(**columns, kept=ended.kept, has_eval=ended.has_eval > 0, reference=ended.reference)

    def _lose_winner(self, entry: ring.Entry) -> None:
        """Without a copy of its own the winner of a round is lost, unless it ran last."""
        kept = int(entry.ended.kept)
        if self.settings.memory == "rewind" and bool(entry.is_back) and 0 <= kept < len(self.spans):
            self.history.discard(*self.spans[kept])


def _entry_at(entries: ring.Entry, number: int) -> ring.Entry:
    return jax.tree.map(lambda column: column[number], entries)


def _directive(entry: ring.Entry) -> Directive:
    no: Any = np.zeros((), bool)
    directive = Directive(no, no, no, no, no, entry.stretch.data_step, entry.outcome, entry.verdict)
    return directive._replace(restore=entry.restore > 0)


# What was in force.


def _records(settings: Settings, course: Course, held: ring.Contents, last: int) -> list[dict[str, Any]]:
    """The record of each step that is told, but for its place in the rounds; steps in order."""
    starts = np.array(held.entries.step, int)
    steps = _steps(starts, last)
    if not len(steps):
        return []
    places = np.searchsorted(starts, steps, side="left") - 1
    values = _values(settings, course, held, steps, places)
    losses = {int(e): float(loss) for e, loss in zip(starts, held.entries.loss, strict=True) if np.isfinite(loss)}
    losses = {**dict(held.levels), **losses}
    columns = {name: column.tolist() for name, column in values.items()}
    return [
        {
            "step": int(step),
            "data_step": int(step),
            "loss": losses.get(int(step), float("nan")),
            **{name: column[number] for name, column in columns.items()},
        }
        for number, step in enumerate(steps)
    ]


def _steps(starts: np.ndarray, last: int) -> np.ndarray:
    """Which steps are told: evenly, and on both sides of each entry."""
    first = int(starts[0])
    stride = -(-(last - first) // _MOST_RECORDS) or 1
    steps = {*range(first + 1, last + 1, stride), *starts.tolist(), *(starts + 1).tolist(), last}
    return np.array(sorted(step for step in steps if first < step <= last), int)


def _values(
    settings: Settings, course: Course, held: ring.Contents, steps: np.ndarray, places: np.ndarray
) -> dict[str, np.ndarray]:
    """The values that were in force at some steps, each under the entry at its place."""
    done = steps - 1 - np.array(held.entries.step, int)[places]
    paused = _paused(held.spans, np.array(held.entries.step, int)[places], steps - 1)
    totals = np.array(held.entries.stretch.total)[places]
    found = {}
    for total in np.unique(totals):
        here = np.flatnonzero(totals == total)
        # Lengths in powers of two: a longer history seldom compiles anew.
        padded = np.resize(here, 1 << int(len(here) - 1).bit_length())
        under = jax.tree.map(lambda column, at=places[padded]: column[at], held.entries)
        values = _in_force_at(
            _with_total(settings, int(total)), course, under.stretch, under.step, done[padded], paused[padded]
        )
        for name, column in jax.device_get(values).items():
            out = found.setdefault(name, np.zeros(len(steps), column.dtype))
            out[here] = column[: len(here)]
    return found


def _paused(spans: list[tuple[int, int, int]], begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of the steps after ``begins`` and up to ``ends`` did not advance their stretch."""
    total = np.zeros(len(begins), int)
    for last, length, bits in spans:
        if bits & ring.HELD:
            total += np.maximum(np.minimum(ends, last) - np.maximum(begins, last - length), 0)
    return total


def _with_total(settings: Settings, total: int) -> Settings:
    """The settings with the schedule as it was for a budget: it is one over steps where the user gave it."""
    core = settings.core
    if not core.shape.steps or total in (0, core.shape.steps):
        return settings
    shape = shape_of("hold", core.shape.form, total)
    return dataclasses.replace(settings, core=dataclasses.replace(core, shape=shape))


@functools.partial(jax.jit, static_argnums=0)
def _in_force_at(
    settings: Settings,
    course: Course,
    stretches: ring.Stretch,
    begins: Int[Array, "n"],
    done: Int[Array, "n"],
    paused: Int[Array, "n"],
) -> dict[str, Array]:
    """Values after ``done`` steps of a stretch, some of which did not advance it."""
    # Steps whose losses were never told follow rules of their own.
    has_told = course.tuner.step > 0

    def one(held: ring.Stretch, begin: Array, done: Array, paused: Array) -> dict[str, Array]:
        heard = jnp.where(has_told, jnp.minimum(done, 1), 0)
        ts: TunerState = ring.with_stretch(course.tuner, held, begin)
        ts = ts._replace(segment_left=ts.segment_left + paused)
        past = course._replace(tuner=advanced(ts, heard), lag=done - heard)
        return in_force(settings, past, is_silent=~has_told)

    return jax.vmap(one)(stretches, begins.astype(jnp.int32), done.astype(jnp.int32), paused.astype(jnp.int32))
