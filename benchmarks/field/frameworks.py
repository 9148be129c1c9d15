"""Small runs inside Lightning and transformers, and child processes."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autotunenet_torch as att

from . import tasks, torch_tasks

ROOT = pathlib.Path(__file__).resolve().parents[2]


def python(code: str, *arguments: str, limit_s: float = 150.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "JAX_TRACEBACK_FILTERING": "off", **environment},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


@dataclasses.dataclass
class Framed:
    """How a run inside a framework ended: its module or model, tuner, trainer, warnings, and the rates in force."""

    model: Any
    tuner: Any
    trainer: Any
    said: list[str]
    rates: list[float]

    @property
    def loss(self) -> float:
        """On test data."""
        return torch_tasks.loss_on(getattr(self.model, "net", self.model), 2)


@contextlib.contextmanager
def _quiet(said: list[str]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said.extend(str(w.message) for w in caught)


# Lightning.


def lightning_module(
    *,
    start: float = tasks.START,
    net: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
    step: Callable[[Any, Any], Any] | None = None,
    manual: bool = False,
    optimizer: Callable[[Any], Any] | None = None,
) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch_tasks.new_model() if net is None else net
            self.automatic_optimization = not manual
            self.rates: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            if step is not None:
                return step(self, batch)
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            made = optimizer(self) if optimizer else torch.optim.Adam(self.parameters(), start)
            if scheduler is None:
                return made
            return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler(made), "interval": "step"}}

    return Module()


def loaders(samples: int = 960) -> tuple[DataLoader[Any], DataLoader[Any]]:
    x, y = torch_tasks.tensors()[0]
    train = TensorDataset(x[:samples], y[:samples])
    return DataLoader(train, 24, shuffle=True), DataLoader(TensorDataset(*torch_tasks.tensors()[1]), 1000)


def run_lightning(
    folder: str,
    *,
    epochs: int = 10,
    module: Any = None,
    tuner: Any = None,
    callbacks: tuple[Any, ...] = (),
    saves: bool = False,
    resume: str | None = None,
    tuned: bool = True,
    options: dict[str, Any] | None = None,
    samples: int = 960,
    **more: Any,
) -> Framed:
    """A run of 40 steps an epoch."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from autotunenet_torch.lightning import AutoTuneCallback

    said: list[str] = []
    torch.manual_seed(1)
    module = module or lightning_module()
    tuner = tuner or att.AutoTuneNet(torch_tasks.SPACE)
    ours = [AutoTuneCallback(tuner, **(options or {}))] if tuned else []
    keeper = [ModelCheckpoint(dirpath=folder, save_last=True)] if saves else []
    with _quiet(said):
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[*ours, *keeper, *callbacks],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=bool(keeper) or any(isinstance(c, ModelCheckpoint) for c in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            **more,
        )
        trainer.fit(module, *loaders(samples), ckpt_path=resume)
    return Framed(module, tuner, trainer, said, module.rates)


# transformers.


class Labelled(nn.Module):
    """A model as transformers wants it: its own loss, per item of the whole step where it is told how many."""

    def __init__(self, net: nn.Module | None = None):
        super().__init__()
        self.net = torch_tasks.new_model() if net is None else net
        self.config = types.SimpleNamespace(is_encoder_decoder=False, use_cache=False)

    def forward(self, x: Any, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> dict[str, Any]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        if num_items_in_batch is None:
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch, "logits": logits}


class Items(torch.utils.data.Dataset):
    """Rows as dictionaries."""

    def __init__(self, number: int, size: int):
        self.x, self.y = (column[:size] for column in torch_tasks.tensors()[number])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "labels": self.y[index]}


def run_transformers(
    folder: str,
    *,
    max_steps: int = 200,
    model: Any = None,
    tuner: Any = None,
    tuned: bool = True,
    resume: str | None = None,
    samples: int = 960,
    callbacks: tuple[Any, ...] = (),
    trainer_class: Any = None,
    trainer_options: dict[str, Any] | None = None,
    callback_options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Framed:
    """A run with batches of 24, a constant rate after warm-up unless told otherwise."""
    import transformers

    from autotunenet_torch.transformers import AutoTuneCallback

    said, rates = [], []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    torch.manual_seed(1)
    model = Labelled() if model is None else model
    tuner = tuner or att.AutoTuneNet(torch_tasks.SPACE)
    with _quiet(said):
        settings: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": max_steps,
            "per_device_train_batch_size": 24,
            "per_device_eval_batch_size": 1000,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "steps" if "save_steps" in arguments else "no",
            "remove_unused_columns": False,
            "seed": 1,
            **arguments,
        }
        ours = [AutoTuneCallback(tuner, **(callback_options or {}))] if tuned else []
        trainer = (trainer_class or transformers.Trainer)(
            model,
            transformers.TrainingArguments(**settings),
            train_dataset=Items(0, samples),
            eval_dataset=Items(1, 1000),
            callbacks=[*ours, Watch(), *callbacks],
            **(trainer_options or {}),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
    return Framed(model, tuner, trainer, said, rates)
