"""Trees of many arrays in a few vectors: a compiled function pays for each array it takes and returns.

Measured on jax 0.10.2, CPU (``benchmarks.overhead``): a wrapped step of some 10 ms takes 11 to 14 % more processor
time than the plain one, and 15 to 20 % more without packing. Switched off by ``AUTOTUNENET_COMPILER_OFF=packing``; a
state goes on only as it was packed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .single_kernel import unknown
from .switches import is_on

# What vectors hold. Typed keys keep their shape, and so does what has fewer than eight bits or needs care of its own.
PLAIN = frozenset({"bool", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"}) | frozenset(
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
)
# Positions in a vector are 32-bit numbers.
_LONGEST = 2**30


class Packed(NamedTuple):
    """The leaves of a tree, flattened and one after the other.

    Attributes:
      vectors: By the name of their dtype, numbered where one would be too long.
      apart: Leaves that are not packed, as they are.
    """

    vectors: dict[str, Array]
    apart: tuple[Array, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """What a packed tree was; static and hashable.

    Attributes:
      structure: The tree's.
      places: Of each leaf the vector, or none, the first of its positions there (or its number among those that are not
        packed), and its shape.
    """

    structure: Any
    places: tuple[tuple[str | None, int, tuple[int, ...]], ...]


def layout(tree: Any) -> Layout:
    """The layout of a tree of arrays, which may be abstract."""
    leaves, structure = jax.tree.flatten(tree)
    sizes: dict[str, int] = {}
    numbers: dict[str, int] = {}
    places, is_packing = [], is_on("packing")
    for leaf in leaves:
        name, size = leaf.dtype.name, math.prod(leaf.shape)
        if name not in PLAIN or size > _LONGEST or not is_packing:
            places.append((None, sum(place[0] is None for place in places), tuple(leaf.shape)))
            continue
        number = numbers.setdefault(name, 0)
        if sizes.get(f"{name}.{number}", 0) + size > _LONGEST:
            number = numbers[name] = number + 1
        vector = f"{name}.{number}"
        places.append((vector, sizes.get(vector, 0), tuple(leaf.shape)))
        sizes[vector] = sizes.get(vector, 0) + size
    return Layout(structure, tuple(places))


@jax.jit
def pack(tree: Any) -> Packed:
    """Puts the leaves of a tree into vectors. Cost: one pass over them."""
    parts: dict[str, list[Any]] = {}
    apart = []
    for leaf, (name, _, _) in zip(jax.tree.leaves(tree), layout(tree).places, strict=True):
        if name is None:
            apart.append(leaf)
        else:
            parts.setdefault(name, []).append(jax.lax.reshape(leaf, (leaf.size,)))
    return Packed({name: _joined(part) for name, part in parts.items()}, tuple(apart))


def _joined(parts: list[Any]) -> Array:
    # An array by itself would come back as it is, and be lost with the vector when that is donated.
    return jax.lax.concatenate(parts, 0) if len(parts) > 1 else jnp.array(parts[0], copy=True)


def overwritten(packed: Packed, tree: Any, layout: Layout, row: Array) -> Packed:
    """Puts a tree into one row of arrays that hold several, in place where those are not used any more."""
    vectors, apart = dict(packed.vectors), []
    others, begins = iter(packed.apart), _begins(layout, row)
    for leaf, (name, _, _), begin in zip(jax.tree.leaves(tree), layout.places, begins, strict=True):
        if name is None:
            apart.append(jax.lax.dynamic_update_index_in_dim(next(others), leaf, row, 0))
        else:
            part = jax.lax.reshape(leaf, (1, leaf.size))
            vectors[name] = jax.lax.dynamic_update_slice(vectors[name], part, (row, begin))
    return Packed(vectors, tuple(apart))


def _begins(layout: Layout, row: Array) -> list[Any]:
    return unknown([begin for _, begin, _ in layout.places], jnp.minimum(row, 0))


def row(packed: Packed, layout: Layout, number: int) -> Packed:
    """One row of several; leading axes of a batch stay."""
    shapes = iter([shape for name, _, shape in layout.places if name is None])
    return Packed(
        {name: vector[..., number, :] for name, vector in packed.vectors.items()},
        tuple(jax.lax.index_in_dim(leaf, number, leaf.ndim - len(next(shapes)) - 1, False) for leaf in packed.apart),
    )


def row_reader(packed: Packed, layout: Layout, number: Array) -> Callable[..., Array]:
    """Reads single leaves of a row that is not known until the program runs.

    Returns:
      A function of a leaf's number and, optionally, an int32 scalar that is zero: where that follows from a leaf read
      before, a compiler cannot make room for both at once.
    """
    begins = _begins(layout, number)

    def read(leaf: int, zero: Array | None = None) -> Array:
        name, place, shape = layout.places[leaf]
        row = number if zero is None else number + zero
        if name is None:
            return jax.lax.dynamic_index_in_dim(packed.apart[place], row, 0, False)
        part = jax.lax.dynamic_slice(packed.vectors[name], (row, begins[leaf]), (1, math.prod(shape)))
        return jax.lax.reshape(part, shape)

    return read


def unpack_row(packed: Packed, layout: Layout, number: Array) -> Any:
    """The tree in a row that is not known until the program runs."""
    read = row_reader(packed, layout, number)
    return jax.tree.unflatten(layout.structure, [read(leaf) for leaf in range(len(layout.places))])


@functools.partial(jax.jit, static_argnums=1)
def unpack(packed: Packed, layout: Layout) -> Any:
    """The tree again; leading axes of a batch, as ``jax.vmap`` makes them, go to every leaf."""
    apart = iter(packed.apart)
    sizes: dict[str, list[int]] = {name: [] for name in packed.vectors}
    for name, _, shape in layout.places:
        if name is not None:
            sizes[name].append(math.prod(shape))
    # One operation each: indexing leaf by leaf takes longer to trace.
    parts = {name: iter(jax.lax.split(vector, sizes[name], vector.ndim - 1)) for name, vector in packed.vectors.items()}
    leaves = []
    for name, _, shape in layout.places:
        if name is None:
            leaves.append(next(apart))
            continue
        part = next(parts[name])
        leaves.append(jax.lax.reshape(part, (*part.shape[:-1], *shape)))
    return jax.tree.unflatten(layout.structure, leaves)


def batch_ndim(packed: Packed, layout: Layout) -> int:
    """How many axes every array has in front of its own: those of a stack of packed trees, as ``jax.vmap`` gives."""
    if packed.vectors:
        return next(iter(packed.vectors.values())).ndim - 1
    shapes = [shape for name, _, shape in layout.places if name is None]
    return packed.apart[0].ndim - len(shapes[0]) if packed.apart else 0


@functools.lru_cache(maxsize=64)
def positions(layout: Layout) -> Any:
    """The tree with, in the place of each leaf, its vector and its first position there."""
    return jax.tree.unflatten(layout.structure, [place[:2] for place in layout.places])


def wait(packed: Packed) -> None:
    """Waits for the device to be done with them; not under transformations."""
    arrays = jax.tree.leaves(packed)
    if not any(isinstance(array, Tracer) for array in arrays):
        jax.block_until_ready(arrays)


def read_number(packed: Packed, position: tuple[str | None, int]) -> Any:
    """The number at a position, on the host; None while the device still works on it, and under transformations."""
    name, begin = position
    array: Any = packed.apart[begin] if name is None else packed.vectors[name]
    is_batched = np.ndim(array) > (0 if name is None else 1)
    if isinstance(array, Tracer) or is_batched or (hasattr(array, "is_ready") and not array.is_ready()):
        return None
    return np.asarray(array).reshape(-1)[0 if name is None else begin]
