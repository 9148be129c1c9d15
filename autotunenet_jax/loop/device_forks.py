"""Forks as one vectorised program: on the device where the training is, or over all devices of the process."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from .fork_executor import ForkExecutor, TrainedFork, fork_step, rows_of

# The fork that is asked for and its neighbours on both sides: more are seldom asked for.
MOST_AT_ONCE = 3
# A fork holds its state, the next one and what lies between; and so much of what is free is left to others.
_STATES_PER_FORK, _SHARE_OF_FREE = 4.0, 0.8


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _steps_jit(
    train_step: Callable[..., Any], has_aux: bool, states: Any, hyperparams: dict[str, Array], pos: Array, batch: Any
) -> Any:
    """One step of every fork, on one batch."""
    one = functools.partial(fork_step, train_step, has_aux)
    values = {name: rows[pos] for name, rows in hyperparams.items()}
    return jax.vmap(one, in_axes=(0, 0, None))(states, values, batch)


@functools.partial(jax.jit, static_argnums=1)
def _repeated(state: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), state)


@jax.jit
def _taken(states: Any, number: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], states)


class DeviceForks(ForkExecutor):
    """Forks on this process's devices.

    Args:
      wanted: How many run together at most; ``"auto"`` takes what devices and memory allow.
      state: A training state, for its size and place.
    """

    def __init__(self, wanted: int | Literal["auto"], state: Any):
        self.count, devices, self._why = _room(wanted, state)
        self._own = devices[0] if devices else None
        self._over = None
        if devices:
            self._over = NamedSharding(Mesh(np.array(devices), ("forks",)), PartitionSpec("forks"))

    @property
    def description(self) -> str:
        """On how many devices, or how much memory they take."""
        return self._why

    def start(self, train_step: Callable[..., Any], state: Any, *, has_aux: bool) -> None:
        """Remembers what is compiled with the first forks."""
        self._train_step, self._has_aux = train_step, has_aux

    def train(
        self,
        state: Any,
        hyperparams: Mapping[str, np.ndarray],
        batch: Callable[[int], Any],
        *,
        steps: int,
        count: int,
    ) -> list[TrainedFork | None]:
        """All columns, so that one program does for all."""
        states, rows, values = self._spread(_repeated(state, self.count)), [], self._everywhere(dict(hyperparams))
        for pos in range(steps):
            shared = self._everywhere(batch(pos))
            states, heard = _steps_jit(self._train_step, self._has_aux, states, values, np.int32(pos), shared)
            rows.append(heard)
        heard = rows_of(rows)
        return [
            TrainedFork(
                jax.tree.map(lambda row, number=number: row[number], heard), self._taken(states, number, like=state)
            )
            for number in range(count)
        ]

    def forks_paid(self, count: int) -> int:
        """All, however many are asked for."""
        return self.count

    def home(self, tree: Any) -> Any:
        """On the device where forks come back to, if they run on others too: one place compiles once."""
        return tree if self._over is None else jax.device_put(tree, self._own)

    def _taken(self, states: Any, number: int, *, like: Any) -> Any:
        """The state of one fork, where the training state lies."""
        taken = _taken(states, np.int32(number))
        if self._over is None:
            return taken
        return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), taken, like)

    def _everywhere(self, tree: Any) -> Any:
        """A tree on all devices that forks run on."""
        return tree if self._over is None else jax.device_put(tree, NamedSharding(self._over.mesh, PartitionSpec()))

    def _spread(self, tree: Any) -> Any:
        return tree if self._over is None else jax.device_put(tree, self._over)


def _room(wanted: int | Literal["auto"], state: Any) -> tuple[int, list[Any], str]:
    """How many forks run together, on which devices, and why; no devices where they run where the state is."""
    if wanted == 1:
        return 1, [], "nothing else is asked for"
    limit = MOST_AT_ONCE if wanted == "auto" else wanted
    leaves = jax.tree.leaves(state)
    places = {device for leaf in leaves for device in leaf.sharding.device_set}
    local = jax.local_devices()
    size = sum(leaf.nbytes for leaf in leaves) / max(len(places), 1)
    if len(places) == 1 and len(local) > 1:
        # Those that do nothing otherwise; the state's own among them.
        own = next(iter(places))
        others = [device for device in local if device != own]
        count = min(limit, len(local)) if wanted == "auto" else limit
        used = [own, *others][: _divisor(count, len(local))]
        return count, used if len(used) > 1 else [], f"over {len(used)} devices"
    free = _free_bytes(next(iter(places)))
    if free is None:
        return limit, [], f"on one device, of whose memory nothing is known, {size / 2**20:.1f} MiB of state each"
    fitting = max(int(_SHARE_OF_FREE * free / max(_STATES_PER_FORK * size, 1.0)), 1)
    count = min(limit, fitting) if wanted == "auto" else limit
    return count, [], f"of {size / 2**20:.1f} MiB of state each, {fitting} would fit into the memory that is free"


def _divisor(count: int, devices: int) -> int:
    """The most devices that share so many forks evenly."""
    return max(n for n in range(1, min(count, devices) + 1) if count % n == 0)


def _free_bytes(device: Any) -> int | None:
    """Memory of a device that is free, as far as it says."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
