"""A number in an optimizer's parameter group, read and written; `GroupTarget` and `RateTarget` say which."""

from typing import Any

import torch


def read(group: dict[str, Any], key: str, position: int | None = None) -> float:
    """A number of a group.

    Args:
      group: One of the optimizer's ``param_groups``.
      key: Of the dictionary.
      position: Index within the value, for betas.
    """
    value = group[key]
    return float(value if position is None else value[position])


def write(group: dict[str, Any], key: str, value: float, position: int | None = None) -> None:
    """Sets a number of a group; a tensor is filled in place, so that compiled steps see it. Arguments as for `read`."""
    held = group[key] if position is None else group[key][position]
    if isinstance(held, torch.Tensor):
        held.fill_(value)
    elif position is None:
        group[key] = value
    else:
        group[key] = tuple(value if index == position else other for index, other in enumerate(group[key]))
