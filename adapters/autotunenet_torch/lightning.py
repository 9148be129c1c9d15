"""AutoTuneNet inside Lightning's Trainer."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from . import distributed
from .chosen import TellsChosen
from .engine import atn, hosting
from .tuner import AutoTuneNet

_HOW = (
    "Log one in validation_step, self.log('val_loss', loss), or name one that is logged, AutoTuneCallback(tuner, "
    "monitor=...)"
)
_LOGGER = logging.getLogger("lightning.pytorch.autotunenet")
# What says when Lightning validates.
_WHEN = ("val_check_batch", "check_val_every_n_epoch", "_val_check_time_interval")
_OUT_OF_TIME = (
    "Time was up after {step} of {total} steps, for which rounds and the fall of the rates were planned: the tuner "
    "does not know of max_time. Give AutoTuneCallback as total_steps the number of steps that there is time for."
)
# What a run of ``fast_dev_run`` is taken to be the beginning of.
_DEV_STEPS = 100_000
# Where callbacks look at metrics.
_LOOKS = ("on_validation_end", "on_train_epoch_end", "on_train_batch_end")


class AutoTuneCallback(pl.Callback):
    """Tunes while Lightning trains.

    Forks see fresh batches, since Lightning owns the loop. Where there is validation data, Lightning also validates
    each time the tuner wants to compare forks by it. Callbacks that monitor a metric, such as ``EarlyStopping`` and
    ``ModelCheckpoint``, see the regular validations of the training that lives on alone, never those of forks.
    Checkpoints hold the tuner's state, and a resumed training goes on from it. Where there are checkpoints, the log
    folder gets ``history.json``, for ``python -m autotunenet_jax``. Lightning's loggers get the tuned values, each
    under ``tuner/`` and its name. A training that is stopped early ends in the best state that was measured.

    Example:
        >>> tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1)})
        >>> trainer = pl.Trainer(max_epochs=5, callbacks=[AutoTuneCallback(tuner)])  # doctest: +SKIP

    Args:
      tuner: What may be tuned.
      monitor: Name of the logged validation metric that is reported at the end of each validation, by default
        ``val_loss``, ``val/loss``, ``valid_loss`` or the like, where one is logged; only recorded where ``validate``
        gives the metric to decide by.
      validate: ``module -> metric`` of the present state, called when the tuner wants to compare forks by it, in place
        of a validation by Lightning.
      total_steps: Optimizer steps of the run; by default what Lightning expects.
      callbacks: Hooks of the tuner's own, see `AutoTuneNet.attach`; `autotunenet_jax.StopTraining` stops the Trainer.
      loggers: Where all numbers of the run go, besides Lightning's loggers; see `autotunenet_jax.fit`.
      log_every: Steps between two rows of these loggers; Lightning's own keep their pace.
      extend: Whether a training that goes on from a checkpoint may have another number of steps than it had.

    Raises:
      ValueError: ``log_every`` is out of range. When training starts: more than one optimizer, a checkpoint that holds
        no tuner's state, or something the tuner refuses. Then: ``training_step`` returns no loss where optimisation is
        manual, or ``monitor`` is not among the metrics.
    """

    def __init__(
        self,
        tuner: AutoTuneNet,
        *,
        monitor: str | None = None,
        validate: Callable[[pl.LightningModule], Any] | None = None,
        total_steps: int | None = None,
        callbacks: Sequence[atn.Callback | Callable[[dict[str, Any]], None]] = (),
        loggers: Sequence[Any] = (),
        log_every: int = 50,
        extend: bool = False,
    ):
        self.tuner, self.monitor = tuner, monitor
        self._validate, self._total_steps = validate, total_steps
        self._callbacks, self._loggers, self._extends = list(callbacks), list(loggers), extend
        self._log_every = hosting.whole_number("log_every", log_every)
        self._pending: Mapping[str, Any] | None = None
        self._losses: list[torch.Tensor] = []
        self._steps = 0
        self._is_attached = self._has_saved = False
        self._asked: dict[str, Any] | None = None
        self._is_regular = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attaches, after Lightning has put a checkpoint back if there is one."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"AutoTuneCallback tunes one optimizer; configure_optimizers gave {len(trainer.optimizers)}. "
                "Put the parameters into groups of one optimizer, and tune 'group_name/learning_rate'."
            )
        self._steps = trainer.global_step
        if self._steps and self._pending is None and trainer.ckpt_path is not None:
            raise ValueError(
                f"{trainer.ckpt_path} holds no state of AutoTuneCallback, so the tuner cannot go on from step "
                f"{self._steps}. Resume from a checkpoint that was saved with the callback, or load the weights alone."
            )
        expected = _expected_steps(trainer)
        # A second fit goes on counting, and the tuner plans what is left.
        done = 0 if self._pending is not None else self._steps
        total = self._total_steps or (int(expected) - done if math.isfinite(expected) else None)
        if trainer.fast_dev_run:
            # Too short for any plan of its own; what a whole run calls is called.
            total = self._total_steps or _DEV_STEPS
        validate = self._validate
        chosen = TellsChosen(lambda: self.tuner.best_hyperparams, functools.partial(_log, trainer))
        self.tuner._through, self.tuner._log, self.tuner._how = rank_zero_only(_LOGGER.warning), _LOGGER, _HOW
        self.tuner.attach(
            pl_module,
            trainer.optimizers[0],
            [config.scheduler for config in trainer.lr_scheduler_configs],
            getattr(trainer.precision_plugin, "scaler", None),
            total_steps=total,
            validate=None if validate is None else lambda: validate(pl_module),
            aux=_averages(trainer),
            callbacks=[*self._callbacks, *([chosen] if trainer.loggers else [])],
            loggers=self._loggers if distributed.rank() == 0 else (),
            log_every=self._log_every,
        )
        self._is_attached, self._asked, self._is_regular = True, None, True
        self._losses.clear()
        self._shield(trainer)
        if self._pending is not None:
            self.tuner.load_state_dict(self._pending, extend=self._extends)
            self._pending = None

    def _is_tuning(self, trainer: pl.Trainer) -> bool:
        return self._is_attached and trainer.current_epoch < _epochs(trainer)

    def _shield(self, trainer: pl.Trainer) -> None:
        """Lets callbacks that monitor a metric see regular validations alone."""
        for callback in trainer.callbacks:
            if callback is self or getattr(callback, "monitor", None) is None:
                continue
            for name in _LOOKS:
                look = getattr(callback, name)

                @functools.wraps(look)
                def seen(*args: Any, _look: Any = look, **kwargs: Any) -> Any:
                    return _look(*args, **kwargs) if self._is_regular else None

                setattr(callback, name, seen)

    def _unshield(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:
            for name in _LOOKS:
                if hasattr(vars(callback).get(name), "__wrapped__"):
                    delattr(callback, name)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports the loss once per optimizer step: the mean over the batches accumulated into it."""
        if not self._is_tuning(trainer):
            return
        self._take_back(trainer)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            # Where Lightning optimises, it has divided the loss by the number of batches that make a step.
            share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach() * share)
        if trainer.global_step == self._steps:
            return
        if not self._losses and not pl_module.automatic_optimization:
            given = type(outputs).__name__ if outputs else "nothing"
            raise ValueError(
                "training_step optimises by hand and returns no loss, which is all that the tuner learns from. Return "
                f"the loss, or a dictionary with it under 'loss'; got {given}."
            )
        self._steps = trainer.global_step
        # A training_step that returns None says that its batch is to be skipped.
        with _stopping(trainer):
            self.tuner.step(torch.stack(self._losses).mean() if self._losses else math.nan)
        self._losses.clear()
        if self.tuner.wants_validation and self._validate is None:
            self._ask(trainer, batch_idx)

    def _ask(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Has Lightning validate after this batch, unless it does so anyway."""
        every, epochs, seconds = (getattr(trainer, name, None) for name in _WHEN)
        epoch_loop = trainer.fit_loop.epoch_loop
        done = epoch_loop.total_batch_idx if epochs is None else batch_idx
        is_due = epoch_loop.batch_progress.is_last_batch or not every or (every < math.inf and (done + 1) % every == 0)
        is_due &= seconds is None and (epochs is None or (trainer.current_epoch + 1) % epochs == 0)
        if trainer.enable_validation and not is_due:
            self._asked = dict(zip(_WHEN, (every, epochs, seconds), strict=True))
            trainer.val_check_batch, trainer.check_val_every_n_epoch = 1, 1
            trainer._val_check_time_interval = None

    def _take_back(self, trainer: pl.Trainer) -> None:
        for name, value in (self._asked or {}).items():
            setattr(trainer, name, value)
        self._asked = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes whether the metrics to come are those of the training that lives on, at a regular time."""
        if self._is_tuning(trainer) and not trainer.sanity_checking:
            is_in_round = self.tuner._attached().controller.phase != hosting.TRAIN
            self._is_regular = self._asked is None and not is_in_round
            self._take_back(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the monitored metric, but not that of the sanity check."""
        if trainer.sanity_checking or not self._is_tuning(trainer):
            return
        metrics = trainer.callback_metrics
        name = self.monitor or hosting.metric_names.find_loss(metrics)
        if name is None:
            if metrics and self._validate is None:
                self.tuner._tell("unknown metric", hosting.metric_names.none_of(metrics, _HOW))
            return
        if name not in metrics:
            raise ValueError(
                f"AutoTuneCallback(monitor={self.monitor!r}) is none of the logged metrics; there are "
                f"{', '.join(sorted(metrics)) or 'none'}. Log it in validation_step, or name one of these."
            )
        if self._validate is not None:
            self.tuner._note_metric(metrics[name])
            return
        if doubt := hosting.metric_names.doubt(name, self.tuner.mode):
            self.tuner._tell("direction", doubt)
        with _stopping(trainer):
            self.tuner.validate(metrics[name])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends before the budget does in the best state so far."""
        self._leave(trainer)
        if self._is_attached:
            self._tell_of_time(trainer)
            self.tuner.finish()
        if self._has_saved:
            self._write_history(trainer)

    def _tell_of_time(self, trainer: pl.Trainer) -> None:
        """Says that time was up before the budget was spent: rates may not have fallen."""
        controller = self.tuner._attached().controller
        step, total = controller.step, controller.tuner.total_steps
        timers = [callback for callback in trainer.callbacks if isinstance(callback, pl.callbacks.Timer)]
        left = [timer.time_remaining() for timer in timers]
        if total is not None and step < total and any(seconds is not None and seconds <= 0.0 for seconds in left):
            self.tuner._tell("time", _OUT_OF_TIME.format(step=step, total=total))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes the history into the log folder, or, without a logger, into the Trainer's root folder."""
        if self._is_attached:
            self._has_saved = True
            self._write_history(trainer)

    def _write_history(self, trainer: pl.Trainer) -> None:
        # Processes agree on the folder, so all of them ask.
        folder = trainer.log_dir or trainer.default_root_dir
        if trainer.is_global_zero:
            self.tuner._write_history(folder)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves other callbacks as they were."""
        self._leave(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        self._take_back(trainer)
        self._unshield(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The tuner's state, for Lightning's checkpoint."""
        return self.tuner.state_dict() if self._is_attached else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the tuner's state until training starts."""
        self._pending = state_dict or None


def _epochs(trainer: pl.Trainer) -> float:
    """Epochs that train: ``StochasticWeightAveraging`` adds one that gives BatchNorm the statistics of the average."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    swa = [held for held in trainer.callbacks if isinstance(held, pl.callbacks.StochasticWeightAveraging)]
    own = [getattr(held, "_max_epochs", -1) for held in swa]
    return min([epochs, *(count for count in own if count > 0)])


def _expected_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps of the whole run, also where gradients are accumulated over more batches in later epochs."""
    batches, epochs = trainer.num_training_batches, _epochs(trainer)
    if not 0 < batches < math.inf or epochs == math.inf:
        return trainer.estimated_stepping_batches
    accumulated = [trainer.accumulate_grad_batches] * int(epochs)
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.GradientAccumulationScheduler):
            accumulated = [callback.get_accumulate_grad_batches(epoch) for epoch in range(int(epochs))]
    steps = sum(math.ceil(batches / each) for each in accumulated)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def _averages(trainer: pl.Trainer) -> list[Any]:
    """The averages of the weights that callbacks hold beside the module."""
    kind = getattr(pl.callbacks, "WeightAveraging", ())
    models = [getattr(held, "_average_model", None) for held in trainer.callbacks if isinstance(held, kind)]
    return [model for model in models if model is not None]


@contextlib.contextmanager
def _stopping(trainer: pl.Trainer) -> Iterator[None]:
    """Where a callback of the tuner's asks for the end, Lightning stops."""
    try:
        yield
    except atn.StopTraining as asked:
        _LOGGER.info("AutoTuneNet: stopped by a callback%s", f": {asked}" if str(asked) else "")
        trainer.should_stop = True


def _log(trainer: pl.Trainer, values: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
