"""Trees of many small arrays in a few large ones: a compiled function pays for each array it takes and returns."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Packed(NamedTuple):
    """The leaves of a tree by dtype, flattened and one after the other; keys keep their shape.

    Attributes:
      floats: The float32 ones.
      ints: The int32 ones.
      bools: The booleans.
      keys: Typed PRNG keys.
    """

    floats: Float[Array, "floats"]
    ints: Int[Array, "ints"]
    bools: Bool[Array, "bools"]
    keys: tuple[PRNGKeyArray, ...]


_DTYPES = {"floats": jnp.float32, "ints": jnp.int32, "bools": jnp.bool_}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """What a packed tree was; static and hashable.

    Attributes:
      structure: The tree's.
      places: Field of `Packed`, and shape, of each leaf.
    """

    structure: Any
    places: tuple[tuple[str, tuple[int, ...]], ...]


def _field(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "keys"
    for name, dtype in _DTYPES.items():
        if leaf.dtype == dtype:
            return name
    raise TypeError(f"only float32, int32, booleans and keys are packed; got {leaf.dtype}.")


def layout(tree: Any) -> Layout:
    """The layout of a tree of arrays, which may be abstract.

    Raises:
      TypeError: A leaf of another dtype than `Packed` has.
    """
    leaves, structure = jax.tree.flatten(tree)
    return Layout(structure, tuple((_field(leaf), tuple(leaf.shape)) for leaf in leaves))


@jax.jit
def pack(tree: Any) -> Packed:
    """Puts the leaves of a tree one after the other. Cost: one pass over them."""
    parts: dict[str, list[Any]] = {name: [] for name in Packed._fields}
    for leaf in jax.tree.leaves(tree):
        name = _field(leaf)
        parts[name].append(leaf if name == "keys" else jax.lax.reshape(leaf, (leaf.size,)))
    joined = {
        name: jax.lax.concatenate(parts[name], 0) if parts[name] else jnp.zeros((0,), dtype)
        for name, dtype in _DTYPES.items()
    }
    return Packed(**joined, keys=tuple(parts["keys"]))


@functools.partial(jax.jit, static_argnums=1)
def unpack(packed: Packed, layout: Layout) -> Any:
    """The tree again; leading axes of a batch, as ``jax.vmap`` makes them, go to every leaf."""
    return _unpacked(packed, layout)


@functools.lru_cache(maxsize=64)
def positions(layout: Layout) -> Any:
    """The tree with, in the place of each leaf, the positions of its entries in their vector; keys by number."""
    counts = dict.fromkeys(Packed._fields, 0)
    for name, shape in layout.places:
        counts[name] += 1 if name == "keys" else math.prod(shape)
    numbered: dict[str, Any] = {name: np.arange(counts[name]) for name in _DTYPES}
    numbered["keys"] = tuple(range(counts["keys"]))
    return _unpacked(Packed(**numbered), layout)


def _unpacked(packed: Any, layout: Layout) -> Any:
    ends = dict.fromkeys(Packed._fields, 0)
    leaves = []
    for name, shape in layout.places:
        begin = ends[name]
        if name == "keys":
            ends[name] += 1
            leaves.append(packed.keys[begin])
            continue
        vector = getattr(packed, name)
        ends[name] += math.prod(shape)
        # Indexing by JAX's own notation takes longer to trace.
        is_numpy = isinstance(vector, np.ndarray)
        part = vector[begin : ends[name]] if is_numpy else jax.lax.slice_in_dim(vector, begin, ends[name], axis=-1)
        leaves.append(part.reshape((*vector.shape[:-1], *shape)))
    return jax.tree.unflatten(layout.structure, leaves)
