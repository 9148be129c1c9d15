"""AutoTuneNet inside the Trainer of transformers."""

import contextlib
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import distributed
from .chosen import TellsChosen
from .engine import atn, hosting
from .tuner import AutoTuneNet

_FILE = "autotune.pt"
_MONITOR = "eval_loss"
_HOW = (
    "Give the Trainer an eval_dataset and an eval_strategy, or name a metric that it has, AutoTuneCallback(tuner, "
    "monitor=...)"
)
_LOGGER = transformers.utils.logging.get_logger("transformers.autotunenet")


class AutoTuneCallback(TrainerCallback):
    """Tunes while the Trainer of transformers trains.

    Forks see fresh batches, since the Trainer owns the loop. Its learning-rate scheduler keeps its shape, and the tuner
    moves its height. The loss that is told is the one the Trainer trains by, whoever computes it, per item of the whole
    step. Where the Trainer evaluates at all, it evaluates each time the tuner wants to compare forks by it;
    ``EarlyStoppingCallback`` and the best model see the regular evaluations of the training that lives on alone.
    Checkpoints get a file with the tuner's state, and the output folder ``history.json``, for
    ``python -m autotunenet_jax``. The Trainer logs the tuned values, each under ``tuner/`` and its name. A training
    that is stopped early ends in the best state that was measured, unless the Trainer loads its own best model.

    Example:
        >>> tuner = AutoTuneNet({"learning_rate": (1e-6, 1e-3)})
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[AutoTuneCallback(tuner)])  # doctest: +SKIP

    Args:
      tuner: What may be tuned.
      monitor: Name of the evaluation metric, in the direction of the tuner's ``mode``; by default ``eval_loss``.
      callbacks: Hooks of the tuner's own, see `AutoTuneNet.attach`; `autotunenet_jax.StopTraining` stops the Trainer.
      loggers: Where all numbers of the run go, besides the Trainer's log; see `autotunenet_jax.fit`.
      log_every: Steps between two rows of these loggers; the Trainer's log keeps its pace.
      extend: Whether a training that goes on from a checkpoint may have another number of steps than it had.

    Raises:
      RuntimeError: When training starts: something else than a Trainer calls it.
      ValueError: ``log_every`` is out of range. When training starts: the checkpoint to resume from holds no tuner's
        state, or something the tuner refuses. Then: ``monitor`` is not among the metrics.
    """

    def __init__(
        self,
        tuner: AutoTuneNet,
        *,
        monitor: str | None = None,
        callbacks: Sequence[atn.Callback | Callable[[dict[str, Any]], None]] = (),
        loggers: Sequence[Any] = (),
        log_every: int = 50,
        extend: bool = False,
    ):
        self.tuner, self.monitor = tuner, monitor
        self._callbacks, self._loggers, self._extends = list(callbacks), list(loggers), extend
        self._log_every = hosting.whole_number("log_every", log_every)
        self._losses: list[torch.Tensor] = []
        self._undo: list[Callable[[], None]] = []
        self._is_asked = self._is_training = self._has_many = self._has_saved = False
        self._shown: dict[str, float] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attaches, after the Trainer has put a checkpoint back if there is one."""
        self._leave()
        trainer, resumed = _caller(self)
        self.tuner._through, self.tuner._log, self.tuner._how = _LOGGER.warning, _LOGGER, _HOW
        logs = str(getattr(args.logging_strategy, "value", args.logging_strategy)) != "no"
        chosen = TellsChosen(lambda: self.tuner.best_hyperparams, functools.partial(_log, trainer))
        scaler = getattr(trainer.accelerator, "scaler", None)
        self.tuner.attach(
            model,
            optimizer,
            lr_scheduler,
            scaler,
            total_steps=state.max_steps,
            callbacks=[*self._callbacks, *([chosen] if logs else [])],
            loggers=self._loggers if distributed.rank() == 0 else (),
            log_every=self._log_every,
        )
        if state.global_step:
            file = pathlib.Path(str(resumed or _folder(args, state))) / _FILE
            if not file.exists():
                raise ValueError(
                    f"{file.parent} holds no {_FILE}, so the tuner cannot go on from step {state.global_step}. Resume "
                    "from a checkpoint that was saved with AutoTuneCallback, or start from the weights alone."
                )
            self.tuner.load_state_dict(torch.load(file, weights_only=True), extend=self._extends)
        # Each of several data sets is evaluated by itself, and one of them has the metric.
        self._has_many = isinstance(trainer.eval_dataset, dict)
        self._losses.clear()
        self._shown.clear()
        self._is_training, self._is_asked = True, False
        self._hear(trainer)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, transformers.EarlyStoppingCallback):
                self._put(callback, "on_evaluate", self._shielded(callback.on_evaluate))

    def _put(self, owner: Any, name: str, function: Any) -> None:
        before = vars(owner).get(name)
        setattr(owner, name, function)
        self._undo.append(lambda: delattr(owner, name) if before is None else setattr(owner, name, before))

    def _hear(self, trainer: Any) -> None:
        """Takes the share of each batch in its step's loss from the Trainer's own step."""
        train = trainer.training_step

        @functools.wraps(train)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = train(*args, **kwargs)
            self._losses.append(loss.detach())
            return loss

        self._put(trainer, "training_step", training_step)

    def _shielded(self, look: Any) -> Any:
        @functools.wraps(look)
        def seen(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return look(args, state, control, **kwargs) if self._is_regular else control

        return seen

    @property
    def _is_regular(self) -> bool:
        """Whether an evaluation is of the training that lives on, at a time of the user's."""
        return not self._is_asked and self.tuner._attached().controller.phase == hosting.TRAIN

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Reports the loss once per optimizer step, and asks for an evaluation when the tuner wants one."""
        with _stopping(control):
            self.tuner.step(torch.stack(self._losses).sum())
        self._losses.clear()
        self._is_asked = False
        strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
        is_due = control.should_evaluate or (strategy == "epoch" and float(state.epoch or 0.5).is_integer())
        if self.tuner.wants_validation and strategy != "no" and not is_due:
            self._is_asked = control.should_evaluate = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What the Trainer evaluates now, it evaluates of itself."""
        self._is_asked = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Reports the monitored metric; evaluations outside of training are none of the tuner's business."""
        if not self._is_training or metrics is None:
            return
        is_regular, name = self._is_regular, self.monitor or _MONITOR
        if name in metrics:
            if doubt := hosting.metric_names.doubt(name, self.tuner.mode):
                self.tuner._tell("direction", doubt)
            with _stopping(control):
                self.tuner.validate(metrics[name])
        elif self.monitor is None:
            self.tuner._tell("unknown metric", hosting.metric_names.none_of(metrics, _HOW))
        elif not self._has_many:
            raise ValueError(
                f"AutoTuneCallback(monitor={self.monitor!r}) is none of the evaluation metrics; there are "
                f"{', '.join(sorted(metrics))}. Name one of these."
            )
        self._hide(args, metrics, is_regular=is_regular)

    def _hide(self, args: TrainingArguments, metrics: dict[str, float], *, is_regular: bool) -> None:
        """Hands on what was seen last of the training that lives on: the Trainer chooses its best model by it."""
        name = args.metric_for_best_model
        if name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name in metrics and is_regular:
            self._shown[name] = metrics[name]
        elif name in metrics:
            metrics[name] = self._shown.get(name, -math.inf if args.greater_is_better else math.inf)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the tuner's state to the checkpoint."""
        folder = _folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.tuner.state_dict(), folder / _FILE)
            self._has_saved = True
            self.tuner._write_history(args.output_dir)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends before the budget does in the best state so far; the Trainer's best model is left alone."""
        self._leave()
        self._is_training = False
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self.tuner._close()
        else:
            self.tuner.finish()
        if self._has_saved:
            self.tuner._write_history(args.output_dir)

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()


@contextlib.contextmanager
def _stopping(control: TrainerControl) -> Iterator[None]:
    """Where a callback of the tuner's asks for the end, the Trainer stops."""
    try:
        yield
    except atn.StopTraining as asked:
        _LOGGER.info("AutoTuneNet: stopped by a callback%s", f": {asked}" if str(asked) else "")
        control.should_training_stop = True


def _log(trainer: Any, values: dict[str, float]) -> None:
    # To log is to have done what was due; this comes besides.
    is_due = trainer.control.should_log
    trainer.log(values)
    trainer.control.should_log = is_due


def _caller(callback: AutoTuneCallback) -> tuple[Any, Any]:
    """The Trainer that calls its callbacks, and the checkpoint it resumes from: it does not hand itself to them."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers.Trainer) and callback in owner.callback_handler.callbacks:
            return owner, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise RuntimeError(
        "AutoTuneCallback works inside transformers.Trainer.train(), and something else called it. In a loop of your "
        "own, use tuner.attach and tuner.step."
    )


def _folder(args: TrainingArguments, state: TrainerState) -> pathlib.Path:
    return pathlib.Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
