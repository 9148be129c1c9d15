"""AutoTuneNet inside the Trainer of transformers."""

import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .tuner import AutoTuneNet

_FILE = "autotune.pt"


class AutoTuneCallback(TrainerCallback):
    """Tunes while the Trainer of transformers trains.

    Forks see fresh batches, since the Trainer owns the loop. Its learning-rate scheduler keeps its shape, and the tuner
    moves its height. Where the Trainer evaluates at all, it evaluates each time the tuner wants to compare forks by
    it. Checkpoints get a file with the tuner's state.

    Example:
        >>> tuner = AutoTuneNet({"learning_rate": (1e-6, 1e-3)})
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[AutoTuneCallback(tuner)])  # doctest: +SKIP

    Args:
      tuner: What may be tuned.
      monitor: Name of the evaluation metric, in the direction of the tuner's ``mode``.

    Raises:
      RuntimeError: At the first step, when the model's outputs hold no loss.
    """

    def __init__(self, tuner: AutoTuneNet, *, monitor: str = "eval_loss"):
        self.tuner, self.monitor = tuner, monitor
        self._losses: list[torch.Tensor] = []
        self._hook: Any = None

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
        self.tuner.attach(model, optimizer, lr_scheduler, total_steps=state.max_steps)
        self._losses.clear()
        self._hook = model.register_forward_hook(self._catch)
        if state.global_step:
            file = _file(args, state)
            if file.exists():
                self.tuner.load_state_dict(torch.load(file, weights_only=True))

    def _catch(self, module: Any, inputs: Any, outputs: Any) -> None:
        """The Trainer does not hand the loss to its callbacks: it is caught on its way out of the model."""
        if not (module.training and torch.is_grad_enabled()):
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, tuple) and isinstance(outputs[0], torch.Tensor):
            loss = outputs[0] if outputs[0].numel() == 1 else None
        if loss is not None:
            self._losses.append(loss.detach())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Reports the loss once per optimizer step, and asks for an evaluation when the tuner wants one."""
        if not self._losses:
            raise RuntimeError(
                "the model's outputs held no loss: AutoTuneCallback reads it there. Give the data set labels, so that "
                "the model computes its own loss."
            )
        self.tuner.step(torch.stack(self._losses).mean())
        self._losses.clear()
        if self.tuner.wants_validation and str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
            control.should_evaluate = True
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Reports the monitored metric; evaluations outside of training are none of the tuner's business."""
        if self._hook is not None and metrics is not None and self.monitor in metrics:
            self.tuner.validate(metrics[self.monitor])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the tuner's state to the checkpoint."""
        file = _file(args, state)
        if state.is_world_process_zero and file.parent.is_dir():
            torch.save(self.tuner.state_dict(), file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends inside a round of forks with the best state so far."""
        self.tuner.finish()
        self._hook.remove()
        self._hook = None


def _file(args: TrainingArguments, state: TrainerState) -> pathlib.Path:
    return pathlib.Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FILE
