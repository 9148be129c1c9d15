"""Where arrays lie that the user has not placed: a step brings them to its mesh, and is compiled again for that."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def _mesh_of(tree: Any) -> Any:
    """The mesh of a tree's arrays, if any lies on more than one device."""
    for leaf in jax.tree.leaves(tree):
        is_placed = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if is_placed and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1:
            return leaf.sharding.mesh
    return None


def beside(tree: Any, placed: Any) -> Any:
    """The tree, with the arrays that are free to lie anywhere on every device of the mesh that ``placed`` lies on.

    Compiled steps would bring them there, and be compiled again for the place they come back from.
    """
    mesh = _mesh_of(placed)
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def spread(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.committed:
            return leaf
        # Each process makes its own part; `jax.device_put` would first compare what all of them have.
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: leaf[index])

    return jax.tree.map(spread, tree)
