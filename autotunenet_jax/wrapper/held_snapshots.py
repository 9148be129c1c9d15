"""The snapshots that `autotune` holds in the optimizer's state: as trees, or in a few vectors where that can be."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Int

from ..compiler import packing
from ..space import injection


class Snapshot(NamedTuple):
    """Parameters, the inner optimizer's state without its tuned values, and state of the training step's own."""

    params: Any
    inner: Any
    aux: tuple[Any, ...] = ()


class SnapshotTrees(NamedTuple):
    """Snapshots as they were given, sharded like what they are of."""

    slots: tuple[Snapshot, ...]

    def read(self, slot: int) -> Snapshot:
        """What is in a slot."""
        return self.slots[slot]

    def read_at(self, slot: Int[Array, ""]) -> Snapshot:
        """What is in a slot that is not known until the program runs."""
        found = self.slots[0]
        for number, other in enumerate(self.slots[1:], 1):
            found = optax.tree.where(slot == number, other, found)
        return found

    def reader(self, slot: Int[Array, ""]) -> Callable[..., Array]:
        """Reads single leaves of what is in such a slot; see `packing.row_reader`."""
        first, *others = map(jax.tree.leaves, self.slots)

        def read(leaf: int, zero: Array) -> Array:
            found = first[leaf]
            for number, other in enumerate(others, 1):
                found = jnp.where(slot + zero == number, other[leaf], found)
            return found

        return read

    def written(self, flags: Sequence[Array], make: Callable[..., Snapshot], *operands: Any) -> "SnapshotTrees":
        """A new snapshot in the slots that are flagged, made of the operands."""
        new = make(*operands)
        slots = zip(flags, self.slots, strict=False)
        return SnapshotTrees(tuple(optax.tree.where(flag, new, old) for flag, old in slots))


class SnapshotVectors(NamedTuple):
    """Snapshots in a row of a few matrices each: a step pays for each array, used or not, that passes through it.

    Attributes:
      packed: The arrays, with a leading axis of slots.
      layout: Of one snapshot; static.
    """

    packed: packing.Packed
    layout: packing.Layout

    def read(self, slot: int) -> Snapshot:
        """What is in a slot."""
        packed = jax.tree.map(injection.unboxed, self.packed, is_leaf=injection.is_box)
        return packing.unpack(packing.row(packed, self.layout, slot), self.layout)

    def read_at(self, slot: Int[Array, ""]) -> Snapshot:
        """What is in a slot that is not known until the program runs."""
        return packing.unpack_row(self.packed, self.layout, slot)

    def reader(self, slot: Int[Array, ""]) -> Callable[..., Array]:
        """Reads single leaves of what is in such a slot; see `packing.row_reader`."""
        return packing.row_reader(self.packed, self.layout, slot)

    def written(self, flags: Sequence[Array], make: Callable[..., Snapshot], *operands: Any) -> "SnapshotVectors":
        """A new snapshot in the slots that are flagged, made of the operands; it takes no room but where it goes."""
        count = jax.tree.leaves(self.packed)[0].shape[0]

        def turn(carry: Any) -> Any:
            pending, packed = carry
            slot = jnp.argmax(pending).astype(jnp.int32)
            # XLA takes out of a loop what does not depend on it, into room of its own.
            new = make(*jax.tree.map(lambda leaf: _if(jnp.any(pending), leaf), operands))
            return pending & (np.arange(count) != slot), packing.overwritten(packed, new, self.layout, slot)

        start = (jnp.stack(list(flags)[:count]), self.packed)
        _, packed = jax.lax.while_loop(lambda carry: jnp.any(carry[0]), turn, start)
        return self._replace(packed=packed)


def _if(flag: Array, leaf: Any) -> Any:
    return jnp.where(flag, leaf, jnp.zeros_like(leaf)) if leaf.dtype.name in packing.PLAIN else leaf


HeldSnapshots = SnapshotTrees | SnapshotVectors


def snapshots_of(snapshots: Sequence[Snapshot]) -> Any:
    """Real copies of snapshots, one for each slot; in vectors unless an array is spread over several devices.

    A state so goes from one device to several, and back, as long as each holds all of it. Trees without parameters,
    such as those by which optax finds where in a state they are, give a number: nothing is copied then.
    """
    if any(map(_may_be_spread, jax.tree.leaves(snapshots[0], is_leaf=injection.is_box))):
        return SnapshotTrees(tuple(jax.tree.map(strong, snapshot) for snapshot in snapshots))
    if not jax.tree.leaves(snapshots[0].params):
        return jnp.zeros(())
    return vectors_of(snapshots)


def vectors_of(snapshots: Sequence[Snapshot]) -> SnapshotVectors:
    """Copies of snapshots in vectors."""
    unboxed = [jax.tree.map(injection.unboxed, each, is_leaf=injection.is_box) for each in snapshots]
    stacked = [packing.pack(jax.tree.map(_as_strong, each)) for each in unboxed]
    layout = packing.layout(jax.tree.map(_as_strong, unboxed[0]))
    return SnapshotVectors(jax.tree.map(lambda *rows: jnp.stack(rows), *stacked), layout)


def _may_be_spread(leaf: Any) -> bool:
    """Whether no one device holds all of an array; while a program is traced that is not known."""
    leaf = injection.unboxed(leaf)
    if isinstance(leaf, Tracer):
        return jax.device_count() > 1
    return isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated


def strong(leaf: Any) -> Array:
    """A real copy that does not adapt its dtype to what it meets: the state keeps its types from the first step on."""
    return _as_strong(jnp.array(leaf, copy=True))


def _as_strong(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf
