"""What users hand over, looked at or unwrapped."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

import autotunenet_jax as atn


def slow_names(space: atn.SearchSpace) -> list[str]:
    """The hyperparameters that only long forks, compared on validation data, can tell apart."""
    return [name for name, role in zip(space.names, space.roles, strict=True) if role == "slow"]


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
      ValueError: Some is not, which would end the training whenever the tuner came to try it.
    """
    for name in space.names:
        param = space[name]
        leaf = name.rpartition("/")[2]
        values = param.options if isinstance(param, atn.Choice) else (param.lo, param.hi)
        if name in setters or leaf not in _LIMITS or not all(isinstance(value, float | int) for value in values):
            continue
        low, high = _LIMITS[leaf]
        if min(values) < low or max(values) > high:
            allowed = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
            raise ValueError(
                f"param_space lets {name!r} go from {min(values):g} to {max(values):g}, and it must be {allowed}."
            )
        if leaf == "batch_size" and (isinstance(param, atn.Float) or any(value != int(value) for value in values)):
            raise ValueError(
                f"batch_size must be whole numbers; got {param!r}. Give a list of sizes, or a pair of integers."
            )


def check_belongs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Whether going back with the model takes back all that the optimizer trains.

    Raises:
      ValueError: The optimizer trains tensors that the model does not have.
    """
    own = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = sum(id(parameter) not in own for parameter in trained)
    if strange:
        raise ValueError(
            f"{strange} of the {len(trained)} parameters of the optimizer are not parameters of the model, so a fork "
            "or a rollback could not put them back. Make the optimizer from model.parameters() once the model is in "
            "its final form, or attach one module that holds everything that is trained, such as an nn.ModuleList."
        )


def live_scaler(scaler: Any) -> Any:
    """The gradient scaler; None in place of one that is switched off and has no state."""
    return scaler if scaler is not None and scaler.is_enabled() else None


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrappers of other libraries.

    Raises:
      TypeError: There is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}.")
    return optimizer
