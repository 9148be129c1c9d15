"""One number for all processes of a distributed training, also where some have run out of data."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


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


def mean(value: float, *, counts: bool = True) -> float:
    """The mean over all processes, the same bits on each: all gather, then add up in the order of their ranks.

    Args:
      value: Of this process.
      counts: Whether it has one; a process without takes part in the exchange all the same.
    """
    if not is_distributed():
        return value
    numbers = [number for number, is_one in gather(value, counts) if is_one]
    return sum(numbers) / len(numbers)


def everywhere(flag: bool) -> bool:
    """Whether something holds on all processes; to be asked on all of them at once."""
    return flag if not is_distributed() else all(bool(value) for (value,) in gather(flag))


def check_alike(description: str, *, total_steps: int | None) -> None:
    """Refuses a run in which processes tune different things, or for different numbers of steps.

    Raises:
      ValueError: They do.
    """
    told = gather(float(total_steps or 0), float(zlib.crc32(description.encode())))
    if len(set(told)) > 1:
        steps = ", ".join(f"{int(total)} on rank {number}" for number, (total, _) in enumerate(told))
        raise ValueError(
            "every process has to attach a tuner with the same arguments, at the same values, and for the same "
            f"total_steps, since all decide alike; got total_steps {steps}. Where loaders differ in length, give all "
            "ranks the largest number of steps and train inside `with model.join():`."
        )


class _Joined:
    """What a process whose data have ended does for the others: DDP's part of a step, then the tuner's."""

    def __init__(self, model: DistributedDataParallel, own: Any, shadow: Callable[[], None]):
        self._model, self._own, self._shadow = model, own, shadow

    def main_hook(self) -> None:
        self._own.main_hook()
        # It is no optimizer step yet where gradients are being accumulated.
        if self._model.require_forward_param_sync:
            self._shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._own.post_hook(is_last_joiner)


def follow_joins(model: Any, shadow: Callable[[], None]) -> Callable[[], None]:
    """Lets a process whose data end before the others' take part in what the tuner exchanges.

    Args:
      model: What ``join`` is called on; other models than DistributedDataParallel are left alone.
      shadow: Does what a step of the tuner exchanges.

    Returns:
      What puts the model back.
    """
    if not (is_distributed() and isinstance(model, DistributedDataParallel)):
        return lambda: None

    def join_hook(**kwargs: Any) -> _Joined:
        return _Joined(model, type(model).join_hook(model, **kwargs), shadow)

    vars(model)["join_hook"] = join_hook
    return lambda: vars(model).pop("join_hook", None)
