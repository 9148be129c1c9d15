"""Models whose tensors are shared out among processes: each copies, watches and saves the part that it holds."""

from typing import Any

import torch
from torch import nn


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if is_shared_out(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_shared_out(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    return type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "to_local")


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is shared out."""
    return any(map(is_shared_out, model.parameters()))


def assembled(saved: Any, like: torch.Tensor) -> Any:
    """State of a parameter, with what is as large as this process's part of it in the place of that part again."""
    if not is_shared_out(like):
        return saved
    own: Any = like
    shape = part(like).shape
    if isinstance(saved, dict):
        return {name: assembled(value, like) for name, value in saved.items()}
    if not isinstance(saved, torch.Tensor) or not saved.ndim or saved.shape != shape:
        return saved
    placed = {"shape": own.shape, "stride": own.stride(), "run_check": False}
    return type(own.data).from_local(saved, own.device_mesh, own.placements, **placed)


def collect(model: nn.Module) -> None:
    """Leaves every parameter in its shared-out form, which a forward pass may have left."""
    for module in model.modules():
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def check(model: nn.Module) -> None:
    """Refuses ways of sharing a model out whose parts cannot be copied one by one.

    Raises:
      ValueError: There is one.
    """
    for path, module in model.named_modules():
        if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise ValueError(
                f"{path or 'the model'} is a {type(module).__name__}, which keeps parameters in a form of its own that "
                "forks and rollbacks cannot put back. Shard the model with torch.distributed.fsdp.fully_shard, or "
                "replicate it with DistributedDataParallel."
            )
