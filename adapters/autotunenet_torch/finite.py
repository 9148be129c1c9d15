"""Whether numbers are finite: one fused pass and one transfer to the host where they are."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from . import sharding

_norms = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
_look = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
_ONE = torch.ones(())

# What numbers are summed in, if not in their own type: the norm of narrow ones overflows long before they do.
_SUMMED_IN = {
    **dict.fromkeys((torch.float32, torch.float64, torch.complex64, torch.complex128, torch.complex32)),
    **dict.fromkeys((torch.float16, torch.bfloat16), torch.float32),
}


def dense(tensor: torch.Tensor) -> torch.Tensor | None:
    """The floating numbers of a tensor, whatever its layout; None where it has none."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.layout != torch.strided:
        tensor = _stored(tensor.detach())
    if not tensor.numel():
        return None
    return tensor.float() if tensor.element_size() == 1 else tensor


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor that is not strided holds."""
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    is_compressed = tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return tensor.values() if is_compressed else tensor.to_dense()


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in inner:
        yield from leaves(item)


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all floating numbers of some tensors are finite; of shared-out ones, those that this process holds.

    Cost: one fused pass and one synchronisation with each device; a second pass only where the first raises a doubt.
    """
    with torch.no_grad():
        groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            tensor = sharding.part(tensor)
            is_plain = tensor.dtype in _SUMMED_IN and tensor.layout is torch.strided
            numbers = tensor if is_plain else dense(tensor)
            if numbers is not None:
                groups[numbers.device, numbers.dtype].append(numbers)
        norms: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        for (device, dtype), group in groups.items():
            if device.type != "meta":
                norms[device] += _norms(group, 2, _SUMMED_IN[dtype])
        # Norms may overflow where the numbers do not.
        return all(_all_finite(*part) for part in norms.items()) or all(map(_is_finite, chain(*groups.values())))


def gradients_are_finite(grads: list[torch.Tensor]) -> bool:
    """`are_finite`, at a third of its cost where the gradients are plain ones on the CPU.

    The operation is the one of gradient scalers. It multiplies what it looks at, here by one.
    """
    if not all(map(_is_simple, grads)):
        return are_finite(grads)
    found = torch.zeros(())
    _look(grads, found, _ONE)
    return not found.item()


def _is_simple(tensor: torch.Tensor) -> bool:
    is_ordinary = tensor.is_cpu and tensor.dtype is torch.float32 and tensor.layout is torch.strided
    is_ordinary = is_ordinary and tensor.is_contiguous() and not sharding.is_shared_out(tensor)
    # A gradient with a graph of its own may be needed as it is.
    return is_ordinary and not (tensor.requires_grad or tensor.is_inference())


def _all_finite(device: torch.device, norms: list[torch.Tensor]) -> bool:
    if device.type == "cpu":
        # There is nothing to wait for, and each further operation takes longer than to read a number.
        return all(math.isfinite(norm.item()) for norm in norms)
    kinds = {norm.dtype for norm in norms}
    wide = norms if len(kinds) == 1 else [norm.float() for norm in norms]
    return bool(torch.isfinite(torch.stack(wide).sum()))


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or bool(torch.isfinite(tensor).all())


def count_non_finite(value: Any) -> int:
    """Infinities and NaNs in the tensors of nested dictionaries and lists; of shared-out ones, in the part held."""
    found = [numbers for numbers in map(dense, map(sharding.part, leaves(value))) if numbers is not None]
    return 0 if are_finite(found) else sum(int((~torch.isfinite(tensor)).sum()) for tensor in found)
