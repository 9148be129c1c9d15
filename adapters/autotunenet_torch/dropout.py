"""Dropout whose probability moves, compiled or not."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


class _TensorDropout(_DropoutNd):
    """Dropout that reads its probability from a tensor, so that a compiled model is not compiled anew for each value.

    It takes the place of a module's class; draws differ from those of ``nn.Dropout``, their distribution does not.
    """

    rate: torch.Tensor
    mask_axes: int | None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return inputs
        # Channel dropout draws once per row and channel; an input without a batch axis has channels only.
        axes = inputs.ndim if self.mask_axes is None else max(inputs.ndim - self.mask_axes, 1)
        shape = (*inputs.shape[:axes], *(1 for _ in range(inputs.ndim - axes)))
        keep = torch.rand(shape, device=inputs.device) >= self.rate
        # At a probability of one nothing is kept, and nothing must be divided by zero.
        return torch.where(keep, inputs / (1.0 - self.rate).clamp_min(1e-6).to(inputs.dtype), 0.0)


_MASK_AXES: dict[type, int | None] = {nn.Dropout: None, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def _is_compiled(model: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _take_over(module: Any) -> None:
    """Gives a plain dropout module a probability that compiled code reads as data."""
    if type(module) not in _MASK_AXES:
        return
    weight = torch.tensor(float(module.p))
    module.mask_axes = _MASK_AXES[type(module)]
    module.__class__ = _TensorDropout
    module.register_buffer("rate", weight, persistent=False)


class DropoutTarget:
    """The probability of dropout modules; those of a compiled model are made to read theirs as data."""

    def __init__(self, modules: list[_DropoutNd], model: nn.Module):
        self._modules = modules
        if _is_compiled(model):
            device = next(model.parameters()).device
            for module in modules:
                _take_over(module)
                module.to(device)

    def places(self) -> list[Any]:
        """What it sets, each hashable."""
        return [(id(module), "p") for module in self._modules]

    def read(self) -> float:
        return max(module.p for module in self._modules)

    def write(self, value: float) -> None:
        for module in self._modules:
            if isinstance(module, _TensorDropout):
                module.rate.fill_(value)
            module.p = value
