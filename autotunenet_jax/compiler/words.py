"""Small arrays as one vector of 32-bit words, and back: what a compiled function takes and returns costs by the array.

Bits are kept; a boolean takes a word. `packing` is for what is larger, of any dtype, and read in part.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

DTYPES = tuple(jnp.dtype(name) for name in ("float32", "int32", "uint32", "bool"))
"""What words hold."""


def pack(tree: Any) -> Int[Array, "words"]:
    """The leaves of a tree, one after the other. Neighbours of one dtype are converted together, in one kernel."""
    parts = []
    for dtype, leaves in itertools.groupby(map(jnp.asarray, jax.tree.leaves(tree)), lambda leaf: leaf.dtype):
        vector = jax.lax.concatenate([jax.lax.reshape(leaf, (leaf.size,)) for leaf in leaves], 0)
        is_bool = dtype == jnp.bool_
        parts.append(vector.astype(jnp.int32) if is_bool else jax.lax.bitcast_convert_type(vector, jnp.int32))
    return jax.lax.concatenate(parts, 0)


def unpack(words: Int[Array, "words"], like: Any) -> Any:
    """The tree again; ``like`` has its shapes and dtypes."""
    kinds, structure = jax.tree.flatten(like)
    runs = [(dtype, list(run)) for dtype, run in itertools.groupby(kinds, lambda kind: kind.dtype)]
    arrays = []
    vectors = jax.lax.split(words, [sum(kind.size for kind in run) for _, run in runs])
    for (dtype, run), vector in zip(runs, vectors, strict=True):
        vector = vector != 0 if dtype == jnp.bool_ else jax.lax.bitcast_convert_type(vector, dtype)
        pieces = jax.lax.split(vector, [kind.size for kind in run])
        arrays += [jax.lax.reshape(piece, kind.shape) for piece, kind in zip(pieces, run, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def size(like: Any) -> int:
    """How many words a tree takes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))


def positions(like: Any) -> Any:
    """Of each leaf the number of its first word, as a tree."""
    leaves, structure = jax.tree.flatten(like)
    ends = itertools.accumulate(math.prod(leaf.shape) for leaf in leaves)
    return jax.tree.unflatten(structure, [0, *ends][: len(leaves)])


def read(words: np.ndarray, like: Any) -> Any:
    """The tree again, as NumPy arrays; rows of a table stay rows. Booleans come as numbers. Host only."""
    record = _record(like)
    columns = np.ascontiguousarray(words).view(record)[..., 0]
    return jax.tree.unflatten(jax.tree.structure(like), [columns[name] for name in record.names or ()])


def row_reader(like: Any) -> Callable[[np.ndarray], Any]:
    """A function that reads one row again and again, scalars as Python numbers. Host only; some microseconds."""
    record, structure = _record(like), jax.tree.structure(like)
    return lambda row: structure.unflatten(row.view(record)[0].item())


def _record(like: Any) -> np.dtype:
    leaves = enumerate(jax.tree.leaves(like))
    return np.dtype([(str(at), "int32" if leaf.dtype == bool else leaf.dtype, leaf.shape) for at, leaf in leaves])
