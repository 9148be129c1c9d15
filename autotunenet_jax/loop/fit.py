"""The host loop: feeds batches, obeys directives, keeps snapshots, writes the history."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, PRNGKeyArray

from ..arguments import whole_number
from ..checkpoint.store import Snapshots
from ..controller import AutoTuneNet, hyperparams_jit
from ..controller.roles import roles_of
from ..controller.state import TRAIN, TunerState
from ..history.explain import shown
from ..history.history import History, price
from ..session.batches import BatchSource, EndOfDataError
from ..session.callbacks import Callback, EarlyStopping, StopTraining
from ..session.metric_names import doubt
from ..session.notices import Notice, announce_compilation, of_slow
from ..session.progress import Progress
from ..session.recorder import Recorder
from ..session.signals import Stop
from .durable import Durable, durable
from .fork_executor import ForkExecutor
from .parallel_forks import check_parallel_forks
from .processes import Processes
from .run import Run
from .train_step_contract import check_eval_step, check_state, check_train_step, reads_its_state

_METRIC_OF_NOTHING = (
    "eval_step reads nothing of the state that it is given, so its metric is the same for all of them. Measure its "
    "argument, not a variable from outside, which stays as it was when eval_step was compiled."
)
_EVALS_PER_RUN = 20
_SHOW_EVERY_SECONDS = 0.25
# Most characters that a line of a result shown says of one thing.
_LINE = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """What `fit` returns.

    Attributes:
      state: The training state at the end of the run; with ``eval_step`` a whole run ends in the state of its best
        reading.
      history: What happened.
      hyperparams: Tuned values that training would go on with, as Python objects, before the decay; each way back has
        lowered the rates. What ``state`` was trained with is in ``history.schedule()``.
      tuner_state: The tuner's last state.
      eval: Validation metric of ``state``, or None without ``eval_step``.
      best_state: The training state with the best validation metric seen outside rounds, in host memory until asked
        for; ``state`` itself without ``eval_step``.
      best_eval: Its validation metric, or None.
      is_interrupted: Whether the run was cut short: by Ctrl-C, SIGTERM, or for want of batches.
      stop_reason: Why the run ended before its budget did, be it cut short or by a callback's wish; None where it
        did not.
    """

    state: Any
    history: History
    hyperparams: dict[str, Any]
    tuner_state: TunerState
    eval: float | None
    best_state: Any
    best_eval: float | None
    is_interrupted: bool
    stop_reason: str | None = None

    def __repr__(self) -> str:
        history, summary = self.history, self.history.summary
        leaves = jax.tree.leaves(self.state)
        size = sum(leaf.size for leaf in leaves)
        values = ", ".join(f"{name}={shown(value)}" for name, value in self.hyperparams.items())
        kinds = [event["kind"] for event in history.events]
        told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
        losses = [row["loss"] for row in history.kept()]
        how = "interrupted" if self.is_interrupted else "complete" if self.stop_reason is None else "stopped"
        lines = [
            f"FitResult({how} after {summary.get('steps', 0)} steps,",
            f"  hyperparams: {_short(values)}",
            f"  state: {len(leaves)} arrays, {size:,} numbers",
            f"  loss: {shown(losses[-1]) if losses else 'none recorded'}, the last of the steps kept",
            f"  eval: {shown(self.eval)}, best_eval: {shown(self.best_eval)}",
            f"  history: {len(history.rounds)} rounds, {price(summary)}, {summary.get('rollbacks', 0)} rollbacks",
            f"  events: {_short(told)}",
        ]
        if self.stop_reason is not None:
            lines.append(f"  stop_reason: {_short(self.stop_reason)}")
        return "\n".join(lines) + ")"


def _short(text: str) -> str:
    return text if len(text) <= _LINE else text[: _LINE - 3] + "..."


def _check_arguments(tuner: Any, steps: int | None, eval_every: int | None, resume: Any) -> int:
    if not isinstance(tuner, AutoTuneNet):
        raise TypeError(f"tuner must be an AutoTuneNet; got {type(tuner).__name__}.")
    if resume not in (True, False, "extend"):
        raise ValueError(f"resume must be True, False or 'extend'; got {resume!r}.")
    for name, value in (("steps", steps), ("eval_every", eval_every)):
        if value is not None:
            whole_number(name, value)
    total = tuner.total_steps if steps is None else int(steps)
    if total is None:
        raise ValueError("an open-ended tuner has no total_steps; tell fit how long to train with steps=.")
    if tuner.total_steps is not None and total > tuner.total_steps:
        raise ValueError(
            f"steps={total} exceeds the tuner's total_steps={tuner.total_steps}, where its schedule ends. "
            "Give AutoTuneNet the larger total_steps."
        )
    return total


def _check_companions(
    *, monitor: Any, eval_step: Any, resume: Any, snapshots: Any, key: Any, callbacks: Sequence[Any]
) -> None:
    """Arguments that mean something only beside another one, or are of another type than they look."""
    given = callbacks if isinstance(callbacks, Sequence) else ()
    if eval_step is None and any(isinstance(callback, EarlyStopping) for callback in given):
        raise ValueError("EarlyStopping goes by the validation metric, and there is none. Pass eval_step.")
    if monitor is not None and eval_step is None:
        raise ValueError(f"monitor={monitor!r} names an entry of what eval_step returns, and there is no eval_step.")
    if resume and snapshots is None:
        raise ValueError(f"resume={resume!r} goes on from snapshots, and none are kept. Give snapshots=, a folder.")
    if snapshots is not None and not isinstance(snapshots, str | os.PathLike | Snapshots):
        raise TypeError(f"snapshots must be a folder or a Snapshots; got {type(snapshots).__name__}.")
    if key is not None and not hasattr(key, "dtype"):
        raise TypeError(f"key must be a random key, such as jax.random.key(0); got {type(key).__name__}.")


def _check_together(
    at_once: int | str | ForkExecutor, tuner: AutoTuneNet, read: set[str], processes: Processes
) -> None:
    """Whether forks can share their batches, and a process."""
    if at_once == 1:
        return
    batch_size = roles_of(tuner.space).batch_size
    if read or batch_size is not None:
        names = sorted(read) or [batch_size and batch_size[0]]
        raise ValueError(
            "forks that run together are given the same batches, and here those depend on "
            f"{', '.join(map(str, names))}. Leave parallel_forks out, or take what batches depend on out of the "
            "search space."
        )
    if processes.is_several:
        raise ValueError(
            f"parallel_forks={at_once!r} is for one process, and this run spans several. Leave it out: there forks "
            "have all devices, one after the other."
        )


def fit(
    train_step: Callable[[Any, Any, dict[str, Array]], tuple[Any, ...]],
    state: Any,
    batches: Callable[[int, dict[str, Array]], Any] | Iterable[Any],
    *,
    tuner: AutoTuneNet,
    eval_step: Callable[[Any], Array | dict[str, Array]] | None = None,
    has_aux: bool = False,
    monitor: str | None = None,
    snapshots: str | os.PathLike[str] | Snapshots | None = None,
    resume: bool | Literal["extend"] = False,
    key: PRNGKeyArray | None = None,
    steps: int | None = None,
    eval_every: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback | Callable[[dict[str, Any]], None]] = (),
    loggers: Sequence[Any] = (),
    log_every: int = 50,
    parallel_forks: int | Literal["auto"] | ForkExecutor | None = None,
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
        scalar array per hyperparameter, in force at this step; of a choice of anything but numbers it is the position
        of the option, for ``jax.lax.switch``, here and in ``batches``.
      state: Any pytree of arrays: parameters, optimizer state, model state, typed PRNG keys. It is copied: the
        caller's arrays stay alive.
      batches: ``callable(step, hp) -> batch``, or an iterable. A callable is asked again for the steps a fork replays;
        of an iterable the batches of one round are remembered. A list or data loader starts again when it ends.
        Batches are arrays of NumPy or JAX, in any containers.
      tuner: What may be tuned, and the budget.
      eval_step: Pure ``state -> validation metric``, in the direction of the tuner's ``mode``; compiled here. Forks are
        compared by it. Without it they are compared by their training losses, and slow hyperparameters stay put. It may
        return a dict of metrics, one of which ``monitor`` names.
      has_aux: Whether ``train_step`` returns ``(state, loss, metrics)`` or ``(state, (loss, metrics))``: a dict of real
        scalars, for callbacks, loggers and the history.
      monitor: Entry of ``eval_step``'s dict to tune by; by default the only one, or ``"loss"`` where it is minimised.
      snapshots: Folder of durable snapshots, or a `Snapshots` of your own; None for none. They are written in the
        background at a cadence that blocks at most one per cent of the run, when the run ends, and when it is
        interrupted. Beside them lies ``history.json``, for ``python -m autotunenet_jax``.
      resume: Whether to go on from the latest good snapshot in ``snapshots``, if there is one, instead of from
        ``state``. On the same machine and software the run then ends bit for bit as if it had never stopped.
        ``batches`` must give the same batches again; an iterable is read up to where the run stood. ``"extend"``
        goes on to the tuner's ``total_steps`` where the snapshots are of a shorter or longer run: rounds that were held
        stay held, the others and the decay follow the new budget.
      key: Typed PRNG key of the tuner; ``jax.random.key(0)`` by default.
      steps: Training steps, at most ``tuner.total_steps``; needed for an open-ended tuner.
      eval_every: Steps between validations outside rounds; by default 20 in ``tuner.total_steps``.
      progress: Whether to show a progress line; where nobody looks at a terminal it is a line of text every 10 s.
      callbacks: Each a `Callback`, or a function that is called with the newest `History.rounds` entry, a dict, at the
        end of each round.
      loggers: Where the numbers go while the run goes on: `CSVLogger`, `JSONLLogger`, TensorBoard's ``SummaryWriter``,
        a W&B run, ``mlflow``, anything else with ``log(row, step)``, or a function ``(row, step)``.
      log_every: Steps between two rows of the loggers, which hold means over the kept steps since the last one.
      parallel_forks: How many forks of a round run together, 1 to 8: beside the one that is asked for its neighbours
        on both sides, one of which is likely to be next. ``"auto"`` takes three, or what devices and memory allow; a
        ``Population`` of ``autotunenet_ray`` has them trained by actors, on several machines if need be.
        None, as 1, runs one after the other. Decisions are those of forks that run one after the other, up to rounding;
        what was trained and never asked for is not part of the budget: ``summary["unused_steps"]`` of the history.

    Returns:
      A `FitResult`. After a first Ctrl-C or SIGTERM too, with what was reached by then, and where a callback raised
        `StopTraining`, in the best state.

    Raises:
      TypeError: ``train_step`` returns no pair, ``state`` or a batch holds anything but arrays, ``batches``, a callback
        or a logger is of no known kind, or ``tuner`` is no `AutoTuneNet`.
      ValueError: The loss or a metric is not a real scalar, ``monitor`` is no metric's name, the state changes shape, a
        hyperparameter is never used, there is no budget, or, with ``resume``, the snapshots are of a tuner made
        otherwise (see `AutoTuneNet.check`). All before the first step.
      SnapshotMismatchError: With ``resume``, the snapshots are of another model or search space.

    Cost:
      Two more copies of ``state`` on the device, a third during a step and, with ``eval_step`` or at the very end, one
      in host memory. Outside rounds nothing waits for the device but validation, durable snapshots and, every
      ``log_every`` steps, the numbers for callbacks and loggers.
    """
    total = _check_arguments(tuner, steps, eval_every, resume)
    _check_companions(
        monitor=monitor, eval_step=eval_step, resume=resume, snapshots=snapshots, key=key, callbacks=callbacks
    )
    key = jax.random.key(0) if key is None else key
    source = BatchSource(batches)
    check_state(state)
    at_once = check_parallel_forks(parallel_forks)
    first_batch, read = _tried(train_step, state, source, hyperparams_jit(tuner.core, tuner.init(key)), has_aux)
    metric = None if eval_step is None else check_eval_step(eval_step, state, monitor=monitor, mode=tuner.mode)
    interval = eval_every or max((tuner.total_steps or total) // _EVALS_PER_RUN, 1)
    processes = Processes.of(state, first_batch)
    _check_together(at_once, tuner, read, processes)
    bar, stop = Progress(total, is_on=progress and processes.is_first), Stop()
    recorder = Recorder(History(tuner.space.names), tuner.space, bar, callbacks, loggers=loggers, log_every=log_every)

    with contextlib.ExitStack() as opened:
        store = opened.enter_context(durable(snapshots, tuner, processes))
        announce_compilation(tuner.core)
        opened.callback(bar.close)
        bar.open()
        with stop, stop.shielded():
            run = Run(
                train_step,
                state,
                source,
                tuner,
                has_aux=has_aux,
                eval_step=eval_step,
                monitor=metric,
                key=key,
                recorder=recorder,
                stop=stop,
                parallel_forks=at_once,
            )
            if resume:
                store.resume(run, extend=resume == "extend")
            _forewarn(run, tuner, metric, eval_step=eval_step, state=state)
            ending = _trained(run, total, interval, stop, bar, store, processes)
    return _ended(run, total, ending, stop, store, processes)


def _tried(
    train_step: Callable[..., Any], state: Any, source: BatchSource, hp: dict[str, Any], has_aux: bool
) -> tuple[Any, set[str]]:
    """The first batch, on which the step has been checked, and the hyperparameters that batches depend on."""
    reads = _Reads(hp)
    batch = source.get(0, reads)
    check_train_step(train_step, state, batch, hp, used_elsewhere=reads.names, has_aux=has_aux)
    return batch, reads.names


def _forewarn(run: Run, tuner: AutoTuneNet, metric: str | None, *, eval_step: Any, state: Any) -> None:
    """Says before training what could be said when its harm is done."""
    if eval_step is None:
        run.notices.tell(run.controller.step, of_slow(tuner.space, "Pass eval_step"))
    elif not reads_its_state(eval_step, state):
        run.notices.tell(run.controller.step, [Notice("metric of nothing", _METRIC_OF_NOTHING)])
    if metric is not None and (message := doubt(metric, tuner.mode)):
        run.notices.tell(run.controller.step, [Notice("direction", message)])


class _Ending(NamedTuple):
    """Why a run ended.

    Attributes:
      reason: In words; empty at the end of the budget.
      kind: Of the event in the history.
      is_cut_short: Whether the run might go on from here, rather than being brought to its end.
    """

    reason: str = ""
    kind: str = "stop"
    is_cut_short: bool = False


def _trained(
    run: Run, total: int, interval: int, stop: Stop, bar: Progress, store: Durable, processes: Processes
) -> _Ending:
    """Trains to the end of the budget, of the data, or until asked to stop; says which it was."""
    is_agreed, ending = False, _Ending()
    try:
        _train(run, total, interval, stop, bar, store, processes)
        is_agreed = True
    except EndOfDataError:
        ending = _Ending("The batches ran out before the budget did.", "data", is_cut_short=True)
        is_agreed = True
    except StopTraining as asked:
        ending = _Ending(str(asked) or "a callback asked for it", "stop", is_cut_short=False)
        is_agreed = True
    finally:
        # Whatever ended the loop, what was learned is kept; an exception goes on to the caller.
        store.save_last(run, stop, is_agreed=is_agreed)
    return ending


def _ended(run: Run, total: int, ending: _Ending, stop: Stop, store: Durable, processes: Processes) -> FitResult:
    """Brings the run to its end, says why where that is early, and gives its result."""
    step = run.controller.step
    is_told = bool(ending.reason) and (step < total or ending.is_cut_short)
    # Several processes end as they agreed to, whatever this one has been asked since.
    has_stopped = processes.has_stopped if processes.is_several else stop.is_requested
    if not ending.reason and has_stopped:
        is_told = step < total
        message = f"Stopped by {stop.name or 'another process'}: the run ends early, after {step} of {total} steps."
        ending = _Ending(message, "stop", is_cut_short=True)
    if is_told:
        message = ending.reason
        if not ending.is_cut_short:
            message = f"Stopped after {step} of {total} steps: {ending.reason}."
        level = logging.WARNING if ending.is_cut_short else logging.INFO
        run.recorder.note(step, ending.kind, message, level=level)
    run.end(is_whole=not ending.is_cut_short)
    ts = run.controller.state
    run.recorder.finish(step, int(ts.rollbacks) + run.session.mended, total=int(ts.plan.total) or total)
    if run.parallel_forks.is_on:
        run.parallel_forks.release()
        run.recorder.history.summary["unused_steps"] = run.parallel_forks.unused_steps
    store.write_history(run)
    run.recorder.end()
    return _result(run, is_interrupted=ending.is_cut_short, reason=ending.reason if is_told else None)


def _result(run: Run, *, is_interrupted: bool, reason: str | None) -> FitResult:
    session, ts, space = run.session, run.controller.state, run.controller.tuner.space
    return FitResult(
        state=run.host.state,
        history=run.recorder.history,
        hyperparams=space.to_python(space.decode(ts.incumbent)),
        tuner_state=ts,
        eval=session.last_eval,
        best_state=run.host.state if session.best is None else session.best.to_device(),
        best_eval=session.best_eval,
        is_interrupted=is_interrupted,
        stop_reason=reason,
    )


def _train(
    run: Run, total: int, interval: int, stop: Stop, bar: Progress, store: Durable, processes: Processes
) -> None:
    """Some steps after others, until the budget is spent or somebody asks to stop."""
    shown_at = 0.0

    def show() -> None:
        nonlocal shown_at
        now = time.monotonic()
        if bar.is_on and now - shown_at > _SHOW_EVERY_SECONDS:
            shown_at = now
            run.recorder.show(run.controller.step)

    def is_stopped() -> bool:
        return stop.is_requested and not processes.is_several

    controller, session = run.controller, run.session
    began_at = controller.step
    while True:
        # First, so that a run resumed from anywhere does what had still to be done there.
        run.complete()
        is_regular = controller.phase == TRAIN and controller.step % interval == 0
        if controller.step == 0 or (is_regular and controller.step < total):
            session.evaluate()
        run.tell()
        run.deliver()
        is_due = controller.step > began_at and store.is_due()
        agreed = processes.agree(controller.step, is_due=is_due, is_asked=stop.is_requested)
        if agreed.saves:
            store.save(run)
        if controller.step >= total or agreed.stops:
            shown_at = 0.0
            return show()
        until_eval = interval - controller.step % interval if controller.phase == TRAIN else total
        steps = min(until_eval, total - controller.step, processes.steps_apart)
        run.train_some(steps, is_stopped, on_step=show)


class _Reads(dict[str, Any]):
    """A dict of hyperparameters that remembers which ones were read."""

    # They ask for each value by its name.
    get: Any = Mapping.get
    items: Any = Mapping.items
    values: Any = Mapping.values

    def __init__(self, given: dict[str, Any]):
        super().__init__(given)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        # That there is one makes ``dict(hp)`` and ``**hp`` ask for each value, too.
        return super().__iter__()


def _flatten_reads(reads: _Reads) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    names = tuple(sorted(reads))
    return tuple(reads[name] for name in names), names


def _unflatten_reads(names: tuple[str, ...], leaves: Any) -> Any:
    return dict(zip(names, leaves, strict=True))


jax.tree_util.register_pytree_node(_Reads, _flatten_reads, _unflatten_reads)
