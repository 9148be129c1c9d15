"""One number for all processes of a distributed training."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number; 0 when it is alone."""
    return dist.get_rank() if is_distributed() else 0


def to_float(value: Any, *, name: str) -> float:
    """A scalar tensor or number as a float."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(
                f"{name} must be a real scalar; got a tensor of shape {tuple(value.shape)}, {value.dtype}. "
                "Average it over the batch."
            )
        return float(value.detach())
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a number or a scalar tensor; got {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a scalar tensor; got {type(value).__name__}.") from None


def gather(*values: float) -> list[tuple[float, ...]]:
    """The numbers of every process, in the order of their ranks; the same bits on each."""
    if not is_distributed():
        return [values]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(parts, mine)
    except RuntimeError as error:
        raise RuntimeError(
            f"AutoTuneNet on rank {dist.get_rank()} could not gather the losses of all processes. They have to make "
            "the same number of steps: uneven ranks, with or without model.join(), are not supported. Drop the last "
            "batches (a DistributedSampler with drop_last=True), or stop all ranks after the same step."
        ) from error
    return [tuple(row) for row in torch.stack(parts).tolist()]


def mean(value: float) -> float:
    """The mean over all processes, the same bits on each: all gather, then add up in the order of their ranks."""
    if not is_distributed():
        return value
    numbers = [number for (number,) in gather(value)]
    return sum(numbers) / len(numbers)


def everywhere(flag: bool) -> bool:
    """Whether something holds on all processes; to be asked on all of them at once."""
    return flag if not is_distributed() else all(bool(value) for (value,) in gather(flag))
