"""AutoTuneNet for a training loop that the user owns."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from . import arguments, distributed, engine, lr_schedulers, optimizer_state, schedule_end, sharding
from .step_guard import StepGuard
from .targets import RateTarget, find_all
from .training_state import TrainingState

if TYPE_CHECKING:
    import autotunenet_jax as atn
    from autotunenet_jax.hosting import Report

    from .data import ReplayBuffer
    from .sound_session import SoundSession

# Whose hooks an optimizer has: those of the tuner that was attached to it last.
_ATTACHED: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[AutoTuneNet]] = weakref.WeakKeyDictionary()


class AutoTuneNet:
    """Tunes hyperparameters of a PyTorch training while it runs.

    Attach it to a model and its optimizer, tell it the loss once per optimizer step, and it does the rest: it forks
    the training, tries settings, puts the best state back, guards against divergence, and sets the hyperparameters for
    the next step. `Trainer` is a loop that does this for you, with forks that see the same batches.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        >>> tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=100)
        >>> tuner.attach(model, optimizer)
        >>> for _ in range(100):
        ...     loss = (model(torch.ones(8, 4)) - 1.0).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     tuner.step(loss)
        >>> bool(loss < 0.1)
        True

    Args:
      param_space: What may be tuned, a mapping or `autotunenet_jax.SearchSpace`. Known names: ``learning_rate`` (or
        ``lr``), ``weight_decay``, ``momentum``, ``beta1``, ``beta2``, ``eps`` and other numbers of the optimizer's
        groups, for all groups or as ``"group_name/learning_rate"``; ``dropout`` for all dropout modules or as
        ``"module.path/dropout"``; any other number that a module keeps, as ``"module.path/attribute"``;
        ``label_smoothing`` of the loss; ``batch_size``; and the names in ``targets``. Groups keep the proportions of
        their rates and weight decays.
      total_steps: Optimizer steps of the whole run, forks included; may be given to `attach` instead. None for an
        open-ended run.
      initial: Values to start from. Others start where the optimizer and the model have them, if inside their range.
      mode: Whether the validation metric is minimised (``"min"``) or maximised (``"max"``). The loss always is
        minimised.
      guard: Thresholds of the watch over training.
      max_share: Most of the budget that discarded steps may take, in (0, 1); by default as in
        `autotunenet_jax.AutoTuneNet`.
      decay: Shape of the rate over the budget: ``"hold"`` (held for 60 % of it, then linear to zero), ``"linear"`` or
        ``"cosine"`` to zero, ``"none"``, or a function from the share of the budget that is spent to a factor. By
        default hold, and none beside a scheduler of the user's own.
      warmup_steps: Steps over which the rates rise to their value at the beginning of training. Forks skip them.
      targets: Setters ``(model, value) -> None`` for hyperparameters of your own, by name.
      seed: Of the tuner's random choices.
      snapshot_device: Where the two copies of the training state live that forks and rollbacks need, such as
        ``"cpu"``; None for where the training is.
      options: Further arguments of `autotunenet_jax.AutoTuneNet`.

    Raises:
      TypeError: An argument of the wrong type.
      ValueError: A bad space or value; see `autotunenet_jax.AutoTuneNet`.
    """

    def __init__(
        self,
        param_space: Any,
        total_steps: int | None = None,
        *,
        initial: Mapping[str, Any] | None = None,
        mode: Literal["min", "max"] = "min",
        guard: atn.Guard | None = None,
        max_share: float | None = None,
        decay: Any = None,
        warmup_steps: int = 0,
        targets: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        seed: int = 0,
        snapshot_device: Any = None,
        **options: Any,
    ):
        self._options = {
            "mode": mode,
            "guard": guard,
            "max_share": max_share,
            "decay": decay,
            "warmup_steps": warmup_steps,
            **options,
        }
        engine.check_process()
        self.space = engine.atn.SearchSpace(param_space)
        self.mode: Literal["min", "max"] = mode
        self.total_steps = self._planned_steps = total_steps
        if targets is not None and not isinstance(targets, Mapping):
            raise TypeError(f"targets must map names to functions (model, value) -> None; got {targets!r}.")
        arguments.check_device(snapshot_device)
        engine.hosting.whole_number("seed", seed, least=0)
        self._setters = dict(targets or {})
        for name, setter in self._setters.items():
            if name not in self.space:
                raise ValueError(
                    f"targets names {name!r}, which is not in param_space; it has {', '.join(self.space.names)}."
                )
            if not callable(setter) and not hasattr(setter, "write"):
                raise TypeError(f"targets[{name!r}] must be a function (model, value) -> None; got {setter!r}.")
        self._seed, self._snapshot_device = seed, snapshot_device
        # Every argument is checked now, not at attach. The core has an order of its own for the names.
        core = self._core(total_steps, initial, has_scheduler=False)
        self.space, self._initial = core.space, core.initial
        self._session: SoundSession | None = None
        self._is_over = self._is_replaced = False
        # What `Trainer` adds: batches that can be asked for again, and whether the best state is kept.
        self._stream: ReplayBuffer | None = None
        self._keeps_best = False
        # Where the adapters of frameworks send what a user should know.
        self._through: Callable[[str], None] | None = None
        self._how: str | None = None
        self._log: logging.Logger | None = None

    def __repr__(self) -> str:
        return f"AutoTuneNet({self.space!r}, total_steps={self.total_steps}, mode={self.mode!r})"

    def _core(
        self, total_steps: int | None, initial: Mapping[str, Any] | None, *, has_scheduler: bool
    ) -> atn.AutoTuneNet:
        options = dict(self._options)
        # Two decays would multiply: a scheduler of the user's own does the shaping.
        if has_scheduler and options.get("schedule") is not None:
            raise ValueError("a scheduler and schedule= both shape the rates: give one of them.")
        options["decay"] = options["decay"] or ("none" if has_scheduler else "hold")
        return engine.atn.AutoTuneNet(self.space, total_steps, initial=initial, **options)

    # Attaching.

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        scaler: Any = None,
        *,
        total_steps: int | None = None,
        loss_fn: Any = None,
        loader: Any = None,
        validate: Callable[[], Any] | None = None,
        aux: Sequence[Any] = (),
        targets: Mapping[str, Any] | None = None,
        callbacks: Sequence[atn.Callback | Callable[[dict[str, Any]], None]] = (),
        loggers: Sequence[Any] = (),
        log_every: int = 50,
        progress: atn.Progress | None = None,
    ) -> None:
        """Begins a run: finds what is to be tuned, sets the first values, and copies the training state.

        Args:
          model: The model; lazy parameters initialised.
          optimizer: Its optimizer. A step with gradients that are not finite is passed over: no parameter and no
            moment is touched, and the tuner learns of it.
          scheduler: A scheduler of ``torch.optim.lr_scheduler``, or several. It keeps its shape, and the tuner moves
            its height; step it as usual. Forks of a round all start from its place at the round's beginning, and while
            it is still warming up they train at the rate that they claim; after the round it is stepped on to the
            budget spent. OneCycleLR is refused.
          scaler: The ``GradScaler``, if any.
          total_steps: Optimizer steps of the whole run, in place of the constructor's.
          loss_fn: The loss module, when its ``label_smoothing`` is tuned.
          loader: The training data loader, when its ``batch_size`` is tuned.
          validate: Called without arguments whenever the tuner wants the validation metric of the present state. Every
            module ends in the mode it was in. Without it, watch `wants_validation` and call `validate`.
          aux: Whatever else changes with the training and lies outside the model, such as an average of the weights
            (``torch.optim.swa_utils.AveragedModel``): objects with ``state_dict`` and ``load_state_dict``, which go
            back with losing forks and rollbacks.
          targets: Further setters, besides the constructor's.
          callbacks: Each an `autotunenet_jax.Callback`, or a function called with the record of each round as it ends.
            `autotunenet_jax.StopTraining` comes out of `step` or `validate`: leave the loop then, and call `finish`.
          loggers: Where the numbers go while the run goes on; see `autotunenet_jax.fit`.
          log_every: Steps between two rows of the loggers.
          progress: An `autotunenet_jax.Progress` to report on.

        Raises:
          TypeError: Something is not what it should be.
          ValueError: A name of the space is not found (the message lists what is), or has values that PyTorch does not
            take; two names set the same number; the scheduler cannot be tuned, or the optimizer has one that was not
            handed over; the model has no parameters, uninitialised ones, or others than the optimizer.

        Cost:
          Two copies of the training state. The controller is compiled on first use, once per search space.
        """
        engine.check_process()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        optimizer = arguments.bare_optimizer(optimizer)
        schedulers = lr_schedulers.as_list(scheduler)
        sharding.check(model)
        total_steps = self.total_steps if total_steps is None else total_steps
        scaler = arguments.live_scaler(scaler)
        state = TrainingState(
            model, optimizer, schedulers=schedulers, scaler=scaler, aux=aux, device=self._snapshot_device
        )
        arguments.check_belongs(model, optimizer)
        setters = {**(targets or {}), **self._setters}
        found = find_all(self.space, model, optimizer, schedulers, setters=setters, loss_fn=loss_fn, loader=loader)
        arguments.check_schedulers(optimizer, list(lr_schedulers.everything(schedulers)))
        self._release()
        if optimizer in _ATTACHED and (former := _ATTACHED[optimizer]()) is not None:
            former._release()
            former._is_replaced = former is not self
        _ATTACHED[optimizer] = weakref.ref(self)
        stream, keeps_best = self._stream, self._keeps_best
        self._host = engine.host.TorchHost(
            state, found, steps=total_steps, validate=validate, stream=stream, keeps_best=keeps_best
        )
        starts, outside = self._host.starts(self._initial, self.space)
        core = self._core(total_steps, starts, has_scheduler=bool(schedulers))
        self.total_steps = core.total_steps
        distributed.check_alike(f"{core!r} {sorted(core.initial.items())}", total_steps=core.total_steps)
        shown = progress or engine.atn.Progress(core.total_steps or 1, is_on=False)
        recorder = self._recorder(shown, callbacks, loggers=loggers, log_every=log_every)
        if schedulers:
            recorder.history.mark_scheduled(name for name, target in found.items() if isinstance(target, RateTarget))
        engine.hosting.announce_compilation(core.core)
        self._is_over = self._is_replaced = False
        self._session = engine.sound_session.SoundSession(
            self._host, engine.hosting.PackedController(core, seed=self._seed), recorder
        )
        self._calls = 0
        self._guard = StepGuard(state.optimizers, watch=self._begin_step, is_sharded=self._host.is_sharded)
        self._leave_joins = distributed.follow_joins(model, self._follow)
        self._notices = engine.notices.Notices(self._session, outside=outside, through=self._through, how=self._how)
        if core.total_steps is not None and self._options["decay"] is None:
            self._look_at_end(schedulers, core.total_steps)
        self._measure_start(state, optimizer)

    def _recorder(self, shown: atn.Progress, callbacks: Sequence[Any], **options: Any) -> Any:
        if self._log is not None:
            options["log"] = self._log
        history = engine.atn.History(self.space.names, is_paired=self._stream is not None)
        return engine.hosting.Recorder(history, self.space, shown, callbacks, **options)

    def _measure_start(self, state: TrainingState, optimizer: torch.optim.Optimizer) -> None:
        """The metric of the state that the run begins from."""
        session = self._attached()
        # Turning an optimizer's mode rounds: of a run that is resumed, and so measured once more, nothing may change.
        before = state.copy_out() if optimizer_state.has_modes(optimizer) else None
        is_measured = session.evaluate()
        if before is not None:
            state.copy_back(before)
        if is_measured:
            session.write()

    def _look_at_end(self, schedulers: Sequence[Any], steps: int) -> None:
        """Says where schedulers of the user's own keep a tuned rate high to the end."""
        is_tuned = any(isinstance(target, RateTarget) for target in self._host.targets.values())
        share = schedule_end.share_left(schedulers, steps) if is_tuned and schedulers else None
        if share is not None:
            self._notices.tell("scheduler", schedule_end.NOTICE.format(share=share))

    # Training.

    def step(self, loss: Any) -> None:
        """Takes in the loss of the optimizer step just done, and puts in force what the next one needs.

        Call it once per optimizer step, after ``optimizer.step()`` and ``scaler.update()``; before or after
        ``scheduler.step()``, but always on the same side of it. On several processes each gives its own loss.

        Args:
          loss: Scalar tensor or number. One that is not finite says that the step did not happen: it counts for
            nothing, and what it left behind is put back.

        Raises:
          RuntimeError: `attach` was not called, `finish` was before the end of the budget, or another tuner was
            attached to the optimizer since.
          TypeError: Not a scalar.

        Cost:
          Outside rounds some 0.05 ms on the host, the look at the gradients included; more at decisions, a few dozen in
          a run. Reading a loss on a GPU waits for it.
        """
        self._check_goes_on()
        report = self._report(distributed.to_float(loss, name="loss"))
        self._notices.of_steps(self._calls, self._guard.asked)
        self._notices.after(report)
        self._attached().recorder.deliver()

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._host.state.begin_step(optimizer)
        self._notices.of_calls(self._calls, self._guard.asked)

    def _follow(self) -> None:
        """Decides as the other processes do in a step for which this one has no data."""
        self._host.is_absent = True
        try:
            self._notices.after(self._report(0.0))
        finally:
            self._host.is_absent = False

    def _report(self, own: float) -> Report:
        session, is_absent = self._attached(), self._host.is_absent
        self._calls += not is_absent
        self._notices.before(self._host)
        told = distributed.mean(math.nan if self._guard.was_skipped() else own, counts=not is_absent)
        report = session.report(told, recorded=told if is_absent else own)
        if session.is_settled:
            self._guard.release()
        return report

    def _release(self) -> None:
        """Takes off what an earlier run has put around its optimizer."""
        if self._session is not None:
            self._host.warm_up.release()
            self._guard.release()
            self._leave_joins()

    def _check_goes_on(self) -> None:
        """Whether the run is this tuner's to move, and not over."""
        session = self._attached()
        if self._is_replaced:
            raise RuntimeError(
                "another tuner was attached to this optimizer since, and two would undo each other's steps. Call the "
                "step of that one, or attach one tuner with all that is to be tuned in its param_space."
            )
        at, total = session.controller.step, session.controller.tuner.total_steps
        if self._is_over and (total is None or at < total):
            raise RuntimeError(
                f"the run was ended by finish after {at} steps, and its copies are let go of. To tune what comes now "
                "attach the tuner again."
            )

    def _attached(self) -> SoundSession:
        if self._session is None:
            raise RuntimeError(
                "the tuner is not attached: call attach(model, optimizer, ...) before training. A copied or "
                "pickled tuner is not; what it did is kept by history.to_json and state_dict()."
            )
        return self._session

    # Validation.

    @property
    def in_round(self) -> bool:
        """Whether this is a range test or a fork, whose steps may be undone; see `validate`."""
        return self._attached().controller.phase != engine.hosting.TRAIN

    @property
    def wants_validation(self) -> bool:
        """Whether the tuner would like `validate` to be called with the metric of the present state, before `step`."""
        return self._attached().wants_eval

    def validate(self, value: Any) -> None:
        """Takes in a validation metric of the present state, in the direction of ``mode``.

        Report it whenever you have one. Forks are compared by those that `wants_validation` asked for; the others show
        whether training still generalises. Where it does not, the rates cool down, and if that does not help training
        goes back to the best state, after the last step too. On several processes each gives its own value; their mean
        counts.

        A metric of a range test or a fork (`in_round`) says nothing of the training: for an early stopping, or a best
        model, of your own look at the others alone.

        Args:
          value: Scalar tensor or number.
        """
        session = self._attached()
        session.observe(distributed.mean(distributed.to_float(value, name="the metric, value,")))
        if session.is_settled:
            session.end_at_best()
        else:
            # Rates are lowered at once when training has stopped generalising.
            session.write()
        session.recorder.deliver()

    def _note_metric(self, value: Any) -> None:
        """Records another metric of the present state, which is not compared with the first."""
        session = self._attached()
        metric = distributed.mean(distributed.to_float(value, name="the metric"))
        is_settled = session.controller.phase == engine.hosting.TRAIN
        session.recorder.add_eval(session.controller.step, metric, is_settled=is_settled)

    def _tell(self, kind: str, message: str) -> None:
        """Tells once a run what the callback of a framework has seen."""
        self._attached()
        self._notices.tell(kind, message)

    # What is in force, and what happened.

    @property
    def hyperparams(self) -> dict[str, Any]:
        """Values in force for the next step, by name; for a rate with schedule, cool-down and scheduler applied."""
        self._attached()
        return self._host.shaped()

    @property
    def best_hyperparams(self) -> dict[str, Any]:
        """The tuned values themselves, before decay, fork and cool-down."""
        incumbent = self._attached().controller.state.incumbent
        return self.space.to_python(self.space.decode(incumbent))

    def finish(self) -> None:
        """Ends a run early, in the best state so far: that of the best fork inside a round, or of the best metric.

        At the end of the budget this is automatic. Callbacks hear of the end here, so call it after a whole run too
        where there are any.
        """
        self._end(at_best=True)

    def _end(self, *, at_best: bool) -> None:
        """Ends a run; without ``at_best`` where it stands, which is how one that will be resumed is left."""
        session = self._attached()
        # Without a step that was told there is nothing to go back over.
        if not session.is_settled and session.controller.step:
            if at_best:
                self._notices.before_finish()
            session.settle()
            if at_best:
                session.return_to_best()
        self._close()

    def _close(self) -> None:
        """Says that the run is over, whatever state it is in."""
        session = self._attached()
        self._release()
        if not self._is_over:
            self._is_over = True
            self._sum_up(session)
            session.recorder.end()

    @property
    def history(self) -> atn.History:
        """What happened so far; see `autotunenet_jax.History`."""
        session = self._attached()
        self._sum_up(session)
        return session.recorder.history

    @staticmethod
    def _sum_up(session: SoundSession) -> None:
        ts = session.controller.state
        session.recorder.finish(session.controller.step, int(ts.rollbacks) + session.mended, total=int(ts.plan.total))

    def _write_history(self, folder: Any) -> None:
        """Writes the history so far into a run's folder."""
        session, _ = self._attached(), self.history
        session.recorder.write(folder)

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: what was asked for. An attached training stays where it is."""
        live = ("_host", "_guard", "_leave_joins", "_notices", "_stream", "_through", "_how", "_log")
        return {name: None if name == "_session" else v for name, v in vars(self).items() if name not in live} | {
            "_stream": None,
            "_through": None,
            "_how": None,
            "_log": None,
        }

    def state_dict(self) -> dict[str, Any]:
        """The tuner's own state as tensors and plain data, for a checkpoint beside the model's and the optimizer's.

        It includes the copies of the training state that are part of what is being decided: both inside a round of
        forks, and outside rounds the one of the best validation metric, if there is one. For others a loaded tuner
        takes the training state it finds.
        """
        return engine.checkpoint.state_dict(self._attached(), self._host)

    def load_state_dict(self, state: Mapping[str, Any], *, extend: bool = False) -> None:
        """Goes on from what `state_dict` gave. Load model, optimizer and scheduler first, then attach, then this.

        Args:
          state: What `state_dict` gave.
          extend: Whether a state of another budget goes on to this tuner's: rounds that were held stay held, the others
            and the decay follow the new budget.

        Raises:
          ValueError: It is of another version, search space, budget or policy.
        """
        engine.checkpoint.load_state_dict(self._attached(), self._host, state, extend=extend)
        self._notices.resumed()
