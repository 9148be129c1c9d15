"""Where arrays of a run lie that the user has not placed."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def _mesh_of(tree: Any) -> Any:
    """The mesh of a tree's arrays, if any lies on more than one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def beside(tree: Any, placed: Any) -> Any:
    """The tree, with the arrays that are free to lie anywhere on every device of the mesh that ``placed`` lies on.

    Compiled steps would bring them there, and be compiled again for the place they come back from.
    """
    mesh = _mesh_of(placed)
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def spread(leaf: jax.Array) -> jax.Array:
        if leaf.committed:
            return leaf
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: leaf[index])

    return jax.tree.map(spread, tree)
