"""Arrays that span several processes: what this process holds of them, and how they are brought together."""

from typing import Any, NamedTuple

import jax


def spans_processes(leaf: Any) -> bool:
    """Whether a leaf is an array of which other processes hold devices too."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def is_spread(leaf: Any) -> bool:
    """Whether no process holds the whole of a leaf."""
    return spans_processes(leaf) and not leaf.is_fully_replicated


class Whole(NamedTuple):
    """An array whose parts in this process are kept apart.

    Attributes:
      shape: Of the whole array.
      sharding: Likewise.
      places: For each of this process's devices, which part it holds.
    """

    shape: tuple[int, ...]
    sharding: Any
    places: tuple[tuple[Any, int], ...]

    def joined(self, parts: list[jax.Array]) -> jax.Array:
        """The array, of parts that this process holds; the other processes bring theirs. Nothing is exchanged."""
        pieces = [jax.device_put(parts[number], device) for device, number in self.places]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, pieces)


def parts_of(leaf: jax.Array) -> tuple[Whole, list[jax.Array]]:
    """The different parts of an array that this process holds, each once, and what they are parts of."""
    parts: dict[str, Any] = {}
    places = []
    for shard in leaf.addressable_shards:
        parts.setdefault(str(shard.index), shard.data)
        places.append((shard.device, list(parts).index(str(shard.index))))
    return Whole(leaf.shape, leaf.sharding, tuple(places)), list(parts.values())


def gathered(tree: Any) -> Any:
    """A tree whose spread arrays are whole, as NumPy arrays, in every process. All processes call it together.

    Cost: sends every spread array to every process, one after the other.
    """

    def whole(leaf: Any) -> Any:
        if not is_spread(leaf):
            return leaf
        from jax.experimental.multihost_utils import process_allgather

        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = process_allgather(jax.random.key_data(leaf), tiled=True)
            return jax.random.wrap_key_data(jax.numpy.asarray(words), impl=jax.random.key_impl(leaf))
        return process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)
