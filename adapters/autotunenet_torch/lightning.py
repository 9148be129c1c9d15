"""AutoTuneNet inside Lightning's Trainer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from .tuner import AutoTuneNet


class AutoTuneCallback(pl.Callback):
    """Tunes while Lightning trains.

    Forks see fresh batches, since Lightning owns the loop. Its checkpoints hold the tuner's state, and a resumed
    training goes on from it.

    Example:
        >>> tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1)})
        >>> trainer = pl.Trainer(max_epochs=5, callbacks=[AutoTuneCallback(tuner)])  # doctest: +SKIP

    Args:
      tuner: What may be tuned.
      monitor: Name of the logged validation metric that is reported at the end of each validation; only recorded where
        ``validate`` gives the metric to decide by.
      validate: ``module -> metric`` of the present state, called when the tuner wants to compare forks by it. Without
        it forks are compared by their training losses, and slow hyperparameters stay put.
      total_steps: Optimizer steps of the run; by default what Lightning expects.

    Raises:
      ValueError: When training starts: more than one optimizer, or something the tuner refuses.
    """

    def __init__(
        self,
        tuner: AutoTuneNet,
        *,
        monitor: str = "val_loss",
        validate: Callable[[pl.LightningModule], Any] | None = None,
        total_steps: int | None = None,
    ):
        self.tuner, self.monitor = tuner, monitor
        self._validate, self._total_steps = validate, total_steps
        self._pending: Mapping[str, Any] | None = None
        self._losses: list[torch.Tensor] = []
        self._steps = 0
        self._is_attached = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attaches, after Lightning has put a checkpoint back if there is one."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"AutoTuneCallback tunes one optimizer; configure_optimizers gave {len(trainer.optimizers)}. "
                "Put the parameters into groups of one optimizer, and tune 'group_name/learning_rate'."
            )
        expected = trainer.estimated_stepping_batches
        total = self._total_steps or (int(expected) if math.isfinite(expected) else None)
        validate = self._validate
        self.tuner.attach(
            pl_module,
            trainer.optimizers[0],
            [config.scheduler for config in trainer.lr_scheduler_configs],
            getattr(trainer.precision_plugin, "scaler", None),
            total_steps=total,
            validate=None if validate is None else lambda: validate(pl_module),
        )
        self._is_attached = True
        self._steps = trainer.global_step
        if self._pending is not None:
            self.tuner.load_state_dict(self._pending)
            self._pending = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports the loss once per optimizer step: the mean over the batches accumulated into it."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self._losses.append(loss.detach())
        if trainer.global_step == self._steps or not self._losses:
            return
        self._steps = trainer.global_step
        self.tuner.step(torch.stack(self._losses).mean())
        self._losses.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the monitored metric, but not that of the sanity check."""
        if trainer.sanity_checking or not self._is_attached:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        if self._validate is None:
            self.tuner.validate(value)
        else:
            self.tuner._note_metric(value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends inside a round of forks with the best state so far."""
        self.tuner.finish()

    def state_dict(self) -> dict[str, Any]:
        """The tuner's state, for Lightning's checkpoint."""
        return self.tuner.state_dict() if self._is_attached else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the tuner's state until training starts."""
        self._pending = state_dict or None
