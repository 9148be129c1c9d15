"""What users hand over, checked or unwrapped before training."""

from __future__ import annotations

import gc
import inspect
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from . import engine

if TYPE_CHECKING:
    import autotunenet_jax as atn


# Least and greatest value that PyTorch has a use for.
_LIMITS = {
    "learning_rate": (0.0, math.inf),
    "lr": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "b1": (0.0, 1.0),
    "b2": (0.0, 1.0),
    "eps": (0.0, math.inf),
    "dropout": (0.0, 1.0),
    "label_smoothing": (0.0, 1.0),
    "batch_size": (1, math.inf),
    "clip_norm": (0.0, math.inf),
}


def check_bounds(space: atn.SearchSpace, setters: Collection[str]) -> None:
    """Whether every value of the space is one that PyTorch takes; those with a setter are the user's affair.

    Raises:
      TypeError: Options that are no numbers, for what is one.
      ValueError: Values out of range.
    """
    for name in space.names:
        param = space[name]
        leaf = name.rpartition("/")[2]
        values = param.options if isinstance(param, engine.atn.Choice) else (param.lo, param.hi)
        if name in setters or leaf not in _LIMITS:
            continue
        if not all(isinstance(value, float | int) for value in values):
            raise TypeError(
                f"param_space: {name!r} is a number; got the options {list(values)!r}. Where they come from YAML, "
                "write 1.0e-3: it reads 1e-3 as text."
            )
        low, high = _LIMITS[leaf]
        if min(values) < low or max(values) > high:
            allowed = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
            raise ValueError(
                f"param_space lets {name!r} go from {min(values):g} to {max(values):g}, and it must be {allowed}."
            )
        if leaf == "batch_size" and (
            isinstance(param, engine.atn.Float) or any(value != int(value) for value in values)
        ):
            raise ValueError(
                f"batch_size takes whole numbers; got {param!r}. Give the sizes, autotunenet_jax.Choice([16, 32, 64]), "
                "or a range of them, autotunenet_jax.Int(16, 128)."
            )


def check_callable(name: str, value: Any, example: str) -> None:
    """Whether what is to make an optimizer or a scheduler can be called.

    Raises:
      TypeError: It cannot.
    """
    if not callable(value):
        raise TypeError(f"{name} must be {example}; got {value!r}.")


def check_device(device: Any) -> None:
    """Whether copies can be kept there.

    Raises:
      ValueError: There is no such device, or it keeps nothing.
    """
    try:
        is_real = device is None or torch.device(device).type != "meta"
    except (RuntimeError, TypeError):
        is_real = False
    if not is_real:
        raise ValueError(f"snapshot_device must name a device of torch, such as 'cpu' or 'cuda:0'; got {device!r}.")


def check_belongs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Whether going back with the model takes back all that the optimizer trains."""
    own = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = sum(id(parameter) not in own for parameter in trained)
    if strange:
        raise ValueError(
            f"{strange} of the {len(trained)} parameters of the optimizer are not parameters of the model, so a fork "
            "or a rollback could not put them back. Make the optimizer from model.parameters() once the model is in "
            "its final form, or attach one module that holds everything that is trained, such as an nn.ModuleList."
        )


def check_places(targets: Mapping[str, Any]) -> None:
    """Whether every hyperparameter has a place of its own."""
    owners: dict[Any, str] = {}
    for name, target in targets.items():
        for place in getattr(target, "places", tuple)():
            other = owners.setdefault(place, name)
            if other != name:
                raise ValueError(
                    f"param_space names {other!r} and {name!r}, and both set the same number. Leave one of them out; "
                    "to tune parts on their own name each part."
                )


def check_schedulers(optimizer: torch.optim.Optimizer, given: Collection[Any]) -> None:
    """Refuses schedulers of an optimizer that were not handed over: they would set rates behind the tuner's back."""
    known = {id(scheduler) for scheduler in given}
    # Those that are made of others keep them under names of their own.
    inner = [value for scheduler in given for value in vars(scheduler).values()]
    known |= {id(value) for value in inner if isinstance(value, lr_scheduler.LRScheduler)}
    strange = [s for s in _schedulers_of(optimizer) if id(s) not in known]
    if strange:
        del strange
        gc.collect()  # of one that nobody has any more
        strange = [s for s in _schedulers_of(optimizer) if id(s) not in known]
    if not strange:
        return
    names = ", ".join(dict.fromkeys(type(scheduler).__name__ for scheduler in strange))
    raise ValueError(
        f"the optimizer has a scheduler that attach was not given: {names}. Its rates and the tuner's would overwrite "
        "each other. Hand it over, attach(model, optimizer, scheduler), or delete it: the tuner has a decay of its own."
    )


def _schedulers_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    kinds = lr_scheduler.LRScheduler
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]
    return [scheduler for scheduler in found if vars(scheduler).get("optimizer") is optimizer]


def live_scaler(scaler: Any) -> Any:
    """The gradient scaler; None in place of one that is switched off and has no state."""
    return scaler if scaler is not None and scaler.is_enabled() else None


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrappers of other libraries."""
    # Optimizers around others are optimizers of their own; wrappers only hand on.
    while not _is_own(optimizer) and isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        hint = ""
        if isinstance(optimizer, Sequence):
            hint = " Put the parameters into groups of one optimizer, and tune 'group_name/learning_rate'."
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}.{hint}")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} never called torch.optim.Optimizer.__init__, so its steps cannot be watched. "
            "Call super().__init__(params, defaults) in it, or attach the optimizer inside it."
        )
    return optimizer


def _is_own(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__module__.partition(".")[0] not in (
        "accelerate",
        "transformers",
        "lightning",
        "pytorch_lightning",
    )


def check_closure(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer whose step needs a closure, in a loop that gives none."""
    needed = [p.name for p in inspect.signature(optimizer.step).parameters.values() if p.default is p.empty]
    if "closure" in needed:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, by a closure that Trainer does not "
            "give. Train it in a loop of your own, with AutoTuneNet.attach and step."
        )


def budget(
    loader: Iterable[Any], *, steps: int | None, epochs: int | None, accumulate: int, planned: int | None
) -> int:
    """Optimizer steps of the whole run: those asked for, or in so many passes over a loader."""
    total = steps
    if total is None:
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            total = planned
        else:
            total = (epochs or 1) * batches // accumulate
            if total < 1:
                raise ValueError(
                    f"the train_loader gives {batches} batches a pass, which makes no optimizer step in {epochs} epochs"
                    f" with accumulate={accumulate}. Check the data set, drop_last and accumulate."
                )
    if total is None:
        raise ValueError(
            "the length of train_loader is unknown, so epochs are no budget. Give Trainer(steps=...) or "
            "AutoTuneNet(total_steps=...): the number of optimizer steps of the whole run."
        )
    if planned is not None and planned != total:
        warnings.warn(
            f"the tuner was given total_steps={planned}, and this training takes {total} optimizer steps: it is "
            f"planned for {total}. Leave total_steps out beside a Trainer, or give Trainer(steps={planned}).",
            stacklevel=3,
        )
    return total


def check_slow(space: atn.SearchSpace) -> None:
    """Refuses a run without validation data of which nothing could be tuned."""
    if all(role == "slow" for role in space.roles):
        raise ValueError(
            f"{', '.join(space.names)} can be tuned on validation data only, and nothing else is in param_space. Give "
            "fit a val_loader: the training loss would always ask for less regularisation."
        )
