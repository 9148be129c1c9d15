"""A complete training loop around the tuner, with nothing hidden in it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from . import arguments, distributed, engine, modes, objective, optimizer_state, random_state, sharding
from .data import ReplayBuffer, check_loader, map_tensors, rows
from .step_boundary import StepBoundary
from .targets import AttributeTarget, SetterTarget
from .tuner import AutoTuneNet

if TYPE_CHECKING:
    import autotunenet_jax as atn
    from autotunenet_jax.hosting import Stop

    from .sound_session import SoundSession

_EVALS_PER_RUN = 20
_SHOW_EVERY_SECONDS = 0.25
# Steps between exchanges of several processes on whether to save or to stop.
_AGREE_EVERY = 10
_LOGGER = logging.getLogger("autotunenet_torch")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains a model once, while a tuner tunes.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        >>> trainer = Trainer(loss_fn=torch.nn.functional.cross_entropy, epochs=10, progress=False)
        >>> tuner = AutoTuneNet({"learning_rate": (1e-4, 1e-1)})
        >>> history = trainer.fit(torch.nn.Linear(4, 2), loader, loader, tuner=tuner)
        >>> history.summary["steps"]
        80

    Args:
      loss_fn: ``(outputs, targets) -> scalar loss``, averaged over the batch; a function or a module.
      optimizer: Class of the optimizer, or a function from parameters to one, or an optimizer of the model's.
      epochs: Budget, in passes over the training data; fork steps count.
      steps: Budget in optimizer steps, in place of ``epochs``.
      optimizer_options: Arguments of ``optimizer`` besides the parameters.
      scheduler: Function from the optimizer to a scheduler, stepped once per optimizer step; the tuner's own decay is
        off then.
      device: Where to train; by default CUDA if there is any, else the CPU.
      precision: ``"fp32"``, or mixed ``"bf16"`` or ``"fp16"`` (with a gradient scaler).
      clip_norm: Largest norm of the gradient; None for no clipping.
      accumulate: Batches per optimizer step.
      metrics: Functions ``(outputs, targets) -> scalar`` by name, shown and recorded at validation; ``{}`` for the loss
        alone. By default the accuracy where the targets are classes, on the second or the last axis of the outputs.
      monitor: Metric that is reported to the tuner; by default ``"loss"`` when it minimises, else the first metric.
      forward: ``(model, batch) -> (outputs, targets)``; by default the last entry of a batch is the targets and the
        others are the model's arguments.
      eval_every: Optimizer steps between validations outside rounds; by default 20 in a run.
      restore_best: Whether the model ends as it was at its best validation outside rounds. Without it a run with
        validation ends in the best state since the last round.
      progress: Whether to show a progress line.
      callbacks: Each an `autotunenet_jax.Callback`, such as `autotunenet_jax.EarlyStopping`, or a function called with
        the record of each round as it ends.
      loggers: Where the numbers go while the run goes on, those of the first process of several; see
        `autotunenet_jax.fit`.
      log_every: Steps between two rows of the loggers.

    Attributes:
      is_interrupted: Whether the last run was ended early by Ctrl-C or SIGTERM.
      stop_reason: Why the last run ended before its budget did; None where it did not.

    Raises:
      ValueError: Not exactly one of ``epochs`` and ``steps``, or a value out of range.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        optimizer: Any = torch.optim.AdamW,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        device: Any = None,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        clip_norm: float | None = None,
        accumulate: int = 1,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        monitor: str | None = None,
        forward: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        eval_every: int | None = None,
        restore_best: bool = False,
        progress: bool = True,
        callbacks: Sequence[atn.Callback | Callable[[dict[str, Any]], None]] = (),
        loggers: Sequence[Any] = (),
        log_every: int = 50,
    ):
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (outputs, targets) -> loss; got {loss_fn!r}.")
        if (epochs is None) == (steps is None):
            raise ValueError(f"give the budget as epochs or as steps, one of them; got {epochs=} and {steps=}.")
        counts = {"epochs": epochs, "steps": steps, "accumulate": accumulate, "eval_every": eval_every}
        counts["log_every"] = log_every
        for name, value in counts.items():
            if value is not None:
                engine.hosting.whole_number(name, value)
        if not isinstance(optimizer, torch.optim.Optimizer):
            arguments.check_callable("optimizer", optimizer, "an optimizer or its class, such as torch.optim.AdamW")
        if scheduler is not None:
            arguments.check_callable("scheduler", scheduler, "a function of the optimizer that returns a scheduler")
        if metrics is not None and not (isinstance(metrics, Mapping) and all(map(callable, metrics.values()))):
            raise TypeError(f"metrics must map names to functions (outputs, targets) -> scalar; got {metrics!r}.")
        if precision != "fp32" and precision not in _AUTOCAST:
            raise ValueError(f"precision must be 'fp32', 'bf16' or 'fp16'; got {precision!r}.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping; got {clip_norm!r}.")
        self.loss_fn, self.epochs, self.steps = loss_fn, epochs, steps
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.clip_norm, self.accumulate, self.precision = clip_norm, accumulate, precision
        self.monitor, self.eval_every, self.restore_best = monitor, eval_every, restore_best
        self._make_optimizer, self._optimizer_options = optimizer, dict(optimizer_options or {})
        self._make_scheduler, self._forward = scheduler, forward or objective.split
        self._metrics = None if metrics is None else dict(metrics)
        self._progress, self._callbacks = progress, callbacks
        self._loggers, self._log_every = loggers, log_every
        self._loss_options: dict[str, Any] = {}
        self._batch_size: int | None = None
        self.model: Any = None
        self._val_loader: Iterable[Any] | None = None
        self._tuner: Any = None
        self._session: SoundSession | None = None
        self._boundary: StepBoundary | None = None
        self.is_interrupted = False
        self.stop_reason: str | None = None

    @property
    def best_state(self) -> dict[str, Any] | None:
        """The model's ``state_dict`` at its best validation, on the CPU; None before one."""
        return None if self._session is None else self._session.best

    @property
    def best_value(self) -> float | None:
        """The metric there."""
        return None if self._session is None else self._session.best_eval

    # Training.

    def fit(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        *,
        tuner: AutoTuneNet,
        snapshots: str | os.PathLike[str] | atn.Snapshots | None = None,
        resume: bool | Literal["extend"] = True,
    ) -> atn.History:
        """Trains once, tuning as it goes. Forks of a round start from one state and see the same batches.

        Args:
          model: Trained in place.
          train_loader: Gives batches; iterated over as often as needed.
          val_loader: Gives validation batches. Without it forks are compared by their training losses, and slow
            hyperparameters such as dropout and weight decay stay where they are.
          tuner: What may be tuned.
          snapshots: Folder, or `autotunenet_jax.Snapshots`, for durable snapshots of the run.
          resume: Whether to go on from the latest sound snapshot there, if there is one. ``"extend"`` goes on to this
            call's budget where that snapshot is of a shorter or longer run.

        Returns:
          The history of the run; after a first Ctrl-C too, with what was reached by then.

        Raises:
          TypeError: An argument of the wrong type, or a loader that can be read only once.
          ValueError: No budget can be told from the loader, the loss has no gradient, a name of the space is not found,
            or only slow hyperparameters are tuned and there is no ``val_loader``.
        """
        self._check(model, val_loader, tuner, resume)
        total = arguments.budget(
            train_loader, steps=self.steps, epochs=self.epochs, accumulate=self.accumulate, planned=tuner._planned_steps
        )
        self._prepare(model, train_loader, val_loader, tuner)
        source = ReplayBuffer(train_loader)
        shown = engine.atn.Progress(total, is_on=self._progress and distributed.rank() == 0)
        store, is_owned = engine.serialization.open_store(snapshots, tuner)
        try:
            shown.open()
            tuner._stream, tuner._keeps_best = source, True
            session = self._attach(train_loader, total, shown)
            if resume and store is not None:
                self._resume(session, store, source, extend=resume == "extend")
            with engine.hosting.Stop() as stop:
                self._run(session, total, source, store, shown, stop)
        except BaseException:
            tuner._release()
            raise
        finally:
            tuner._stream, tuner._keeps_best = None, False
            shown.close()
            if is_owned and store is not None:
                store.close()
        tuner._end(at_best=not self.is_interrupted)
        optimizer_state.turn(self.optimizer, trains=False)
        is_stopped = self.stop_reason is not None and not self.is_interrupted
        if (self.restore_best or is_stopped) and self.best_state is not None:
            self.model.load_state_dict(self.best_state)
        history = tuner.history
        if store is not None:
            session.recorder.write(store.folder)
        return history

    @staticmethod
    def _check(model: Any, val_loader: Any, tuner: Any, resume: Any) -> None:
        if not isinstance(tuner, AutoTuneNet):
            raise TypeError(f"tuner must be an autotunenet_torch.AutoTuneNet; got {type(tuner).__name__}.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        if resume not in (True, False, "extend"):
            raise ValueError(f"resume must be True, False or 'extend'; got {resume!r}.")
        if val_loader is not None:
            check_loader("val_loader", val_loader)
        else:
            arguments.check_slow(tuner.space)
            if tuner.mode == "max":
                raise ValueError(
                    "mode='max' asks for the highest metric, and there is none without a val_loader. Give one."
                )

    def _prepare(self, model: nn.Module, train_loader: Iterable[Any], val_loader: Any, tuner: AutoTuneNet) -> None:
        """The model on its device and in training, its optimizer, scheduler and scaler."""
        is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        self.model = model._apply(self._moved) if is_meta else model.to(self.device)
        self._val_loader, self._tuner = val_loader, tuner
        self._session, self.stop_reason, self.is_interrupted = None, None, False
        if self.restore_best and sharding.is_sharded(self.model):
            raise ValueError(
                "restore_best=True needs the whole model on each process, and this one is sharded. Leave it out: with "
                "a val_loader the run ends in its best state as it is."
            )
        self._prepare_lazy(train_loader)
        self.optimizer = self._optimizer(tuner)
        arguments.check_closure(self.optimizer)
        optimizer_state.turn(self.optimizer, trains=True)
        self.scheduler = self._make_scheduler(self.optimizer) if self._make_scheduler else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if not self.model.training:
            self.model.train()

    def _attach(self, train_loader: Iterable[Any], total: int, shown: atn.Progress) -> SoundSession:
        tuner, validates = self._tuner, self._val_loader is not None
        tuner.attach(
            self.model,
            self.optimizer,
            self.scheduler,
            self.scaler,
            total_steps=total,
            loss_fn=self.loss_fn,
            validate=self._measure if validates else None,
            targets=self._own_targets(train_loader),
            callbacks=self._callbacks,
            loggers=self._loggers if distributed.rank() == 0 else (),
            log_every=self._log_every,
            progress=shown,
        )
        self._session = session = tuner._attached()
        if not validates:
            # Before training rather than when none has come.
            for notice in engine.hosting.of_slow(tuner.space, "Give fit a val_loader"):
                tuner._notices.tell(*notice)
        return session

    def _run(
        self,
        session: SoundSession,
        total: int,
        source: ReplayBuffer,
        store: atn.Snapshots | None,
        shown: atn.Progress,
        stop: Stop,
    ) -> None:
        """Trains to the end of the budget, or until asked to stop."""
        controller = session.controller
        boundary = self._boundary = StepBoundary(self.model, source) if store is not None else None
        interval = self.eval_every or max(total // _EVALS_PER_RUN, 1)
        shown_at, is_stopping = time.monotonic(), False
        try:
            while controller.step < total and not is_stopping:
                loss = self._train_one(source)
                step, is_training = controller.step, controller.phase == engine.hosting.TRAIN
                if is_training and step % interval == 0 and step < total and self._evaluate(session):
                    session.write()
                self._deliver(session)
                is_stopping, is_due = self._agree(step, stop, store)
                if store is not None and is_due and is_training and not is_stopping and step < total:
                    self._save(session, store, source)
                is_last = is_stopping or step >= total
                if shown.is_on and (is_last or time.monotonic() - shown_at > _SHOW_EVERY_SECONDS):
                    shown_at = time.monotonic()
                    phase, values = engine.atn.PHASES[controller.phase], self._tuner.hyperparams
                    session.recorder.show_at(step, phase=phase, loss=loss, hyperparams=values)
        finally:
            # Also where a loader or a second signal has raised: what was trained by then is not lost.
            is_between = boundary is not None and boundary.go_back()
            if (
                store is not None
                and is_between
                and (controller.phase == engine.hosting.TRAIN or controller.step < total)
            ):
                self._save(session, store, source)
        if is_stopping:
            self._say_why(session, total)

    def _say_why(self, session: SoundSession, total: int) -> None:
        """Says why a run ends early."""
        step = session.controller.step
        if self.is_interrupted:
            self.stop_reason = message = f"Stopped by a signal after step {step} of {total}."
            _LOGGER.warning("AutoTuneNet: %s", message)
        else:
            self.stop_reason = self.stop_reason or "a callback asked for it"
            message = f"Stopped after {step} of {total} steps: {self.stop_reason}."
        session.recorder.note(step, "stop", message)

    def _deliver(self, session: SoundSession) -> None:
        """Lets callbacks and loggers hear of what is known by now, and takes note where one wants the run to end."""
        try:
            session.recorder.deliver()
        except engine.atn.StopTraining as asked:
            self.stop_reason = self.stop_reason or str(asked) or "a callback asked for it"

    def _train_one(self, source: ReplayBuffer) -> float:
        """One step, told to the tuner; returns its loss."""
        if self._boundary is not None:
            self._boundary.begin()
        loss = self.train_step(source)
        self._tuner._notices.after(self._tuner._report(loss))
        if self._boundary is not None:
            self._boundary.end()
        return loss

    def _evaluate(self, session: SoundSession) -> bool:
        """Validates, and steps a scheduler that waits for the metric."""
        is_new = session.evaluate()
        if is_new and session.last_eval is not None and isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(session.last_eval)
        return is_new

    def _agree(self, step: int, stop: Stop, store: atn.Snapshots | None) -> tuple[bool, bool]:
        """Whether to stop and whether to save, the same on all processes, whose clocks and signals differ."""
        if distributed.is_distributed() and step % _AGREE_EVERY:
            return False, False
        is_due = store is not None and store.is_due()
        said = distributed.gather(stop.is_requested, self.stop_reason is not None, is_due)
        self.is_interrupted = any(signalled for signalled, _, _ in said)
        return self.is_interrupted or any(asks for _, asks, _ in said), all(dues for _, _, dues in said)

    def train_step(self, source: ReplayBuffer) -> float:
        """One optimizer step on the next batches of ``source``; returns its loss."""
        total = torch.zeros((), device=self.device)
        # All of them first: a loader that raises leaves nothing half done.
        batches = [source.get(self._batch_size) for _ in range(self.accumulate)]
        for batch in batches:
            batch = self._to_device(batch)
            with self._autocast():
                outputs, targets = self._forward(self.model, batch)
                loss = self._loss(outputs, targets)
            self.scaler.scale(loss / self.accumulate).backward()
            total += loss.detach().float()
        if self._boundary is not None:
            self._boundary.update()
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        # Of several processes each has its own loss, and all must take the same steps: the gradients decide alone.
        self._tuner._guard.loss = None if distributed.is_distributed() else total
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        return float(total) / self.accumulate

    def _loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        loss = objective.scalar(self.loss_fn(outputs, targets, **self._loss_options))
        if not loss.requires_grad:
            raise ValueError(
                "the loss has no gradient: it does not depend on a parameter with requires_grad, or was detached on "
                "the way. Unfreeze something, and compute the loss from the model's outputs."
            )
        return loss

    # Validation and use.

    def validate(self, loader: Iterable[Any] | None = None) -> dict[str, float]:
        """Mean loss and metrics over a loader, by default the validation loader of `fit`; disturbs nothing.

        A label smoothing that is tuned is left out of this loss, so that losses of two values of it compare.
        """
        loader = self._val_loader if loader is None else loader
        if self.model is None or loader is None:
            raise RuntimeError("there is nothing to validate: call fit first, and give a loader to it or here.")
        sums, count = {}, 0
        is_smoothed = self._tuner is not None and "label_smoothing" in self._tuner.space
        unsmoothed = objective.unsmoothed(self.loss_fn, self._loss_options, is_tuned=is_smoothed)
        with self._evaluating(), unsmoothed as options:
            for batch in loader:
                batch = self._to_device(batch)
                with self._autocast():
                    outputs, targets = self._forward(self.model, batch)
                    values = {"loss": objective.scalar(self.loss_fn(outputs, targets, **options))}
                for name, metric in objective.metrics_for(self._metrics, outputs, targets).items():
                    values[name] = objective.number(name, metric(outputs, targets))
                size = rows(targets)
                count += size
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + size * value
        if not count:
            raise ValueError("the validation loader is empty: it gave no batch.")
        return {name: float(value) / count for name, value in sums.items()}

    def predict(self, loader: Iterable[Any]) -> Any:
        """The model's outputs over a loader, put together, on the CPU; batches as in training, or inputs alone."""
        if self.model is None:
            raise RuntimeError("there is no model yet: call fit first.")
        outputs = []
        with self._evaluating():
            for batch in loader:
                batch = self._to_device(batch)
                with self._autocast():
                    is_input = isinstance(batch, torch.Tensor)
                    found = self.model(batch) if is_input else self._forward(self.model, batch)[0]
                outputs.append(map_tensors(lambda tensor: tensor.cpu(), found))
        return torch.cat(outputs) if outputs and isinstance(outputs[0], torch.Tensor) else outputs

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Model and optimizer in their modes for evaluation; neither they nor random generators are left otherwise."""
        optimizer = optimizer_state.evaluating(self.optimizer)
        with modes.kept(self.model), random_state.untouched(), torch.no_grad(), optimizer:
            self.model.eval()
            yield

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the trainer's device; of one without numbers there is nothing to move."""
        return tensor if tensor.is_meta else tensor.to(self.device)

    def _measure(self) -> float:
        """Validates; returns the monitored metric."""
        values = self.validate()
        first = next((name for name in values if name != "loss"), "loss")
        name = self.monitor or ("loss" if self._tuner.mode == "min" else first)
        if name == "loss" and self._tuner.mode == "max":
            raise ValueError(
                "mode='max' asks for the highest metric, and the only one here is the loss. Give "
                "Trainer(metrics={name: function}), or leave mode at 'min'."
            )
        if name not in values:
            raise ValueError(f"monitor={name!r} is none of the metrics; there are {', '.join(values)}.")
        self._tuner._host.metrics = {name: distributed.mean(value) for name, value in values.items()}
        return values[name]

    # Preparation.

    def _optimizer(self, tuner: AutoTuneNet) -> torch.optim.Optimizer:
        if isinstance(self._make_optimizer, torch.optim.Optimizer):
            return self._make_optimizer
        options = dict(self._optimizer_options)
        if next(self.model.parameters(), None) is None:
            raise ValueError("the model has no parameters, so there is nothing to train. Is it the right module?")
        initial = {name: tuner._initial[name] for name in ("learning_rate", "lr") if name in tuner._initial}
        if initial and "lr" not in options and "lr" in inspect.signature(self._make_optimizer).parameters:
            options["lr"] = float(next(iter(initial.values())))
        return self._make_optimizer(self.model.parameters(), **options)

    def _own_targets(self, loader: Iterable[Any]) -> dict[str, Any]:
        """What can be tuned because this loop does it."""
        self._batch_size, self._loss_options = None, {}
        size = None
        if "batch_size" in self._tuner.space:
            size = getattr(loader, "batch_size", None) or rows(next(iter(loader)))
        targets: dict[str, Any] = {
            "batch_size": AttributeTarget(self, "_batch_size", start=size),
            "clip_norm": AttributeTarget(self, "clip_norm"),
        }
        if objective.takes(self.loss_fn, "label_smoothing"):
            options = self._loss_options
            targets["label_smoothing"] = SetterTarget(
                lambda _, value: options.update(label_smoothing=value),
                self.model,
                start=objective.default_of(self.loss_fn, "label_smoothing"),
            )
        return targets

    def _prepare_lazy(self, loader: Iterable[Any]) -> None:
        """Initialises lazy parameters by one forward pass, before there is an optimizer."""
        if any(is_lazy(parameter) for parameter in self.model.parameters()):
            with torch.no_grad(), self._autocast():
                self._forward(self.model, self._to_device(next(iter(loader))))

    def _autocast(self) -> Any:
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _to_device(self, batch: Any) -> Any:
        return map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch)

    # Durable snapshots.

    def _save(self, session: SoundSession, store: atn.Snapshots, source: ReplayBuffer) -> None:
        tree = {**engine.checkpoint.state_dict(session, self._tuner._host, is_whole=True), "source": source.state()}
        engine.serialization.save(store, session.controller.step, tree, metric=session.last_eval)
        session.recorder.write(store.folder)

    def _resume(self, session: SoundSession, store: atn.Snapshots, source: ReplayBuffer, *, extend: bool) -> None:
        found = engine.serialization.restore_together(store)
        if found is None:
            return
        step, tree = found
        source.load(tree["source"])
        # Last, since it puts the random generators back.
        engine.checkpoint.load_state_dict(session, self._tuner._host, tree, extend=extend)
        self._tuner._notices.resumed()
        session.recorder.note(step, "resume", f"Resumed from the snapshot of step {step}.")
