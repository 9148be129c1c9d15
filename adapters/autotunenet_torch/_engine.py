"""The compiled controller as a plain object: losses in, Python numbers out."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn

from ._packing import Packing, touched
from ._platform import engine_device

TRAIN, SWEEP, FORK = (atn.PHASES.index(name) for name in ("train", "sweep", "fork"))


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


def _report(core: Any, directive: Any, due: Any, ts: Any, slots: Any) -> jax.Array:
    """All that Python reads after a call, as one int32 vector; hyperparameters first, by their bits."""
    values = jnp.stack([jnp.asarray(value, jnp.float32) for value in core.hyperparams(ts).values()])
    numbers = (*directive, due, ts.phase, ts.step, slots.saved_step, slots.kept_step)
    words = [jnp.asarray(number).astype(jnp.int32) for number in numbers]
    return jnp.concatenate([jax.lax.bitcast_convert_type(values, jnp.int32), jnp.stack(words)])


def _tick(core: Any, before: Any, loss: Any) -> tuple[Any, jax.Array]:
    ts, directive, due = core.tick(before, loss)
    return ts, _report(core, directive, due, ts, before.slots)


class _Programs:
    """The compiled functions of one tuner, on packed states."""

    def __init__(self, core: Any, packing: Packing):
        self.packing = packing

        def pack(ts: Any) -> Any:
            return packing.pack(ts), _report(core, _nothing(ts), False, ts, ts.slots)

        def tick(live: Any, loss: Any) -> Any:
            ts, said = _tick(core, packing.unpack(live), loss)
            return packing.pack(ts)[0], said

        def decide(live: Any, idle: Any) -> Any:
            before = packing.unpack(live, idle)
            ts, directive, held = core.decide(before)
            said = _report(core, directive, False, ts, before.slots)
            chosen = core.space.decode(ts.incumbent)
            # A pair of calls stands where a loop in JAX has one: the round goes to the history, the rest is obeyed.
            return packing.pack(ts), said, (held, chosen, ts.plan.kind[held.index], ts.discarded)

        def observe(live: Any, idle: Any, metric: Any) -> Any:
            ts = core.observe_eval(packing.unpack(live, idle), metric)
            return packing.pack(ts), _report(core, _nothing(ts), False, ts, ts.slots)

        self.pack, self.unpack = jax.jit(pack), jax.jit(packing.unpack)
        self.tick = jax.jit(tick, donate_argnums=0)
        self.decide = jax.jit(decide, donate_argnums=(0, 1))
        self.observe = jax.jit(observe, donate_argnums=(0, 1))


def _nothing(ts: Any) -> atn.Directive:
    return atn.Directive(**{**dict.fromkeys(atn.Directive._fields, 0), "data_step": ts.data_step})


@functools.lru_cache(maxsize=16)
def _programs(core: Any, treedef: Any, kinds: tuple[Any, ...]) -> _Programs:
    """Compiled once for all tuners alike."""
    like = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds])
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    return _Programs(core, Packing.of(like, live=touched(functools.partial(_tick, core), like, loss)))


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
        leaves, treedef = jax.tree.flatten(ts)
        self._programs = _programs(self.core, treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        self._readers = [_reader(tuner.space[name]) for name in tuner.space.names]
        self._set(ts)

    def _set(self, ts: atn.TunerState) -> None:
        (self._live, self._idle), said = self._programs.pack(jax.device_put(ts, engine_device()))
        self._read(said)

    @property
    def state(self) -> atn.TunerState:
        """The state as the core knows it."""
        return self._programs.unpack(self._live, self._idle)

    @state.setter
    def state(self, ts: atn.TunerState) -> None:
        self._set(ts)

    def hyperparams(self) -> dict[str, Any]:
        """Values in force for the next step, as Python objects."""
        return {
            name: read(value)
            for name, read, value in zip(self.tuner.space.names, self._readers, self._values, strict=True)
        }

    def tick(self, loss: float) -> Tick:
        """Takes the loss of one step in."""
        self._live, said = self._programs.tick(self._live, np.float32(loss))
        return self._read(said)

    def decide(self) -> tuple[Tick, tuple[Any, dict[str, Any], int, int]]:
        """Takes the decision that `tick` called due; also the round as it was decided on, for the history."""
        with atn.one_blas_thread():
            (self._live, self._idle), said, report = self._programs.decide(self._live, self._idle)
            held, chosen, kind, discarded = jax.device_get(report)
        return self._read(said), (held, chosen, int(kind), int(discarded))

    def observe_eval(self, metric: float) -> None:
        """Takes a validation metric in, in the direction of the tuner's mode."""
        sign = -1.0 if self.tuner.mode == "max" else 1.0
        packed, said = self._programs.observe(self._live, self._idle, np.float32(sign * metric))
        self._live, self._idle = packed
        self._read(said)

    def _read(self, said: Any) -> Tick:
        words = np.asarray(said)
        count = len(self._readers)
        self._values = words[:count].view(np.float32).tolist()
        numbers = words[count:].tolist()
        directive = atn.Directive(*numbers[:_DIRECTIVE_FIELDS])
        due, phase, step, saved_step, kept_step = numbers[_DIRECTIVE_FIELDS:]
        self.phase, self.step, self.data_step = phase, step, directive.data_step
        return Tick(directive, bool(due), phase, step, saved_step, kept_step)

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as NumPy arrays; `load_arrays` takes them back."""
        live, idle = jax.device_get((self._live, self._idle))
        return {"live": np.array(live), "idle": np.array(idle)}

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
                    f"the state is of another tuner: its {name} numbers have shape {given.shape}, this one's "
                    f"{array.shape}. Make the AutoTuneNet as it was when the state was saved."
                )
        packed = tuple(np.asarray(arrays[name], np.int32) for name in ("live", "idle"))
        self._set(self._programs.unpack(*jax.device_put(packed, engine_device())))


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
