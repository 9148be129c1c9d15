"""Forks of a round that run together: beside the one that the line search asks for, those that it may ask for next.

The controller asks for one fork after the other, and stays as it is. Where it asks for one that has run already, its
losses are told instead of trained for. Its last step is trained as any other, after the state before it was measured.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ..controller import AutoTuneNet
from ..controller.core import Core
from ..controller.fork_round import foreseen
from ..controller.plan import FAST, MAX_FORKS
from ..controller.state import TunerState
from .sound_steps import sound_step
from .train_step_contract import parts_of

_log = logging.getLogger("autotunenet")

# The fork that is asked for and its neighbours on both sides: more are seldom asked for.
MOST_AT_ONCE = 3
# A lane holds its state, the next one and what lies between; and so much of what is free is left to others.
_STATES_PER_LANE, _SHARE_OF_FREE = 4.0, 0.8
# Longer forks run alone.
_MOST_STEPS = 2**14
# Rates that a lane was trained with are those that the controller asks for, up to rounding.
_ROUNDING = 1e-5


class Heard(NamedTuple):
    """What is to be heard of the steps of a fork, filled up to the longest fork.

    Attributes:
      told: What the controller hears.
      loss: What the history hears.
      metrics: Beside the loss.
    """

    told: Any
    loss: Any
    metrics: Mapping[str, Any]


class Lane(NamedTuple):
    """A fork that has been trained up to its last step.

    Attributes:
      x: Hyperparameters, unit cube.
      first: Those in force at its first step, by name.
      steps: How many it has been trained for.
      heard: What is to be heard of them.
      state: The training state before the last step.
    """

    x: np.ndarray
    first: dict[str, np.ndarray]
    steps: int
    heard: Heard
    state: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _foreseen_jit(core: Core, count: int, ts: TunerState) -> Any:
    return foreseen(core.space, ts, count)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_force_jit(core: Core, steps: int, ts: TunerState, x: Float[Array, "k d"], lag: Array) -> dict[str, Array]:
    """Values in force at the steps of forks at some points, ``lag`` steps of budget from here: steps, then points."""

    def at(pos: Array, point: Array) -> dict[str, Array]:
        health = ts.health._replace(since_rollback=ts.health.since_rollback + lag + pos)
        return core.hyperparams(
            ts._replace(
                step=ts.step + lag + pos,
                data_step=ts.data_step + pos,
                segment_left=ts.segment_left - pos,
                trial=point,
                health=health,
            )
        )

    return jax.vmap(jax.vmap(at, (None, 0)), (0, None))(jnp.arange(steps), x)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _lanes_jit(
    train_step: Callable[..., Any], has_aux: bool, states: Any, hyperparams: dict[str, Array], pos: Array, batch: Any
) -> Any:
    """One step of every lane, on one batch; a step that breaks a lane's state does not happen."""

    def one(state: Any, values: Any) -> Any:
        new, loss, metrics = parts_of(train_step(state, batch, values), has_aux=has_aux)
        new, told = sound_step(new, state, loss)
        return new, Heard(jnp.asarray(told, jnp.float32), jnp.asarray(loss, jnp.float32), metrics)

    return jax.vmap(one)(states, {name: rows[pos] for name, rows in hyperparams.items()})


@functools.partial(jax.jit, static_argnums=1)
def _repeated(state: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), state)


@jax.jit
def _taken(states: Any, number: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], states)


def check_parallel_forks(wanted: int | Literal["auto"] | None) -> int | Literal["auto"]:
    """How many forks may run together; 1 where nothing is asked for.

    Raises:
      ValueError: It is no number of forks.
    """
    if wanted is None or wanted == "auto":
        return wanted or 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= MAX_FORKS:
        raise ValueError(
            f'parallel_forks must be "auto", None, or an integer from 1 to {MAX_FORKS}; got {wanted!r}. '
            f"{MOST_AT_ONCE} is the most that is often of use."
        )
    return wanted


class Lanes:
    """The forks of the round that is held which have run already.

    Args:
      train_step: The user's.
      tuner: Asks for forks.
      has_aux: Whether ``train_step`` returns metrics too.
      wanted: How many forks run together at most; ``"auto"`` takes what devices and memory allow.
      state: A training state, for its size and place.

    Attributes:
      count: How many forks run together at most.
      unused_steps: Training steps of forks that were never asked for.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        tuner: AutoTuneNet,
        *,
        has_aux: bool,
        wanted: int | Literal["auto"],
        state: Any,
    ):
        self._train_step, self._core, self._has_aux = train_step, tuner.core, has_aux
        # Of the longest fork that can be foreseen; an open-ended plan has forks that are longer than any run.
        longest = int(np.max(tuner.plan.length, where=tuner.plan.kind == FAST, initial=1))
        self._most_steps = min(longest, _MOST_STEPS)
        self._round: tuple[int, int] = (-1, -1)
        self._lanes: list[Lane] = []
        self.unused_steps = 0
        self.count, devices, why = _room(wanted, state)
        self._own = devices[0] if devices else None
        self._over = None
        if devices:
            self._over = NamedSharding(Mesh(np.array(devices), ("forks",)), PartitionSpec("forks"))
        if wanted != 1:
            _log.info("up to %d forks of a round run together: %s", self.count, why)

    @property
    def is_on(self) -> bool:
        """Whether forks run together at all."""
        return self.count > 1

    @property
    def waiting_steps(self) -> int:
        """Training steps of forks that have run and may still be asked for."""
        return sum(lane.steps for lane in self._lanes)

    def placed(self, tree: Any) -> Any:
        """The tree on the device where forks come back to, if they run on others too: one place compiles once."""
        return tree if self._over is None else jax.device_put(tree, self._own)

    def find(self, ts: TunerState, host: Any) -> Lane | None:
        """The fork that begins, where it has run or can be run beside others; else None, and it is trained as usual.

        Args:
          ts: The controller's state at its beginning.
          host: The training, copies of whose state are trained.
        """
        held = (int(ts.round.index), int(ts.slots.saved_data))
        if held != self._round:
            self.release()
            self._round = held
        lane = self._pop(ts)
        # A run that goes on to another budget may hold longer forks than its tuner's plan has.
        if lane is None and int(ts.segment_length) <= self._most_steps:
            points = self._points(ts)
            if len(points) > 1:
                self._lanes += self._run(ts, host.state, points, host.batch)
                lane = self._pop(ts)
        if lane is not None and not _is_close(lane.first, jax.device_get(dict(host.hyperparams))):
            # It was trained with other values than those that are asked for.
            self.unused_steps += lane.steps
            return None
        return lane

    def release(self) -> None:
        """Forgets all forks: the round is over. Their steps are counted."""
        self.unused_steps += self.waiting_steps
        self._lanes = []

    def _pop(self, ts: TunerState) -> Lane | None:
        trial, length = np.asarray(ts.trial), int(ts.segment_length)
        for number, lane in enumerate(self._lanes):
            if np.allclose(lane.x, trial, atol=_ROUNDING) and lane.steps == length - 1:
                return self._lanes.pop(number)
        return None

    def _points(self, ts: TunerState) -> np.ndarray:
        """The fork that begins and those that may follow, as far as they have not run."""
        found = jax.device_get(_foreseen_jit(self._core, self.count, ts))
        known = [lane.x for lane in self._lanes]
        points = [
            x
            for x, is_allowed in zip(found.x, found.is_allowed, strict=True)
            if is_allowed and not any(np.allclose(x, other, atol=_ROUNDING) for other in known)
        ]
        return np.stack(points)

    def _run(self, ts: TunerState, state: Any, points: np.ndarray, batch: Callable[[int], Any]) -> list[Lane]:
        """Trains forks at some points up to their last step; those that met nothing unusual are of use."""
        steps, start, count = int(ts.segment_length) - 1, int(ts.data_step), len(points)
        # Filled up, so that one program does for all.
        x = jnp.asarray(np.concatenate([points, np.repeat(points[:1], self.count - count, axis=0)]))
        in_force = functools.partial(_in_force_jit, self._core, self._most_steps, ts, x)
        values, later = in_force(np.int32(0)), in_force(np.int32(MAX_FORKS * (steps + 1)))
        first, later = jax.device_get([{name: rows[0] for name, rows in tree.items()} for tree in (values, later)])
        if not _is_close(first, later):
            # The rates depend on how much of the budget is spent, and so on the order of the forks.
            return []
        self.unused_steps += steps * (self.count - count)
        states, rows, values = self._spread(_repeated(state, self.count)), [], self._everywhere(values)
        for pos in range(steps):
            shared = self._everywhere(batch(start + pos))
            states, heard = _lanes_jit(self._train_step, self._has_aux, states, values, np.int32(pos), shared)
            rows.append(heard)
        heard = jax.tree.map(lambda *row: np.stack(row, axis=1), *jax.device_get(rows))
        lanes = []
        for number in range(count):
            mine = jax.tree.map(lambda row, number=number: self._filled(row[number]), heard)
            if np.isfinite(mine.told).all():
                at_first = {name: value[number] for name, value in first.items()}
                lanes.append(Lane(points[number], at_first, steps, mine, self._taken(states, number, like=state)))
            else:
                self.unused_steps += steps
        return lanes

    def _filled(self, row: np.ndarray) -> np.ndarray:
        """A row with a value for each step of the longest fork."""
        return np.concatenate([row, np.zeros(self._most_steps - len(row), row.dtype)])

    def _taken(self, states: Any, number: int, *, like: Any) -> Any:
        """The state of one lane, where the training state lies."""
        taken = _taken(states, np.int32(number))
        if self._over is None:
            return taken
        return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), taken, like)

    def _everywhere(self, tree: Any) -> Any:
        """A tree on all devices that lanes run on."""
        return tree if self._over is None else jax.device_put(tree, NamedSharding(self._over.mesh, PartitionSpec()))

    def _spread(self, tree: Any) -> Any:
        return tree if self._over is None else jax.device_put(tree, self._over)


def _is_close(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.allclose(a[name], b[name], rtol=_ROUNDING, atol=0.0) for name in a)


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
    fitting = max(int(_SHARE_OF_FREE * free / max(_STATES_PER_LANE * size, 1.0)), 1)
    count = min(limit, fitting) if wanted == "auto" else limit
    return count, [], f"of {size / 2**20:.1f} MiB of state each, {fitting} would fit into the memory that is free"


def _divisor(count: int, devices: int) -> int:
    """The most devices that share so many lanes evenly."""
    return max(n for n in range(1, min(count, devices) + 1) if count % n == 0)


def _free_bytes(device: Any) -> int | None:
    """Memory of a device that is free, as far as it says."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
