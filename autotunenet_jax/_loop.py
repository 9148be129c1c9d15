"""The host loop: feeds batches, obeys directives, writes the history."""

import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from . import _obey
from ._batches import BatchSource, EndOfData
from ._checks import check_train_step
from ._controller import AutoTuneNet, Core, decide_jit, hyperparams_jit, observe_eval_jit
from ._history import History
from ._obey import Copies
from ._progress import Progress
from ._recorder import Recorder
from ._state import FORK, SWEEP, TRAIN, Directive, TunerState

_EVALS_PER_RUN = 20
_SHOW_EVERY_SECONDS = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """What `fit` returns.

    Attributes:
      state: The training state at the end of the run.
      history: What happened.
      hyperparams: Tuned values at the end, as Python objects, before the decay.
      tuner_state: The tuner's last state.
      eval: Validation metric of ``state``, or None without ``eval_step``.
      is_interrupted: Whether the run ended early, by Ctrl-C or for want of batches.
    """

    state: Any
    history: History
    hyperparams: dict[str, Any]
    tuner_state: TunerState
    eval: float | None
    is_interrupted: bool


@functools.partial(jax.jit, donate_argnums=1)
def _obey_jit(directive: Directive, copies: Copies) -> Copies:
    return _obey.obey(directive, copies)


def _compile_step(core: Core, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """One training step with its bookkeeping and, after a rollback, its repair, as one donated program."""

    def step(copies: Copies, ts: TunerState, hyperparams: dict[str, Array], batch: Any) -> Any:
        phase = ts.phase
        state, loss = train_step(copies.state, batch, hyperparams)
        saved_step, kept_step = ts.slots.saved_step, ts.slots.kept_step
        ts, directive, due = core.tick(ts, loss)
        copies = _obey.obey(directive, Copies(state, copies.saved, copies.kept))
        rewound = jnp.where(directive.restore, saved_step, jnp.where(directive.adopt, kept_step, -1))
        log = {
            "step": ts.step,
            "data_step": ts.data_step,
            "loss": jnp.asarray(loss, jnp.float32),
            "phase": phase,
            "rewound": rewound,
            "verdict": directive.verdict,
            # The step reads these from a donated state: they are copies of their own.
            "hyperparams": jax.tree.map(lambda value: value + jnp.zeros_like(value), hyperparams),
        }
        return copies, ts, core.hyperparams(ts), due, directive.evaluate, log

    return jax.jit(step, donate_argnums=(0, 1))


class _Stop:
    """Turns the first Ctrl-C into a request to stop after the current step; the second one raises."""

    def __init__(self):
        self.is_requested = False
        self._previous: Any = None

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if callable(self._previous):
                signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, signum: int, frame: Any) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True

    def __exit__(self, *exc: object) -> None:
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._previous)


class _Run:
    """The mutable side of one call of `fit`: the device's pytrees, and where the host believes the run to be."""

    def __init__(
        self,
        train_step: Callable[..., Any],
        state: Any,
        source: BatchSource,
        tuner: AutoTuneNet,
        *,
        eval_step: Callable[..., Any] | None,
        key: PRNGKeyArray,
        recorder: Recorder,
    ):
        self.tuner, self.core, self.source, self.recorder = tuner, tuner.core, source, recorder
        self.copies = _obey.start(state)
        self.ts = tuner.init(key)
        self.hyperparams = hyperparams_jit(self.core, self.ts)
        self.step_fn = _compile_step(self.core, train_step)
        self.eval_fn = jax.jit(eval_step) if eval_step is not None else None
        self.step, self.data_step = 0, 0
        self.phase, self.segment_left = int(self.ts.phase), int(self.ts.segment_left)
        self.evaluated_at = -1
        self.last_eval: float | None = None
        if self.phase != TRAIN:
            source.hold(0)
            recorder.begin_round(0, self.phase)

    def train_one(self) -> tuple[Array, Array]:
        """Dispatches one step; waits for nothing. Returns whether a decision is due and an evaluation wanted."""
        batch = self.source.get(self.data_step, self.hyperparams)
        self.copies, self.ts, self.hyperparams, due, wants_eval, log = self.step_fn(
            self.copies, self.ts, self.hyperparams, batch
        )
        self.step += 1
        self.data_step += 1
        self.recorder.log(log, self.phase)
        return due, wants_eval

    def train_stretch(self, steps: int, stop: "_Stop", *, on_step: Callable[[], None]) -> None:
        """Trains until ``steps`` steps are done or a decision has been taken; syncs only where the tuner may decide."""
        for _ in range(steps):
            due, wants_eval = self.train_one()
            self.segment_left -= 1
            at_end = self.segment_left <= 1 or self.phase != TRAIN
            if at_end:
                if bool(wants_eval):
                    self.evaluate(is_settled=self.phase == TRAIN)
                if bool(due):
                    self.decide()
                    on_step()
                    return
                self.segment_left = max(self.segment_left, 1)
            on_step()
            if stop.is_requested:
                return

    def evaluate(self, *, is_settled: bool) -> None:
        """Measures the validation metric and tells the tuner, once per step."""
        if self.eval_fn is None or self.evaluated_at == self.step:
            return
        metric = self.eval_fn(self.copies.state)
        self.ts = observe_eval_jit(self.core, self.ts, -metric if self.tuner.mode == "max" else metric)
        value = float(metric)
        self.evaluated_at = self.step
        self.recorder.add_eval(self.step, value, is_settled=is_settled)
        if is_settled:
            self.last_eval = value

    def decide(self) -> None:
        """Lets the tuner decide and carries its directive out."""
        before = self.phase
        self.recorder.flush()
        self.ts, directive, report = decide_jit(self.core, self.ts)
        self.copies = _obey_jit(directive, self.copies)
        self.hyperparams = hyperparams_jit(self.core, self.ts)
        ts = self.ts
        directive, report, phase, data_step, segment_left, discarded, incumbent = jax.device_get(
            (directive, report, ts.phase, ts.data_step, ts.segment_left, ts.discarded, ts.incumbent)
        )
        self.phase, self.data_step, self.segment_left = int(phase), int(data_step), int(segment_left)
        self.recorder.discarded = int(discarded)
        if before == TRAIN and self.phase != TRAIN:
            self.source.hold(self.data_step)
            self.recorder.begin_round(self.step, self.phase)
        elif before == SWEEP:
            self.recorder.end_sweep(self.step)
        elif before == FORK and self.phase == FORK and bool(directive.restore):
            self.recorder.end_fork(self.step)
        elif before == FORK and self.phase == TRAIN:
            self.recorder.end_fork(self.step)
            kind = int(ts.plan.kind[int(report.index)])
            self.recorder.end_round(self.step, kind, report, int(directive.outcome), self.core.space.decode(incumbent))
            self.source.release(self.data_step)

    def settle(self) -> None:
        """If the run ends inside a round, goes back to the best state it has: the fork kept so far."""
        if self.phase != FORK:
            return
        is_kept, kept_step, saved_step = jax.device_get(
            (self.ts.round.kept >= 0, self.ts.slots.kept_step, self.ts.slots.saved_step)
        )
        if is_kept and kept_step >= saved_step:
            self.copies = self.copies._replace(state=_obey.copy_tree(self.copies.kept))


def _check_arguments(tuner: Any, steps: int | None, eval_every: int | None) -> int:
    if not isinstance(tuner, AutoTuneNet):
        raise TypeError(f"tuner must be an AutoTuneNet; got {type(tuner).__name__}.")
    for name, value in (("steps", steps), ("eval_every", eval_every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, or None; got {value!r}.")
    total = steps if steps is not None else tuner.total_steps
    if total is None:
        raise ValueError("an open-ended tuner has no total_steps; tell fit how long to train with steps=.")
    if tuner.total_steps is not None and total > tuner.total_steps:
        raise ValueError(
            f"steps={total} exceeds the tuner's total_steps={tuner.total_steps}, where its schedule ends. "
            "Give AutoTuneNet the larger total_steps."
        )
    return total


def fit(
    train_step: Callable[[Any, Any, dict[str, Array]], tuple[Any, Array]],
    state: Any,
    batches: Callable[[int, dict[str, Array]], Any] | Iterable[Any],
    *,
    tuner: AutoTuneNet,
    eval_step: Callable[[Any], Array] | None = None,
    key: PRNGKeyArray | None = None,
    steps: int | None = None,
    eval_every: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> FitResult:
    """Trains once, tuning as it goes.

    Forks of one round start from one state and see the same batches; the winner's state is kept, so only the losers'
    steps are spent. They count: exactly ``tuner.total_steps`` training steps are run in all.

    Example:
        >>> def train_step(w, batch, hp):
        ...     loss, grad = jax.value_and_grad(lambda w: jnp.mean((w - batch) ** 2))(w)
        ...     return w - hp["learning_rate"] * grad, loss
        >>> tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=100, initial={"learning_rate": 1e-4})
        >>> result = fit(train_step, jnp.ones(4), lambda step, hp: jnp.zeros(4), tuner=tuner, progress=False)
        >>> bool(jnp.max(jnp.abs(result.state)) < 0.1)
        True

    Args:
      train_step: Pure ``(state, batch, hp) -> (state, loss)``; compiled here, with the state donated. ``hp`` holds a
        scalar array per hyperparameter, in force at this step.
      state: Any pytree of arrays: parameters, optimizer state, model state, typed PRNG keys. It is copied: the
        caller's arrays stay alive.
      batches: ``callable(step, hp) -> batch``, or an iterable. A callable is asked again for the steps a fork replays;
        of an iterable the batches of one round are remembered. A list or data loader starts again when it ends.
      tuner: What may be tuned, and the budget.
      eval_step: Pure ``state -> validation metric``, in the direction of the tuner's ``mode``; compiled here. Forks are
        compared by it. Without it they are compared by their training losses, and slow hyperparameters stay put.
      key: Typed PRNG key of the tuner; ``jax.random.key(0)`` by default.
      steps: Training steps, at most ``tuner.total_steps``; needed for an open-ended tuner.
      eval_every: Steps between validations outside rounds; by default 20 in a run.
      progress: Whether to show a progress line.
      callbacks: Called with the newest `History.rounds` entry, a dict, at the end of each round.

    Returns:
      A `FitResult`. After a first Ctrl-C too, with what was reached by then.

    Raises:
      TypeError: ``train_step`` returns no pair, ``batches`` is of no known kind, or ``tuner`` is no `AutoTuneNet`.
      ValueError: The loss is not a real scalar, the state changes shape, a hyperparameter is never used, or there is
        no budget. All before the first step.

    Cost:
      Two more copies of ``state`` on the device. Outside rounds nothing waits for the device.
    """
    total = _check_arguments(tuner, steps, eval_every)
    key = jax.random.key(0) if key is None else key
    source = BatchSource(batches)
    first_hp = hyperparams_jit(tuner.core, tuner.init(key))
    used_by_batches = _Reads(first_hp)
    first_batch = source.get(0, used_by_batches)
    check_train_step(train_step, state, first_batch, first_hp, used_by_batches.names)
    interval = eval_every or max(total // _EVALS_PER_RUN, 1)

    shown = Progress(total, is_on=progress)
    recorder = Recorder(History(tuner.space.names), tuner.space, shown, callbacks)
    is_interrupted = False
    shown_at = 0.0
    with _Stop() as stop:
        try:
            run = _Run(train_step, state, source, tuner, eval_step=eval_step, key=key, recorder=recorder)
            run.evaluate(is_settled=True)

            def show() -> None:
                nonlocal shown_at
                now = time.monotonic()
                if shown.is_on and now - shown_at > _SHOW_EVERY_SECONDS:
                    shown_at = now
                    recorder.show(run.step)

            while run.step < total and not stop.is_requested:
                until_eval = interval - run.step % interval if run.phase == TRAIN else total
                run.train_stretch(min(until_eval, total - run.step), stop, on_step=show)
                if run.phase == TRAIN and run.step % interval == 0 and run.step < total:
                    run.evaluate(is_settled=True)
        except EndOfData:
            is_interrupted = True
            recorder.note(run.step, "data", "The batches ran out before the budget did.")
        finally:
            shown.close()
    run.settle()
    run.evaluate(is_settled=True)
    recorder.finish(run.step, int(run.ts.rollbacks))
    return FitResult(
        state=run.copies.state,
        history=recorder.history,
        hyperparams=tuner.space.to_python(tuner.space.decode(run.ts.incumbent)),
        tuner_state=run.ts,
        eval=run.last_eval,
        is_interrupted=is_interrupted or stop.is_requested,
    )


class _Reads(dict):
    """A dict of hyperparameters that remembers which ones were read."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)
