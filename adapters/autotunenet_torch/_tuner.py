"""AutoTuneNet for a training loop that the user owns."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

import autotunenet_jax as atn

from . import _given, _plain, _reduce, _schedulers, _targets
from ._engine import FORK, TRAIN, Engine, Tick
from ._snapshot import TrainingState

_FORMAT = 2


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
      max_share: Most of the budget that discarded fork steps may take, in (0, 1).
      decay: Shape of the rate over the budget: ``"linear"`` or ``"cosine"`` to zero, or ``"none"``. By default linear,
        and none beside a scheduler of the user's own.
      warmup_steps: Steps over which a fork that starts at the very beginning raises its rate from zero.
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
        decay: Literal["linear", "cosine", "none"] | None = None,
        warmup_steps: int = 5,
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
        self.space = atn.SearchSpace(param_space)
        self.mode: Literal["min", "max"] = mode
        self.total_steps = self._planned_steps = total_steps
        self._initial = dict(initial or {})
        self._setters = dict(targets or {})
        for name, setter in self._setters.items():
            if name not in self.space:
                raise ValueError(
                    f"targets names {name!r}, which is not in param_space; it has {', '.join(self.space.names)}."
                )
            if not callable(setter) and not hasattr(setter, "write"):
                raise TypeError(f"targets[{name!r}] must be a function (model, value) -> None; got {setter!r}.")
        self._seed, self._snapshot_device = seed, snapshot_device
        self._core(total_steps, self._initial, has_scheduler=False)  # every argument is checked now, not at attach
        self._engine: Engine | None = None
        # What a loop adds to each copy of the training state.
        self._extra: Callable[[], Any] = lambda: None

    def __repr__(self) -> str:
        return f"AutoTuneNet({self.space!r}, total_steps={self.total_steps}, mode={self.mode!r})"

    def _core(self, total_steps: int | None, initial: Mapping[str, Any], *, has_scheduler: bool) -> atn.AutoTuneNet:
        options = dict(self._options)
        # Two decays would multiply: a scheduler of the user's own does the shaping.
        options["decay"] = options["decay"] or ("none" if has_scheduler else "linear")
        return atn.AutoTuneNet(self.space, total_steps, initial=initial, **options)

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
        targets: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
        progress: atn.Progress | None = None,
    ) -> None:
        """Begins a run: finds what is to be tuned, sets the first values, and copies the training state.

        Args:
          model: The model; lazy parameters initialised.
          optimizer: Its optimizer.
          scheduler: A scheduler of ``torch.optim.lr_scheduler``, or several. It keeps its shape, and the tuner moves
            its height; step it as usual. Forks of a round all start from its place at the round's beginning; after the
            round it is stepped on to the budget spent. OneCycleLR is refused.
          scaler: The ``GradScaler``, if any.
          total_steps: Optimizer steps of the whole run, in place of the constructor's.
          loss_fn: The loss module, when its ``label_smoothing`` is tuned.
          loader: The training data loader, when its ``batch_size`` is tuned.
          validate: Called without arguments whenever the tuner wants the validation metric of the present state; puts
            the model back into training mode itself. Without it, watch `wants_validation` and call `validate`.
          targets: Further setters, besides the constructor's.
          callbacks: Called with the record of each round as it ends.
          progress: An `autotunenet_jax.Progress` to report on.

        Raises:
          TypeError: Something is not what it should be.
          ValueError: A name of the space is not found (the message lists what is), the scheduler cannot be tuned, or
            the model has no parameters or uninitialised ones.

        Cost:
          Two copies of the training state. The engine is compiled on first use, once per search space.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        optimizer = _given.bare_optimizer(optimizer)
        schedulers = _schedulers.as_list(scheduler)
        total_steps = self.total_steps if total_steps is None else total_steps
        state = TrainingState(
            model, optimizer, schedulers=schedulers, scaler=_given.live_scaler(scaler), device=self._snapshot_device
        )
        self._targets = {
            name: _targets.find(
                name,
                model,
                optimizer,
                schedulers,
                setters={**(targets or {}), **self._setters},
                loss_fn=loss_fn,
                loader=loader,
            )
            for name in self.space.names
        }
        core = self._core(total_steps, self._starts(), has_scheduler=bool(schedulers))
        self.total_steps = core.total_steps
        self._validate, self._state = validate, state
        self._engine = Engine(core, seed=self._seed)
        self._recorder = atn.Recorder(
            atn.History(self.space.names),
            self.space,
            progress or atn.Progress(core.total_steps or 1, is_on=False),
            callbacks,
        )
        self._values: dict[str, Any] = {}
        self._behind = [0 for _ in schedulers]
        self._wants_validation = True
        self._last_eval: float | None = None
        self._eval_step = -1
        self._is_settled = self._told_slow = self._told_end = False
        if self._engine.phase != TRAIN:
            self._recorder.begin_round(0, self._engine.phase)
        self._apply()
        self._saved = self._copy_out()
        self._kept = self._copy_out()
        if validate is not None:
            self.validate(validate())

    def _starts(self) -> dict[str, Any]:
        """Where the training stands, for every hyperparameter with a readable value in its range."""
        starts = dict(self._initial)
        for name, target in self._targets.items():
            value = target.read()
            if name not in starts and value is not None and self.space[name].contains(value):
                starts[name] = value
        return starts

    # Training.

    def step(self, loss: Any) -> None:
        """Takes in the loss of the optimizer step just done, and puts in force what the next one needs.

        Call it once per optimizer step, after ``optimizer.step()`` and ``scaler.update()``; before or after
        ``scheduler.step()``, but always on the same side of it. On several processes each gives its own loss.

        Args:
          loss: Scalar tensor or number. Non-finite is answered with a rollback, never an error.

        Raises:
          RuntimeError: `attach` was not called.
          TypeError: Not a scalar.

        Cost:
          About 0.1 ms on the host; more at decisions, a few dozen in a run. Reading a loss on a GPU waits for it.
        """
        self._advance(_reduce.to_float(loss, name="loss"))

    def _advance(self, loss: float) -> "tuple[Tick, Any | None]":
        """`step`, for loops that rewind their data: also what was said last, and the extra of the state put back."""
        engine = self._attached()
        phase, data_step = engine.phase, engine.data_step + 1
        said = engine.tick(_reduce.mean(loss))
        self._log(loss, phase, said)
        self._wants_validation = bool(said.directive.evaluate)
        extra = self._obey(said.directive, rewinds=False)
        if self._wants_validation and self._validate is not None:
            self.validate(self._validate())
        if said.is_due:
            verdict = said.directive.verdict
            said = self._decide(phase)
            said = said._replace(directive=said.directive._replace(verdict=verdict))
            extra = self._obey(said.directive, rewinds=said.directive.data_step != data_step)
        if said.step == self.total_steps and not self._is_settled:
            self._settle()
        self._catch_up()
        self._apply()
        return said, extra

    def _decide(self, before: int) -> Tick:
        engine, recorder = self._attached(), self._recorder
        recorder.flush()
        step = engine.step
        said, (held, chosen, kind, discarded) = engine.decide()
        recorder.discarded = discarded
        if before == TRAIN and said.phase == TRAIN:
            self._explain_skip(kind)
        recorder.decided(step, before, said.phase, said.directive, held, kind, chosen)
        return said

    def _log(self, loss: float, phase: int, said: Tick) -> None:
        if said.directive.restore or said.directive.adopt:
            # A state that the tuner distrusts is dated before the run.
            rewound = max(said.saved_step if said.directive.restore else said.kept_step, 0)
        else:
            rewound = -1
        entry = {
            "step": said.step,
            "data_step": said.directive.data_step,
            "loss": loss,
            "phase": phase,
            "rewound": rewound,
            "verdict": said.directive.verdict,
            "outcome": said.directive.outcome,
            "hyperparams": self._values,
        }
        self._recorder.log(entry, phase)
        total = self.total_steps
        if total is not None and said.step > total and not self._told_end:
            self._told_end = True
            warnings.warn(
                f"step was called more than total_steps={total} times: the budget is spent, and a decayed rate is "
                "zero. Give attach the number of steps that the loop runs.",
                stacklevel=4,
            )

    def _explain_skip(self, kind: int) -> None:
        """Says once why slow hyperparameters stay where they are."""
        slow = _given.slow_names(self.space)
        if kind == 0 or not slow or self._told_slow or math.isfinite(self._attached().state.eval_level):
            return
        self._told_slow = True
        warnings.warn(
            f"{', '.join(slow)} stay at their initial values: what they do shows only on validation data, and none was "
            "reported when the tuner asked. Give attach a validate function, or call tuner.validate(metric) whenever "
            "tuner.wants_validation.",
            stacklevel=5,
        )

    def _obey(self, directive: Any, *, rewinds: bool) -> Any:
        """Carries a directive out; returns the extra of the state put back where the data go back with it."""
        if directive.save:
            self._saved = self._copy_out()
        if directive.keep:
            self._kept = self._copy_out()
        if not (directive.restore or directive.adopt):
            return None
        slot = self._saved if directive.restore else self._kept
        self._copy_back(slot)
        return slot["loop"] if rewinds else None

    def _copy_out(self) -> dict[str, Any]:
        return {"training": self._state.copy_out(), "values": dict(self._values), "loop": self._extra()}

    def _copy_back(self, slot: dict[str, Any]) -> None:
        stood = _schedulers.places(self._state.schedulers)
        self._state.copy_back(slot["training"])
        stands = _schedulers.places(self._state.schedulers)
        self._behind = [
            0 if before is None or now is None else behind + before - now
            for behind, before, now in zip(self._behind, stood, stands, strict=True)
        ]
        for name, target in self._targets.items():
            if isinstance(target, _targets.RateTarget):
                target.applied = slot["values"][name]
        # State first, hyperparameters after: all of them are written again.
        self._values = {}

    def _catch_up(self) -> None:
        """Outside rounds schedulers run on the budget spent: one made for the whole run ends with it."""
        if any(self._behind) and (self._is_settled or self._attached().phase == TRAIN):
            _schedulers.advance(self._state.schedulers, self._behind)
            self._behind = [0 for _ in self._behind]

    def _apply(self) -> None:
        values = self._attached().hyperparams()
        for name, value in values.items():
            if value != self._values.get(name):
                self._targets[name].write(value)
        self._values = values

    def _settle(self) -> None:
        """A run that ends inside a round goes back to the best state it has: the fork kept so far."""
        self._is_settled = True
        engine = self._attached()
        if engine.phase != FORK:
            return
        ts = engine.state
        if int(ts.round.kept) >= 0 and int(ts.slots.kept_step) >= int(ts.slots.saved_step):
            self._copy_back(self._kept)

    def _attached(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the tuner is not attached yet: call attach(model, optimizer, ...) before training.")
        return self._engine

    # Validation.

    @property
    def wants_validation(self) -> bool:
        """Whether the tuner would like `validate` to be called with the metric of the present state, before `step`."""
        return self._wants_validation

    def validate(self, value: Any) -> None:
        """Takes in a validation metric of the present state, in the direction of ``mode``.

        Report it whenever you have one: the history keeps it, and decisions use those that `wants_validation` asked
        for. On several processes each gives its own value; their mean counts.

        Args:
          value: Scalar tensor or number.
        """
        engine = self._attached()
        metric = _reduce.mean(_reduce.to_float(value, name="value"))
        is_settled = engine.phase == TRAIN or engine.step == 0
        if self._wants_validation:
            engine.observe_eval(metric)
            self._wants_validation = False
            self._eval_step = engine.step
        self._recorder.add_eval(engine.step, metric, is_settled=is_settled)
        if is_settled:
            self._last_eval = metric

    # What is in force, and what happened.

    @property
    def hyperparams(self) -> dict[str, Any]:
        """Values in force for the next step, by name; for a rate with schedule, cool-down and scheduler applied."""
        self._attached()
        shaped = {name: t.in_force() for name, t in self._targets.items() if isinstance(t, _targets.RateTarget)}
        return {**self._values, **shaped}

    @property
    def best_hyperparams(self) -> dict[str, Any]:
        """The tuned values themselves, before decay, fork and cool-down."""
        engine = self._attached()
        return self.space.to_python(self.space.decode(engine.state.incumbent))

    def finish(self) -> None:
        """Ends a run early: inside a round of forks, goes back to the best state so far. At the end it is automatic."""
        if not self._is_settled:
            self._settle()
            self._catch_up()

    @property
    def history(self) -> atn.History:
        """What happened so far; see `autotunenet_jax.History`."""
        engine = self._attached()
        self._recorder.finish(engine.step, int(engine.state.rollbacks))
        return self._recorder.history

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The tuner's own state as tensors and plain data, for a checkpoint beside the model's and the optimizer's.

        Inside a round of forks it includes the two copies of the training state. Outside, a loaded tuner takes the
        training state it finds for both.
        """
        engine = self._attached()
        in_round = engine.phase != TRAIN
        self._recorder.flush()
        return {
            "format": _FORMAT,
            "space": self.space.fingerprint(),
            "total_steps": self.total_steps,
            "engine": {name: torch.from_numpy(array) for name, array in engine.arrays().items()},
            "saved": _plain.to_plain(self._saved) if in_round else None,
            "kept": _plain.to_plain(self._kept) if in_round else None,
            "behind": list(self._behind),
            "recorder": self._recorder.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave. Load model, optimizer and scheduler first, then attach, then this.

        Raises:
          ValueError: It is of another search space or budget.
        """
        engine = self._attached()
        _plain.check(state, _FORMAT, space=self.space.fingerprint(), total_steps=self.total_steps)
        engine.load_arrays({name: tensor.numpy() for name, tensor in state["engine"].items()})
        self._recorder.load(state["recorder"])
        self._behind = list(state["behind"])
        self._wants_validation = False
        self._values = {}
        self._apply()
        if state["saved"] is not None:
            self._saved, self._kept = _plain.from_plain(state["saved"]), _plain.from_plain(state["kept"])
        else:
            self._saved, self._kept = self._copy_out(), self._copy_out()

    def _snapshot(self) -> dict[str, Any]:
        """The whole training with the tuner, for a loop that writes it to disk."""
        self._recorder.flush()
        return {
            "format": _FORMAT,
            "space": self.space.fingerprint(),
            "total_steps": self.total_steps,
            "now": _plain.to_plain(self._copy_out()),
            "saved": _plain.to_plain(self._saved),
            "kept": _plain.to_plain(self._kept),
            "engine": self._attached().arrays(),
            "recorder": self._recorder.to_dict(),
            "evals": [self._eval_step, self._last_eval, self._wants_validation],
        }

    def _resume(self, tree: Mapping[str, Any]) -> None:
        """Goes on from what `_snapshot` gave."""
        _plain.check(tree, _FORMAT, space=self.space.fingerprint(), total_steps=self.total_steps)
        now = _plain.from_plain(tree["now"])
        self._state.check(now["training"])
        self._saved, self._kept = _plain.from_plain(tree["saved"]), _plain.from_plain(tree["kept"])
        self._attached().load_arrays(tree["engine"])
        self._recorder.load(tree["recorder"])
        self._eval_step, self._last_eval, self._wants_validation = tree["evals"]
        self._copy_back(now)
        self._behind = [0 for _ in self._behind]  # written outside rounds only
        self._apply()
