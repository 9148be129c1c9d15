"""Real copies of nested values, both ways."""

import copy
from typing import Any

import torch

from . import sharding


def clone(value: Any, device: Any = None) -> Any:
    """A copy that shares no memory, of tensors in dictionaries, lists and tuples, and of plain data.

    Of a tensor that several processes share out it is this one's part.
    """
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return value
        value = sharding.part(value)
        # Step counts and the like stay where they are: optimizers are particular about their place.
        target = device if device is not None and value.ndim else value.device
        return value.detach().to(device=target, copy=True)
    if type(value) is dict:
        return {key: clone(inner, device) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(clone(inner, device) for inner in value)
    return copy.deepcopy(value)


def takes(live: Any, saved: torch.Tensor) -> bool:
    """Whether a live tensor can be written into: of the same kind, and with memory of its own for every number."""
    if not (isinstance(live, torch.Tensor) and live.shape == saved.shape and live.dtype == saved.dtype):
        return False
    if live.is_meta or live.is_inference() or not live.layout == saved.layout == torch.strided:
        return False
    return not any(size > 1 and stride == 0 for size, stride in zip(live.shape, live.stride(), strict=True))


def write_back(live: Any, saved: Any, device: Any = None) -> Any:
    """The saved value, written into the live tensors where there are any of the same kind."""
    if isinstance(saved, torch.Tensor):
        if saved.is_meta:
            return saved
        held = sharding.part(live.detach()) if isinstance(live, torch.Tensor) else live
        if takes(held, saved):
            held.copy_(saved)
            return live
        return saved.to(device=device if device is not None and saved.ndim else saved.device, copy=True)
    if type(saved) is dict:
        known = live if isinstance(live, dict) else {}
        return {key: write_back(known.get(key), inner, device) for key, inner in saved.items()}
    if type(saved) in (list, tuple):
        is_alike = type(live) is type(saved) and len(live) == len(saved)
        pairs = zip(live if is_alike else [None] * len(saved), saved, strict=True)
        return type(saved)(write_back(old, inner, device) for old, inner in pairs)
    return copy.deepcopy(saved)
