"""The host loop: feeds batches, obeys directives, keeps snapshots, writes the history."""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray

from ..checkpoint.store import Snapshots
from ..controller import AutoTuneNet, hyperparams_jit
from ..controller.state import TRAIN, TunerState
from ..history.history import History
from ..session.batches import BatchSource, EndOfDataError
from ..session.recorder import Recorder
from ..session.signals import Stop
from .checks import check_eval_step, check_train_step
from .progress import Progress
from .run import Run

_EVALS_PER_RUN = 20
_SHOW_EVERY_SECONDS = 0.25

# A snapshot that is due waits for at most so many steps; until then nothing but the clock is looked at.
_STEPS_PER_STRETCH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """What `fit` returns.

    Attributes:
      state: The training state at the end of the run; with ``eval_step`` a whole run ends in the state of its best
        reading since the last round.
      history: What happened.
      hyperparams: Tuned values at the end, as Python objects, before the decay.
      tuner_state: The tuner's last state.
      eval: Validation metric of ``state``, or None without ``eval_step``.
      best_state: The training state with the best validation metric seen outside rounds, in host memory until asked
        for; ``state`` itself without ``eval_step``.
      best_eval: Its validation metric, or None.
      is_interrupted: Whether the run ended early: by Ctrl-C, SIGTERM, or for want of batches.
    """

    state: Any
    history: History
    hyperparams: dict[str, Any]
    tuner_state: TunerState
    eval: float | None
    best_state: Any
    best_eval: float | None
    is_interrupted: bool


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
    snapshots: str | os.PathLike[str] | Snapshots | None = None,
    resume: bool = False,
    key: PRNGKeyArray | None = None,
    steps: int | None = None,
    eval_every: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> FitResult:
    """Trains once, tuning as it goes.

    Forks of one round start from one state and see the same batches. The winner's state is kept, and the losers' steps
    are spent, as are those of the range test. They count: exactly ``tuner.total_steps`` training steps are run in all.

    A step whose loss is not finite, or that leaves more numbers in the state that are not, is skipped: the state stays
    as it was, counters and random keys included, and training goes on with the next batch.

    Example:
        >>> import jax.numpy as jnp
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
      snapshots: Folder of durable snapshots, or a `Snapshots` of your own; None for none. They are written in the
        background at a cadence that blocks at most one per cent of the run, when the run ends, and when it is
        interrupted.
      resume: Whether to go on from the latest good snapshot in ``snapshots``, if there is one, instead of from
        ``state``. On the same machine and software the run then ends bit for bit as if it had never stopped.
        ``batches`` must give the same batches again; an iterable is read up to where the run stood.
      key: Typed PRNG key of the tuner; ``jax.random.key(0)`` by default.
      steps: Training steps, at most ``tuner.total_steps``; needed for an open-ended tuner.
      eval_every: Steps between validations outside rounds; by default 20 in a run.
      progress: Whether to show a progress line.
      callbacks: Called with the newest `History.rounds` entry, a dict, at the end of each round.

    Returns:
      A `FitResult`. After a first Ctrl-C or SIGTERM too, with what was reached by then.

    Raises:
      TypeError: ``train_step`` returns no pair, ``batches`` is of no known kind, or ``tuner`` is no `AutoTuneNet`.
      ValueError: The loss or the validation metric is not a real scalar, the state changes shape, a hyperparameter is
        never used, there is no budget, or, with ``resume``, the snapshots are of a tuner made otherwise (see
        `AutoTuneNet.check`). All before the first step.
      SnapshotMismatchError: With ``resume``, the snapshots are of another model or search space.

    Cost:
      Two more copies of ``state`` on the device, a third during a step and, with ``eval_step``, one in host memory.
      Outside rounds nothing waits for the device but validation and durable snapshots.
    """
    total = _check_arguments(tuner, steps, eval_every)
    key = jax.random.key(0) if key is None else key
    source = BatchSource(batches)
    first_hp = hyperparams_jit(tuner.core, tuner.init(key))
    used_by_batches = _Reads(first_hp)
    first_batch = source.get(0, used_by_batches)
    check_train_step(train_step, state, first_batch, first_hp, used_by_batches.names)
    if eval_step is not None:
        check_eval_step(eval_step, state)
    interval = eval_every or max(total // _EVALS_PER_RUN, 1)

    if eval_step is None:
        _warn_of_slow(tuner)
    opened: Snapshots | None = None
    if snapshots is not None and not isinstance(snapshots, Snapshots):
        opened = snapshots = Snapshots(snapshots, mode=tuner.mode, space=tuner.space)
    store = snapshots
    shown = Progress(total, is_on=progress)
    recorder = Recorder(History(tuner.space.names), tuner.space, shown, callbacks)
    is_interrupted = False
    try:
        with Stop() as stop:
            run = Run(train_step, state, source, tuner, eval_step=eval_step, key=key, recorder=recorder)
            if store is not None and resume and store.latest() is not None:
                _, tree = store.restore(run.snapshot())
                run.resume(tree)
            try:
                _train(run, total, interval, stop, shown, store)
            except EndOfDataError:
                is_interrupted = True
                recorder.note(run.controller.step, "data", "The batches ran out before the budget did.")
            finally:
                # Whatever ended the loop, what was learned is kept; an exception goes on to the caller.
                if store is not None and run.is_alive():
                    _save(run, store, wait=True)
    finally:
        shown.close()
        if opened is not None:
            opened.close()
    run.end()
    return _result(run, is_interrupted=is_interrupted or stop.is_requested)


def _result(run: Run, *, is_interrupted: bool) -> FitResult:
    session, ts, space = run.session, run.controller.state, run.controller.tuner.space
    run.recorder.finish(run.controller.step, int(ts.rollbacks))
    return FitResult(
        state=run.host.state,
        history=run.recorder.history,
        hyperparams=space.to_python(space.decode(ts.incumbent)),
        tuner_state=ts,
        eval=session.last_eval,
        best_state=run.host.state if session.best is None else session.best.to_device(),
        best_eval=session.best_eval,
        is_interrupted=is_interrupted,
    )


def _warn_of_slow(tuner: AutoTuneNet) -> None:
    slow = [name for name, role in zip(tuner.space.names, tuner.space.roles, strict=True) if role == "slow"]
    if slow:
        warnings.warn(
            f"{', '.join(slow)} can be ranked on validation data only, and there is no eval_step: the values in force "
            "stay as they start. Pass eval_step, or leave them out of the search space.",
            stacklevel=3,
        )


def _train(run: Run, total: int, interval: int, stop: Stop, shown: Progress, store: Snapshots | None) -> None:
    """Stretch after stretch, until the budget is spent or somebody asks to stop."""
    shown_at = 0.0

    def show() -> None:
        nonlocal shown_at
        now = time.monotonic()
        if shown.is_on and now - shown_at > _SHOW_EVERY_SECONDS:
            shown_at = now
            run.recorder.show(run.controller.step)

    controller, session = run.controller, run.session
    if controller.step == 0:
        session.evaluate()
    while controller.step < total and not stop.is_requested:
        until_eval = interval - controller.step % interval if controller.phase == TRAIN else total
        run.train_stretch(min(until_eval, total - controller.step, _STEPS_PER_STRETCH), stop, on_step=show)
        if controller.phase == TRAIN and controller.step % interval == 0 and controller.step < total:
            session.evaluate()
        if store is not None and store.is_due():
            _save(run, store)


def _save(run: Run, store: Snapshots, *, wait: bool = False) -> None:
    store.save(run.controller.step, run.snapshot(), metric=run.session.last_eval, wait=wait)


class _Reads(dict):
    """A dict of hyperparameters that remembers which ones were read."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        self.names.update(self.keys())
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        self.names.update(self.keys())
        return super().items()

    def values(self) -> Any:
        self.names.update(self.keys())
        return super().values()


def _flatten_reads(reads: _Reads) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    names = tuple(sorted(reads))
    return tuple(reads[name] for name in names), names


def _unflatten_reads(names: tuple[str, ...], leaves: Any) -> Any:
    return dict(zip(names, leaves, strict=True))


jax.tree_util.register_pytree_node(_Reads, _flatten_reads, _unflatten_reads)
