"""What users hand over, looked at or unwrapped."""

from typing import Any

import torch

import autotunenet_jax as atn


def slow_names(space: atn.SearchSpace) -> list[str]:
    """The hyperparameters that only long forks, compared on validation data, can tell apart."""
    return [name for name, role in zip(space.names, space.roles, strict=True) if role == "slow"]


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
