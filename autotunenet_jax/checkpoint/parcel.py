"""A training state as plain data that another process can read."""

from typing import Any, NamedTuple

import jax
import numpy as np

from .leaves import LeafSpec, copy_to_host, describe, restore_leaf


class Parcel(NamedTuple):
    """The leaves of a tree; picklable, without the tree's structure and places.

    Attributes:
      specs: What the leaves are.
      arrays: Their values, None where the description holds it.
    """

    specs: tuple[LeafSpec, ...]
    arrays: tuple[np.ndarray | None, ...]


def pack(tree: Any) -> Parcel:
    """Copies a tree's leaves to host memory.

    Example:
        >>> import jax.numpy as jnp
        >>> parcel = pack({"w": jnp.ones(2)})
        >>> unpack(parcel, {"w": 0})["w"].tolist()
        [1.0, 1.0]

    Args:
      tree: Any pytree that `Snapshots.save` takes.

    Raises:
      TypeError: A leaf cannot be copied; the message names it.
      ValueError: A leaf is spread over several processes.
    """
    leaves, specs, _ = describe(tree)
    return Parcel(tuple(specs), tuple(copy_to_host(leaves, specs, {})))


def unpack(parcel: Parcel, like: Any) -> Any:
    """The tree again, bit for bit.

    Args:
      parcel: Of `pack`, from this process or another one.
      like: A tree of the same structure; its arrays say where arrays go, anything else leaves that to JAX.
    """
    places, structure = jax.tree.flatten(like)
    parts = zip(parcel.specs, parcel.arrays, places, strict=True)
    return structure.unflatten([restore_leaf(*part) for part in parts])
