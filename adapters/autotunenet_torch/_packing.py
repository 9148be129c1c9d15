"""A tuner's state as two flat vectors: a compiled function pays for each array it takes and returns.

The state has some ninety small leaves. Those that a training step reads or writes, a fifth of all numbers, lie in one
vector, and the rest in another that steps do not touch.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def touched(function: Callable[..., Any], tree: Any, *arguments: Any) -> frozenset[int]:
    """Which leaves of ``tree`` matter to ``function(tree, *arguments)``, whose first result is the next such tree.

    The others come back in their own place as they were, and nothing is computed from them.
    """
    traced = jax.make_jaxpr(function)(tree, *arguments).jaxpr
    count = len(jax.tree.leaves(tree))
    inputs, outputs = traced.invars[:count], traced.outvars
    used = {id(variable) for equation in traced.eqns for variable in equation.invars}
    used |= {id(variable) for variable in outputs[count:]}
    kept = [id(before) == id(after) for before, after in zip(inputs, outputs[:count], strict=True)]
    return frozenset(i for i in range(count) if not kept[i] or id(inputs[i]) in used)


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _to_words(leaf: jax.Array) -> jax.Array:
    """The bits of a leaf, as a vector of int32; booleans as 0 and 1."""
    if _is_key(leaf.dtype):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.int32).ravel()
    return jax.lax.bitcast_convert_type(leaf, jnp.int32).ravel()


@dataclasses.dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]
    dtype: Any
    words: tuple[int, ...]

    @classmethod
    def of(cls, leaf: Any) -> "_Leaf":
        shape = jax.eval_shape(jax.random.key_data, leaf).shape if _is_key(leaf.dtype) else leaf.shape
        return cls(leaf.shape, leaf.dtype, shape)

    @property
    def size(self) -> int:
        return math.prod(self.words)

    def read(self, words: jax.Array) -> jax.Array:
        words = words.reshape(self.words)
        if _is_key(self.dtype):
            return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(words, jnp.uint32))
        return words != 0 if self.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(words, self.dtype)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a pytree of leaves of 32 bits, booleans and keys becomes two int32 vectors, and back.

    Args:
      treedef: The tree's.
      leaves: Its leaves.
      live: Indices of those that go into the first vector.
    """

    treedef: Any
    leaves: tuple[_Leaf, ...]
    live: frozenset[int]

    @classmethod
    def of(cls, tree: Any, *, live: frozenset[int]) -> "Packing":
        """The packing of a tree of arrays."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(_Leaf.of(leaf) for leaf in leaves), live)

    def pack(self, tree: Any) -> tuple[jax.Array, jax.Array]:
        """The two vectors of a tree."""
        parts: dict[bool, list[jax.Array]] = {True: [jnp.zeros(0, jnp.int32)], False: [jnp.zeros(0, jnp.int32)]}
        for index, leaf in enumerate(jax.tree.leaves(tree)):
            parts[index in self.live].append(_to_words(leaf))
        return jnp.concatenate(parts[True]), jnp.concatenate(parts[False])

    def unpack(self, live: jax.Array, idle: jax.Array | None = None) -> Any:
        """The tree of two vectors; without the second one, with zeros in its place."""
        if idle is None:
            idle = jnp.zeros(sum(leaf.size for i, leaf in enumerate(self.leaves) if i not in self.live), jnp.int32)
        vectors, places, out = {True: live, False: idle}, {True: 0, False: 0}, []
        for index, leaf in enumerate(self.leaves):
            kind = index in self.live
            out.append(leaf.read(vectors[kind][places[kind] : places[kind] + leaf.size]))
            places[kind] += leaf.size
        return jax.tree.unflatten(self.treedef, out)
