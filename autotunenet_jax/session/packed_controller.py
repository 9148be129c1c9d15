"""The compiled controller as a plain object: losses in, Python numbers out.

A compiled function pays for each array it takes and returns, and the controller's state has some ninety small ones:
they are packed into a few. And losses that need no answer, which the controller tells of beforehand, wait for the next
that may need one: they are heard together, in one call, with the same result as one by one.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.memory_copies import copy_tree_to_host
from ..compiler import packing
from ..compiler.blas_threads import one_blas_thread
from ..controller import AutoTuneNet, Core
from ..controller.fork_score import spoiled
from ..controller.outlook import MOST
from ..controller.rollback import may_copy
from ..controller.state import Directive, Slots, TunerState
from ..controller.validation_monitor import kept_at_once
from ..space.search_space import Choice, Float, Int
from .session import Decision, Tick

_DIRECTIVE_FIELDS = len(Directive._fields)
# Numbers that follow the directive in what a program says, and that begin an outlook; see `_spoken` and `_foretold`.
_POSITION, _SLOTS = 8, 4


class _Programs:
    """The compiled functions of one controller, on packed states."""

    def __init__(self, core: Core, like: TunerState):
        layout = packing.layout(like)

        def unpack(packed: packing.Packed) -> TunerState:
            return packing.unpack(packed, layout)

        def begin(ts: TunerState) -> Any:
            return packing.pack(ts), _spoken(core, _nothing(ts), ts, ts.slots)

        def tick(packed: packing.Packed, losses: jax.Array, count: Any) -> Any:
            def hear(number: Any, carry: Any) -> Any:
                before = unpack(carry[0])
                ts, directive, due = core.tick(before, losses[number])
                return packing.pack(ts), _numbers(directive, due, ts, before.slots)

            ts = unpack(packed)
            nothing = _numbers(_nothing(ts), False, ts, ts.slots)
            packed, numbers = jax.lax.fori_loop(0, count, hear, (packed, nothing))
            return packed, _foretold(core, unpack(packed), numbers)

        def decide(packed: packing.Packed) -> Any:
            before = unpack(packed)
            ts, directive, held = core.decide(before)
            said = _spoken(core, directive, ts, before.slots)
            report = held, core.space.decode(ts.incumbent), ts.plan.kind[held.index], ts.discarded
            return packing.pack(ts), said, report

        def observe(packed: packing.Packed, metric: Any) -> Any:
            ts, keeps = kept_at_once(core.observe_eval(unpack(packed), metric))
            return packing.pack(ts), _spoken(core, _nothing(ts)._replace(keep=keeps), ts, ts.slots)

        def spoil(packed: packing.Packed) -> packing.Packed:
            return packing.pack(spoiled(unpack(packed)))

        self.begin, self.unpack, self.spoil = jax.jit(begin), jax.jit(unpack), jax.jit(spoil)
        self.tick = jax.jit(tick, donate_argnums=0)
        # Not donated: they may have to be undone.
        self.decide, self.observe = jax.jit(decide), jax.jit(observe)


def _nothing(ts: TunerState) -> Directive:
    fields: dict[str, Any] = dict.fromkeys(Directive._fields, 0)
    return Directive(**{**fields, "data_step": ts.data_step})


def _spoken(core: Core, directive: Directive, ts: TunerState, slots: Slots) -> jax.Array:
    """All that Python reads after a call, as one int32 vector; hyperparameters first, by their bits."""
    values = jnp.stack([jnp.asarray(value, jnp.float32) for value in core.hyperparams(ts).values()])
    numbers = _numbers(directive, False, ts, slots)
    return jnp.concatenate([jax.lax.bitcast_convert_type(values, jnp.int32), numbers])


def _numbers(directive: Directive, due: Any, ts: TunerState, slots: Slots) -> jax.Array:
    numbers = (*directive, due, ts.phase, ts.step, slots.saved_step, slots.kept_step, ts.validation.has_fallen)
    numbers = (*numbers, may_copy(ts), ts.slots.saved_data)
    return jnp.stack([jnp.asarray(number).astype(jnp.int32) for number in numbers])


def _foretold(core: Core, ts: TunerState, numbers: jax.Array) -> jax.Array:
    """As `_spoken`, with the outlook: how many losses need no answer, what is said to them, bounds and later values."""
    ahead = core.outlook(ts)
    values = jnp.stack([*ahead.values.values()], axis=1)
    words = jnp.concatenate([values[0], ahead.low[None], ahead.high[None], values[1:].reshape(-1)])
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    slots = jnp.stack([ahead.steps, ahead.verdict, ts.slots.saved_step, ts.slots.kept_step])
    return jnp.concatenate([words[: values.shape[1]], numbers, slots, words[values.shape[1] :]])


@functools.lru_cache(maxsize=16)
def _programs(core: Core, structure: Any, kinds: tuple[Any, ...]) -> _Programs:
    """Compiled once for all controllers alike."""
    return _Programs(core, jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*kind) for kind in kinds]))


def _cpu() -> Any:
    """JAX's CPU if it has one, else what the user's ``JAX_PLATFORMS`` leaves."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


class PackedController:
    """A tuner with its state, for a loop that knows each loss on the host; it runs on JAX's CPU.

    Args:
      tuner: The tuner.
      seed: Of its random choices.

    Attributes:
      phase: Phase of the next step.
      step: Budget spent.
      data_step: Position in the data of the next step.
      may_copy: Whether the next loss may ask for a copy of the training.
      saved_data: Position in the data that forks go back to.

    Cost: some microseconds for a loss that needs no answer, and 0.1 ms for another.
    """

    def __init__(self, tuner: AutoTuneNet, *, seed: int = 0):
        self.tuner = tuner
        with jax.default_device(_cpu()):
            ts = tuner.init(jax.random.key(seed))
        leaves, structure = jax.tree.flatten(ts)
        self._programs = _programs(tuner.core, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        self._readers = [_reader(tuner.space[name]) for name in tuner.space.names]
        # Losses that are yet to be heard: so many may be, between these bounds, with these values after each.
        self._waiting: list[float] = []
        self._losses = np.zeros(MOST, np.float32)
        self._may_wait, self._low, self._high = 0, math.nan, math.nan
        self._later: list[list[float]] = []
        self._begin(ts)

    def _begin(self, ts: TunerState) -> None:
        self._packed, said = self._programs.begin(jax.device_put(ts, _cpu()))
        self._read(said)

    @property
    def state(self) -> TunerState:
        """The state as the controller knows it."""
        self._catch_up()
        return self._programs.unpack(self._packed)

    def hyperparams(self) -> dict[str, Any]:
        """Values in force for the next step, as Python objects."""
        readers = zip(self.tuner.space.names, self._readers, self._values, strict=True)
        return {name: read(value) for name, read, value in readers}

    def tick(self, loss: float) -> Tick:
        """Takes the loss of one step in.

        Most losses need no answer: after each that was heard the controller has told for how many steps, and between
        which bounds of the loss, the answer is the same and which values follow. Those wait, and are heard together
        with the first that is no such loss.
        """
        number = len(self._waiting)
        self._waiting.append(loss)
        if number >= self._may_wait or not self._low <= loss <= self._high:
            return self._hear()
        self.step, self.data_step, self._values = self.step + 1, self.data_step + 1, self._later[number]
        return self._calm._replace(directive=self._calm.directive._replace(data_step=self.data_step))

    def _hear(self) -> Tick:
        """Hears the losses that wait."""
        count = len(self._waiting)
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            self._losses[:count], self._waiting = self._waiting, []
        self._packed, said = self._programs.tick(self._packed, self._losses, np.int32(count))
        return self._read(said)

    def _catch_up(self) -> None:
        if self._waiting:
            self._hear()

    def decide(self) -> Decision:
        """Takes the decision that `tick` called due."""
        self._catch_up()
        with one_blas_thread():
            packed, said, report = self._programs.decide(self._packed)
            held, chosen, kind, discarded = jax.device_get(report)
        return Decision(self._replace(packed, said).directive, held, chosen, int(kind), int(discarded))

    def observe_eval(self, metric: float) -> bool:
        """Takes a validation metric in, in the direction of the tuner's mode; whether to keep the measured state."""
        self._catch_up()
        sign = -1.0 if self.tuner.mode == "max" else 1.0
        packed, said = self._programs.observe(self._packed, np.float32(sign * metric))
        return bool(self._replace(packed, said).directive.keep)

    def spoil_fork(self) -> None:
        """Lets the running fork begin again, or fail: the training that it led to is not whole."""
        self._catch_up()
        self._packed = self._programs.spoil(self._packed)

    def undo(self) -> None:
        """Takes the last decision or metric back."""
        self._packed, words = self._before
        self._read(words)

    def _replace(self, packed: packing.Packed, said: Any) -> Tick:
        before = self._packed, self._words
        tick = self._read(said)
        self._packed, self._before = packed, before
        return tick

    def _read(self, said: Any) -> Tick:
        words = self._words = np.asarray(said)
        count = len(self._readers)
        self._values = words[:count].view(np.float32).tolist()
        numbers = words[count:].tolist()
        directive, numbers = Directive(*numbers[:_DIRECTIVE_FIELDS]), numbers[_DIRECTIVE_FIELDS:]
        due, self.phase, self.step, saved_step, kept_step, has_fallen, copies, self.saved_data = numbers[:_POSITION]
        self.may_copy, self.data_step = bool(copies), directive.data_step
        self._foresee(words[count + _DIRECTIVE_FIELDS + _POSITION :], bool(has_fallen))
        return Tick(directive, bool(due), saved_step, kept_step, bool(has_fallen))

    def _foresee(self, words: np.ndarray, has_fallen: bool) -> None:
        """Takes in the outlook, if there is one; see `_foretold`."""
        steps, verdict, saved, kept = words[:_SLOTS].tolist() or (0, 0, -1, -1)
        # After the last of them something may be due.
        self._may_wait = max(steps - 1, 0)
        if self._may_wait:
            self._low, self._high, *rows = words[_SLOTS:].view(np.float32).tolist()
            size = len(self._readers)
            self._later = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
            nothing = Directive(**{**dict.fromkeys(Directive._fields, 0), "verdict": verdict})
            self._calm = Tick(nothing, False, saved, kept, has_fallen)

    # Across processes.

    def to_bytes(self) -> np.ndarray:
        """The state as one vector of bytes; `from_bytes` takes it back."""
        return np.concatenate([array.reshape(-1).view(np.uint8) for array in self._on_host().arrays])

    def from_bytes(self, data: np.ndarray, *, extend: bool = False) -> None:
        """Takes back what `to_bytes` gave, on request with another budget.

        Raises:
          ValueError: It is the state of another tuner; see `AutoTuneNet.check`.
        """
        here = self._on_host()
        ends = np.cumsum([array.nbytes for array in here.arrays])
        if data.size != ends[-1]:
            raise ValueError(
                f"the state is of another tuner: it has {data.size} bytes, and this one's {ends[-1]}. "
                "Make the AutoTuneNet as it was when the state was saved."
            )
        parts = zip(np.split(np.asarray(data, np.uint8), ends[:-1]), here.arrays, strict=True)
        arrays = tuple(part.copy().view(array.dtype).reshape(array.shape) for part, array in parts)
        saved = dataclasses.replace(here, arrays=arrays).to_device()
        self._begin(self.tuner.taken_over(saved, extend=extend))

    def _on_host(self) -> Any:
        return copy_tree_to_host(self.state)


def _reader(param: Any) -> Any:
    """From a float32 as the controller gives it to the Python object that a user named."""
    if isinstance(param, Float):
        return float
    if isinstance(param, Int):
        return lambda value: round(value)
    options = param.options
    if isinstance(param, Choice) and param.is_numeric:
        return lambda value: min(options, key=lambda option: abs(option - value))
    return lambda value: options[round(value)]
