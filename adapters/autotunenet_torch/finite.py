"""Whether numbers are finite: one fused pass and one transfer to the host where they are."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_norms = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]

# Narrow types are summed in float32: their own norm overflows long before they do.
_NARROW = (torch.float16, torch.bfloat16)


def dense(tensor: torch.Tensor) -> torch.Tensor | None:
    """The floating numbers of a tensor, whatever its layout; None where it has none."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout != torch.strided:
        is_compressed = tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
        tensor = tensor.values() if is_compressed else tensor.to_dense()
    if not tensor.numel():
        return None
    return tensor.float() if tensor.element_size() == 1 else tensor


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in inner:
        yield from leaves(item)


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all floating numbers of some tensors are finite.

    Cost: one fused pass and one synchronisation with each device; a second pass only where the first raises a doubt.
    """
    found = [numbers for numbers in map(dense, tensors) if numbers is not None]
    groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for tensor in found:
        groups[tensor.device, tensor.dtype].append(tensor)
    sums: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    with torch.no_grad():
        for (device, dtype), group in groups.items():
            norms = _norms(group, 2, torch.float32 if dtype in _NARROW else None)
            sums[device].append(torch.stack(norms).sum().double() if device.type != "mps" else torch.stack(norms).sum())
        if all(bool(torch.isfinite(torch.stack(parts).sum())) for parts in sums.values()):
            return True
        # Norms may overflow where the numbers do not.
        return all(bool(torch.isfinite(tensor).all()) for tensor in found)


def count_non_finite(value: Any) -> int:
    """Infinities and NaNs in the tensors of nested dictionaries and lists."""
    found = [numbers for numbers in map(dense, leaves(value)) if numbers is not None]
    return 0 if are_finite(found) else sum(int((~torch.isfinite(tensor)).sum()) for tensor in found)
