"""The compiled controller as a plain object: losses in, Python numbers out.

A tuner's state has some seventy small leaves, and handing those to a compiled function and back costs more than the
function itself. Here the state travels as two flat arrays, donated from call to call.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn

from ._platform import engine_device

TRAIN, SWEEP, FORK = (atn.PHASES.index(name) for name in ("train", "sweep", "fork"))


@dataclasses.dataclass(frozen=True)
class _Packing:
    """How a pytree of float32, integer, boolean and key leaves becomes a float32 and an int32 vector."""

    treedef: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, tree: Any) -> "_Packing":
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))

    def pack(self, tree: Any) -> tuple[jax.Array, jax.Array]:
        floats, integers = [], []
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                words = jax.random.key_data(leaf)
                integers.append(jax.lax.bitcast_convert_type(words, jnp.int32).ravel())
            elif leaf.dtype == jnp.float32:
                floats.append(leaf.ravel())
            else:
                integers.append(leaf.astype(jnp.int32).ravel())
        return jnp.concatenate(floats), jnp.concatenate(integers)

    def unpack(self, floats: jax.Array, integers: jax.Array) -> Any:
        leaves, f, i = [], 0, 0
        for shape, dtype in self.leaves:
            size = math.prod(shape)
            if jnp.issubdtype(dtype, jax.dtypes.prng_key):
                words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype)).shape
                size = math.prod(words)
                data = jax.lax.bitcast_convert_type(integers[i : i + size].reshape(words), jnp.uint32)
                leaves.append(jax.random.wrap_key_data(data))
                i += size
            elif dtype == jnp.float32:
                leaves.append(floats[f : f + size].reshape(shape))
                f += size
            else:
                leaves.append(integers[i : i + size].reshape(shape).astype(dtype))
                i += size
        return jax.tree.unflatten(self.treedef, leaves)


class Tick(NamedTuple):
    """What one call of the engine says; Python numbers.

    Attributes:
      directive: What to do; an `autotunenet_jax.Directive` of ints.
      is_due: Whether a decision is due.
      phase: Phase from here on.
      step: Budget spent.
      saved_step: Budget step of the saved state, as it was before this call; the same for ``kept_step``.
      kept_step: See there.
    """

    directive: Any
    is_due: bool
    phase: int
    step: int
    saved_step: int
    kept_step: int


_DIRECTIVE_FIELDS = len(atn.Directive._fields)


def _report(directive: Any, due: Any, ts: Any, slots: Any) -> jax.Array:
    values = (*directive, due, ts.phase, ts.step, slots.saved_step, slots.kept_step)
    return jnp.stack([jnp.asarray(value).astype(jnp.int32) for value in values])


def _hyperparams(core: Any, ts: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in core.hyperparams(ts).values()])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pack(packing: _Packing, core: Any, ts: Any) -> Any:
    return packing.pack(ts), _hyperparams(core, ts)


@functools.partial(jax.jit, static_argnums=0)
def _unpack(packing: _Packing, packed: Any) -> Any:
    return packing.unpack(*packed)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _tick(packing: _Packing, core: Any, packed: Any, loss: Any) -> Any:
    before = packing.unpack(*packed)
    ts, directive, due = core.tick(before, loss)
    return packing.pack(ts), _hyperparams(core, ts), _report(directive, due, ts, before.slots)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _decide(packing: _Packing, core: Any, packed: Any) -> Any:
    before = packing.unpack(*packed)
    ts, directive, held = core.decide(before)
    said = _report(directive, False, ts, before.slots)
    chosen = core.space.decode(ts.incumbent)
    # A pair of calls stands where a loop in JAX has one: the round goes to the history, the rest is obeyed.
    return packing.pack(ts), _hyperparams(core, ts), said, (held, chosen, ts.plan.kind[held.index], ts.discarded)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _observe(packing: _Packing, core: Any, packed: Any, metric: Any) -> Any:
    return packing.pack(core.observe_eval(packing.unpack(*packed), metric))


class Engine:
    """A tuner with its state.

    Args:
      tuner: The core's tuner.
      seed: Of its random choices.
    """

    def __init__(self, tuner: atn.AutoTuneNet, *, seed: int):
        self.tuner, self.core = tuner, tuner.core
        with jax.default_device(engine_device()):
            ts = tuner.init(jax.random.key(seed))
        self._packing = _Packing.of(ts)
        self._readers = [_reader(tuner.space[name]) for name in tuner.space.names]
        self._set(ts)

    def _set(self, ts: atn.TunerState) -> None:
        self._packed, values = _pack(self._packing, self.core, jax.device_put(ts, engine_device()))
        self.values = values
        self.phase, self.step, self.data_step = int(ts.phase), int(ts.step), int(ts.data_step)

    @property
    def state(self) -> atn.TunerState:
        """The state as the core knows it."""
        return _unpack(self._packing, self._packed)

    @state.setter
    def state(self, ts: atn.TunerState) -> None:
        self._set(ts)

    def hyperparams(self) -> dict[str, Any]:
        """Values in force for the next step, as Python objects."""
        values = np.asarray(self.values).tolist()
        return {
            name: read(value) for name, read, value in zip(self.tuner.space.names, self._readers, values, strict=True)
        }

    def tick(self, loss: float) -> Tick:
        """Takes the loss of one step in."""
        self._packed, self.values, said = _tick(self._packing, self.core, self._packed, np.float32(loss))
        return self._read(said)

    def decide(self) -> tuple[Tick, tuple[Any, dict[str, Any], int, int]]:
        """Takes the decision that `tick` called due; also the round as it was decided on, for the history."""
        self._packed, self.values, said, report = _decide(self._packing, self.core, self._packed)
        held, chosen, kind, discarded = jax.device_get(report)
        return self._read(said), (held, chosen, int(kind), int(discarded))

    def observe_eval(self, metric: float) -> None:
        """Takes a validation metric in, in the direction of the tuner's mode."""
        sign = -1.0 if self.tuner.mode == "max" else 1.0
        self._packed = _observe(self._packing, self.core, self._packed, np.float32(sign * metric))

    def _read(self, said: Any) -> Tick:
        numbers = np.asarray(said).tolist()
        directive = atn.Directive(*numbers[:_DIRECTIVE_FIELDS])
        due, phase, step, saved_step, kept_step = numbers[_DIRECTIVE_FIELDS:]
        self.phase, self.step, self.data_step = phase, step, directive.data_step
        return Tick(directive, bool(due), phase, step, saved_step, kept_step)

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as NumPy arrays, in a fixed order; `load_arrays` takes them back."""
        floats, integers = jax.device_get(self._packed)
        return {"floats": np.array(floats), "integers": np.array(integers)}

    def load_arrays(self, arrays: dict[str, Any]) -> None:
        """Takes back what `arrays` gave.

        Raises:
          ValueError: They are of another shape: another space, or another capacity.
        """
        now = self.arrays()
        for name, array in now.items():
            given = np.asarray(arrays[name])
            if given.shape != array.shape:
                raise ValueError(
                    f"the state is of another tuner: its {name} have shape {given.shape}, this one's {array.shape}. "
                    "Make the AutoTuneNet as it was when the state was saved."
                )
        packed = tuple(np.asarray(arrays[name], now[name].dtype) for name in ("floats", "integers"))
        self._set(_unpack(self._packing, jax.device_put(packed, engine_device())))


def _reader(param: Any) -> Any:
    """From a float32 as the engine gives it to the Python object that a user named."""
    if isinstance(param, atn.Float):
        return float
    if isinstance(param, atn.Int):
        return lambda value: round(value)
    options = param.options
    if param.is_numeric:
        return lambda value: min(options, key=lambda option: abs(option - value))
    return lambda value: options[round(value)]
