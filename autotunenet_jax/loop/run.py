"""One run of `fit`: JAX as the host of a session, and the steps between two decisions."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ..checkpoint.memory_copies import HostCopy, copy_tree, copy_tree_to_host
from ..compiler.cpu_queue import Pace
from ..compiler.placement import beside
from ..controller import AutoTuneNet
from ..controller.core import Core
from ..controller.state import FORK, TRAIN, Directive, TunerState
from ..session.batches import BatchSource
from ..session.host import Host
from ..session.notices import Notices, notices
from ..session.recorder import Recorder
from ..session.session import Session, is_better
from ..session.signals import Stop
from .device_controller import DeviceController
from .device_copies import Copies, carry_out, refresh_keys
from .fork_executor import ForkExecutor, StepLog
from .parallel_forks import ParallelForks, WaitingFork
from .sound_steps import count_non_finite, train


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step_jit(
    core: Core,
    train_step: Callable[..., Any],
    has_aux: bool,
    copies: Copies,
    ts: TunerState,
    hyperparams: dict[str, Array],
    batch: Any,
) -> Any:
    """One training step with its bookkeeping and, after a rollback, its repair, as one donated program.

    Compiled once for each train step and core, however many runs use them.
    """
    state, loss, told, metrics = train(train_step, copies.state, batch, hyperparams, has_aux=has_aux)
    # A snapshot that the tuner distrusts is dated before the run.
    saved_step, kept_step = (jnp.maximum(step, 0) for step in (ts.slots.saved_step, ts.slots.kept_step))
    ts, directive, due = core.tick(ts, told)
    copies = carry_out(directive, Copies(state, copies.saved, copies.kept))
    copies = copies._replace(state=refresh_keys(directive, copies.state, ts.rollbacks))
    rewound = jnp.where(directive.restore, saved_step, jnp.where(directive.adopt, kept_step, -1))
    log = _entry(ts, directive, loss, rewound, metrics)
    return copies, ts, core.hyperparams(ts), due, directive.evaluate, log


class _Heard(NamedTuple):
    """What came of steps that were heard: how many, the last one's result, and a row for each in ``log``."""

    count: Array
    ts: TunerState
    hyperparams: Any
    due: Array
    wants_eval: Array
    log: Any


@functools.partial(jax.jit, static_argnums=0)
def _hear_jit(core: Core, ts: TunerState, hyperparams: dict[str, Array], rows: StepLog, count: Array) -> _Heard:
    """What `_step_jit` does besides training, for steps of a fork that have been trained already.

    It ends where a decision is due, or after ``count`` steps: rows are filled up, so that one program does for all.
    """

    def one(ts: TunerState, in_force: dict[str, Array], heard: StepLog) -> Any:
        ts, directive, due = core.tick(ts, heard.told)
        log = _entry(ts, directive, heard.loss, jnp.int32(-1), heard.metrics)
        return ts, core.hyperparams(ts), due, directive.evaluate, {**log, "hyperparams": in_force}

    def turn(so_far: _Heard) -> _Heard:
        heard = jax.tree.map(lambda row: row[so_far.count], rows)
        ts, in_force, due, wants_eval, row = one(so_far.ts, so_far.hyperparams, heard)
        log = jax.tree.map(lambda rows, value: rows.at[so_far.count].set(value), so_far.log, row)
        return _Heard(so_far.count + 1, ts, in_force, due, wants_eval, log)

    row = jax.eval_shape(one, ts, hyperparams, jax.tree.map(lambda row: row[0], rows))[-1]
    log = jax.tree.map(lambda like: jnp.zeros((*rows.told.shape, *like.shape), like.dtype), row)
    no = jnp.zeros((), bool)
    start = _Heard(jnp.int32(0), ts, hyperparams, no, no, log)
    return jax.lax.while_loop(lambda so_far: (so_far.count < count) & ~so_far.due, turn, start)


def _entry(ts: TunerState, directive: Directive, loss: Any, rewound: Array, metrics: Mapping[str, Any]) -> Any:
    """What the history hears of a step."""
    return {
        "step": ts.step,
        "data_step": ts.data_step,
        "loss": jnp.asarray(loss, jnp.float32),
        "verdict": directive.verdict,
        "outcome": directive.outcome,
        "has_fallen": ts.validation.has_fallen,
        # Budget step of the snapshot a rollback went back to.
        "rewound": rewound,
        "metrics": {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()},
    }


@functools.partial(jax.jit, static_argnums=0)
def _eval_jit(eval_step: Callable[..., Any], state: Any) -> Array | dict[str, Array]:
    return eval_step(state)


_count_non_finite_jit = jax.jit(count_non_finite)


class JaxHost(Host):
    """A training state on the device.

    Attributes:
      state: The state; replaced by every step.
      hyperparams: In force for the next step, on the device.
    """

    def __init__(
        self, state: Any, source: BatchSource, eval_step: Callable[..., Any] | None, monitor: str | None, stop: Stop
    ):
        # Leaves become JAX arrays, and nothing is shared with the caller's.
        state = jax.tree.map(jnp.asarray, state)
        self.state = copy_tree(beside(state, state))
        self.source, self.eval_step, self._monitor, self._stop = source, eval_step, monitor, stop
        self.hyperparams: Mapping[str, Any] = {}

    def copy(self) -> Any:
        """Real copies of the arrays."""
        return copy_tree(self.state)

    def restore(self, copy: Any, *, rewinds: bool) -> None:
        """The copy's arrays, copied; batches are asked for by position."""
        self.state = copy_tree(copy)

    def write(self, hyperparams: Mapping[str, Any]) -> None:
        """They go into the next step as arguments."""
        self.hyperparams = hyperparams

    def evaluate(self) -> float | None:
        """The metric of ``eval_step``."""
        if self.eval_step is None:
            return None
        with self._stop.exposed():
            measured = jax.device_get(_eval_jit(self.eval_step, self.state))
        if self._monitor is None:
            return float(measured)
        self.metrics = {name: float(value) for name, value in measured.items()}
        return self.metrics[self._monitor]

    def batch(self, position: int) -> Any:
        """The batch at a position; the user's code."""
        with self._stop.exposed():
            return self.source.get(position, self.hyperparams)

    def count_non_finite(self, copy: Any = None) -> int:
        """Over all real and complex arrays."""
        return int(_count_non_finite_jit(self.state if copy is None else copy))

    def keep_best(self) -> HostCopy:
        """A copy in host memory."""
        return copy_tree_to_host(self.state)

    def restore_best(self, best: HostCopy | None) -> bool:
        """Back to the device."""
        if best is not None:
            self.state = best.to_device()
        return best is not None

    def begin_round(self, position: int) -> None:
        """Batches are remembered."""
        self.source.hold(position)

    def end_round(self, position: int) -> None:
        """And forgotten."""
        self.source.release(position)


class Run:
    """The mutable side of one call of `fit`.

    Args:
      train_step: The user's.
      state: To begin with.
      source: Of the batches.
      tuner: What is tuned.
      has_aux: Whether ``train_step`` returns metrics too.
      eval_step: The user's, if any.
      monitor: Entry of its dict that is the metric; None where it returns a scalar.
      key: Of the tuner's random choices.
      recorder: Writes the history.
      stop: Of signals.
      parallel_forks: How many forks run together at most, ``"auto"``, or who trains them.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        state: Any,
        source: BatchSource,
        tuner: AutoTuneNet,
        *,
        has_aux: bool,
        eval_step: Callable[..., Any] | None,
        monitor: str | None,
        key: PRNGKeyArray,
        recorder: Recorder,
        stop: Stop,
        parallel_forks: int | Literal["auto"] | ForkExecutor = 1,
    ):
        self.train_step, self.source, self.recorder = train_step, source, recorder
        self.has_aux, self._stop, self._pace = has_aux, stop, Pace()
        self.host = JaxHost(state, source, eval_step, monitor, stop)
        self.controller = DeviceController(tuner, key=key)
        self.parallel_forks = ParallelForks(
            train_step, tuner, has_aux=has_aux, wanted=parallel_forks, state=self.host.state
        )
        home = self.parallel_forks.executor.home
        self.host.state, self.controller.state = home((self.host.state, self.controller.state))
        # Where steps leave it, so that the second one finds what the first one was compiled for.
        self.controller.state = beside(self.controller.state, self.host.state)
        self.session = Session(self.host, self.controller, recorder)
        self.notices, self._noticed = Notices(recorder), (0, 0)
        # The last batch and its loss, where there is no metric.
        self._last: Any = None
        self._begins_fork = False

    @property
    def copies(self) -> Copies:
        """The training state and both copies of it."""
        return Copies(self.host.state, self.session.saved, self.session.kept)

    @copies.setter
    def copies(self, copies: Copies) -> None:
        self.host.state, self.session.saved, self.session.kept = copies

    # What a durable snapshot holds, and the way back.

    def snapshot(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as a tree that `Snapshots` can store."""
        best, session = None, self.session
        if self.host.eval_step is not None:
            # The tree must not change its structure with the first finite metric.
            best = self.host.state if session.best is None else session.best.to_device()
        books: dict[str, Any] = session.books()
        if self.parallel_forks.is_on:
            # Those that wait to be asked for are lost with this process.
            books["unused_steps"] = self.parallel_forks.unused_steps + self.parallel_forks.waiting_steps
        return {"copies": self.copies, "tuner": self.controller.state, "best": best, "host": json.dumps(books)}

    def resume(self, tree: dict[str, Any], *, extend: bool = False) -> None:
        """Goes on from what `snapshot` gave, on request with another budget."""
        controller, session = self.controller, self.session
        controller.replace(tree["tuner"], extend=extend)
        self.copies = tree["copies"]
        books = json.loads(str(tree["host"]))
        session.load(books)
        self.parallel_forks.unused_steps = books.get("unused_steps", 0)
        session.best = None if session.best_eval is None else copy_tree_to_host(tree["best"])
        session.write()
        if controller.phase == TRAIN:
            self.source.release(controller.data_step)
        else:
            self.source.hold(int(controller.state.slots.saved_data))

    def is_alive(self) -> bool:
        """Whether the state is whole: a step that fails takes the buffers it was given with it."""
        leaves = jax.tree.leaves((self.copies, self.controller.state))
        return not any(leaf.is_deleted() for leaf in leaves)

    # Training.

    def advance(self) -> None:
        """Trains one step, or hears all but the last one of a fork that has run beside another."""
        begins_fork, self._begins_fork = self._begins_fork, False
        fork = None
        if begins_fork:
            fork = self.parallel_forks.find(self.controller.state, self.host)
        if fork is None:
            self.train_one()
        else:
            self._hear(fork)

    def _hear(self, fork: WaitingFork) -> None:
        """Tells the controller of a fork that has run, up to where it has something to ask for."""
        host, controller = self.host, self.controller
        core, in_force = controller.tuner.core, dict(host.hyperparams)
        heard = _hear_jit(core, controller.state, in_force, fork.heard, np.int32(fork.steps))
        controller.state, host.hyperparams = heard.ts, heard.hyperparams
        count, due, wants_eval, log = jax.device_get((heard.count, heard.due, heard.wants_eval, heard.log))
        for pos in range(int(count)):
            self._count(due, wants_eval, jax.tree.map(lambda rows, pos=pos: rows[pos], log))
        if not due:
            host.state = fork.state
        else:
            # It failed, and its state is of no use.
            self.parallel_forks.unused_steps += fork.steps - int(count)

    def train_one(self) -> None:
        """Dispatches one step; waits for nothing but, where the tuner may decide, for what it asks for."""
        host, controller = self.host, self.controller
        batch, in_force = host.batch(controller.data_step), host.hyperparams
        self.copies, controller.state, host.hyperparams, due, wants_eval, log = _step_jit(
            controller.tuner.core, self.train_step, self.has_aux, self.copies, controller.state, in_force, batch
        )
        self._pace.queued(log["loss"])
        if host.eval_step is None:
            self._last = batch, log["loss"]
        self._count(due, wants_eval, {**log, "hyperparams": in_force})

    def _count(self, due: Array, wants_eval: Array, log: dict[str, Any]) -> None:
        """Notes a step, and what it asks for."""
        controller, session = self.controller, self.session
        controller.step += 1
        controller.data_step += 1
        controller.segment_left -= 1
        self.recorder.log(log, controller.phase)
        if controller.segment_left <= 1 or controller.phase != TRAIN:
            session.wants_eval, session.is_due = bool(wants_eval), bool(due)
            # A rollback, or the end of all rounds, has moved the next decision.
            controller.segment_left = int(controller.state.segment_left)

    def complete(self) -> bool:
        """Does what the last step asked for, or the one that a resumed run had come to; returns whether it decided."""
        is_decided = self.session.complete() is not None
        if is_decided:
            self.session.write()
            self._begins_fork = self.parallel_forks.is_on and self.controller.phase == FORK
            if self.controller.phase == TRAIN:
                self.parallel_forks.release()
        return is_decided

    def train_some(self, steps: int, is_stopped: Callable[[], bool], *, on_step: Callable[[], None]) -> None:
        """Trains until ``steps`` steps are done, a decision has been taken, or somebody asks to stop."""
        for _ in range(steps):
            self.advance()
            is_decided = self.complete()
            on_step()
            if is_decided or is_stopped():
                return

    def deliver(self) -> None:
        """Lets callbacks and loggers hear of what is known by now; the user's code."""
        with self._stop.exposed():
            self.recorder.deliver()

    def tell(self, *, is_over: bool = False) -> None:
        """Tells the user what there is to be told, where something has been decided or measured since."""
        history = self.recorder.history
        noticed = (len(history.rounds), len(history.evals))
        if is_over or noticed != self._noticed:
            self._noticed = noticed
            self.recorder.flush()
            tuner, ts = self.controller.tuner, self.controller.state
            found = notices(tuner, ts, rounds=history.rounds, evals=history.evals, is_over=is_over)
            self.notices.tell(self.controller.step, found)

    def end(self, *, is_whole: bool) -> None:
        """Brings the run to its end: in a usable state, measured, and a whole one in the best state that it had."""
        session = self.session
        session.settle()
        session.evaluate()
        if is_whole and self._last is not None and self.controller.phase == TRAIN:
            self._look_at_last()
        if self.host.eval_step is not None and is_whole and session.end_at_best():
            session.last_eval = self.host.evaluate()
            if is_better(session.last_eval, session.best_eval, self.controller.tuner.mode):
                # The winner of a round, which was no reading outside one.
                session.best_eval = session.last_eval
        self.tell(is_over=True)

    def _look_at_last(self) -> None:
        """The loss of the last state, which no step has told and no metric will: one more step, and not taken.

        It is the compiled one. Only where the loss of the last batch has risen is it asked what that means.
        """
        host, controller, (batch, last) = self.host, self.controller, self._last
        state, ts = copy_tree_to_host(host.state), copy_tree(controller.state)
        # As if both copies had just been made, so that the step touches neither.
        now = [jnp.copy(ts.step if number % 2 else ts.data_step) for number in range(4)]
        slots = ts.slots._replace(saved_data=now[0], saved_step=now[1], kept_data=now[2], kept_step=now[3])
        core, ts = controller.tuner.core, ts._replace(slots=slots)
        copies, *_, log = _step_jit(core, self.train_step, self.has_aux, self.copies, ts, host.hyperparams, batch)
        self.copies = copies._replace(state=state.to_device())
        if not float(log["loss"]) <= float(last):
            self.session.leave_wreck(float(log["loss"]))
