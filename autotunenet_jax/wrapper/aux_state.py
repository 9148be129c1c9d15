"""``update(..., aux=...)`` and `rewound`: state of the training step's own that goes back with the parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from ..space import injection
from .held_snapshots import HeldSnapshots, SnapshotTrees, vectors_of
from .state import AutotuneState


def leaves_of(aux: Any) -> tuple[Any, ...]:
    """The arrays of a tree, out of the boxes that a module library has put them in; none of None."""
    leaves = jax.tree.leaves(aux, is_leaf=injection.is_box)
    unboxed = tuple(injection.unboxed(leaf) for leaf in leaves)
    for leaf in unboxed:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(f"aux must be a tree of arrays; got {type(leaf).__name__} in it. Leave it out of aux.")
    return tuple(jnp.asarray(leaf) for leaf in unboxed)


def with_room(state: AutotuneState, aux: Any) -> tuple[AutotuneState, tuple[Any, ...]]:
    """The state with room for what it is given, and that as the state holds it.

    Raises:
      ValueError: It is missing, or not of the shapes that the state has room for.
    """
    given = leaves_of(aux)
    if aux is None and state.aux:
        raise ValueError(
            "aux was given to autotune, or to an update before, and this update has none: what goes back with the "
            "parameters would be what it was then. Give update(..., aux=...) the same tree at each step, also where "
            "another library calls it, or leave it out everywhere."
        )
    if aux is None:
        return state, ()
    if not state.aux:
        snapshots = state.snapshots
        if isinstance(snapshots, HeldSnapshots):
            slots = [snapshots.read(slot)._replace(aux=given) for slot in range(state.settings.slots)]
            is_in_trees = isinstance(snapshots, SnapshotTrees)
            snapshots = SnapshotTrees(tuple(slots)) if is_in_trees else vectors_of(slots)
        return state._replace(aux=given, snapshots=snapshots), given
    shapes, held = ([tuple(leaf.shape) for leaf in leaves] for leaves in (given, state.aux))
    if shapes != held:
        raise ValueError(
            f"aux must keep its structure: it held arrays of shapes {held} before, and now {shapes}. "
            "Give the same tree to autotune and to each update."
        )
    return state, tuple(new.astype(old.dtype) for new, old in zip(given, state.aux, strict=True))


def reverted(is_reverted: Any, state: AutotuneState, aux: Any) -> Any:
    """``aux`` where training went on, else what the state holds, in the structure and boxes of ``aux``."""
    leaves, structure = jax.tree.flatten(aux, is_leaf=injection.is_box)
    held = [jnp.asarray(leaf) for leaf in state.aux]
    if len(leaves) != len(held):
        raise ValueError(
            f"rewound needs the tree that update was given as aux, of {len(held)} arrays; got one of {len(leaves)}. "
            "Call update(grads, opt_state, params, value=loss, aux=...) first, with the same tree."
        )
    chosen = [
        injection.reboxed(leaf, jnp.where(is_reverted, old, injection.unboxed(leaf)).astype(old.dtype))
        for leaf, old in zip(leaves, held, strict=True)
    ]
    return jax.tree.unflatten(structure, chosen)
