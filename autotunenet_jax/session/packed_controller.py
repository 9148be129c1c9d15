"""The compiled controller as a plain object: losses in, Python numbers out.

A compiled function pays for each array it takes and returns, and the controller's state has some ninety small ones:
they are packed into a few. And losses that need no answer, which the controller tells of beforehand, wait for the next
that may need one: they are heard together, in one call, with the same result as one by one.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoint.memory_copies import copy_tree_to_host
from ..compiler import packing, words
from ..compiler.blas_threads import one_blas_thread
from ..compiler.seldom_run import seldom_run
from ..controller import AutoTuneNet, Core
from ..controller.fork_score import spoiled
from ..controller.outlook import MOST
from ..controller.rollback import may_copy
from ..controller.state import Directive, Slots, TunerState
from ..controller.validation_monitor import kept_at_once
from ..space.search_space import Choice, Float, Int
from .session import Decision, Tick


class _Said(NamedTuple):
    """What Python reads after a call.

    Attributes:
      values: Hyperparameters in force.
      directive: What the loop must do.
      is_due: Whether a decision is.
      phase: Phase of the next step.
      step: Budget spent.
      saved_step: Budget step of the saved state before the call.
      kept_step: Of the kept one.
      has_fallen: Whether the rates have ever fallen by the training loss.
      may_copy: Whether the next loss may ask for a copy of the training.
      saved_data: Position in the data that forks go back to.
    """

    values: Any
    directive: Directive
    is_due: Any
    phase: Any
    step: Any
    saved_step: Any
    kept_step: Any
    has_fallen: Any
    may_copy: Any
    saved_data: Any


class _Foretold(NamedTuple):
    """What is said after a loss, with the outlook.

    Attributes:
      said: Of that loss.
      steps: How many losses need no answer.
      verdict: On each of those.
      saved_step: Budget step of the saved state, as it is said after each of them.
      kept_step: Of the kept one.
      low: Least loss that needs none.
      high: Greatest.
      values: Hyperparameters now and after each of them.
    """

    said: _Said
    steps: Any
    verdict: Any
    saved_step: Any
    kept_step: Any
    low: Any
    high: Any
    values: Any


def _kinds(count: int) -> _Foretold:
    """Shapes and dtypes, for so many hyperparameters."""
    word: Any
    loss: Any
    word, loss = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32))
    values = [jax.ShapeDtypeStruct((*shape, count), jnp.float32) for shape in ((), (MOST,))]
    said = _Said(values[0], Directive(*[word] * len(Directive._fields)), *[word] * (len(_Said._fields) - 2))
    return _Foretold(said, word, word, word, word, loss, loss, values[1])


class _Programs:
    """The compiled functions of one controller, on packed states."""

    def __init__(self, core: Core, like: TunerState):
        layout = packing.layout(like)

        def unpack(packed: packing.Packed) -> TunerState:
            return packing.unpack(packed, layout)

        def begin(ts: TunerState) -> Any:
            return packing.pack(ts), words.pack(_said(core, _nothing(ts), False, ts, ts.slots))

        def tick(packed: packing.Packed, losses: jax.Array, count: Any) -> Any:
            def hear(number: Any, carry: Any) -> Any:
                before = unpack(carry[0])
                ts, directive, due = core.tick(before, losses[number])
                return packing.pack(ts), _numbers(directive, due, ts, before.slots)

            ts = unpack(packed)
            nothing = _numbers(_nothing(ts), False, ts, ts.slots)
            packed, said = jax.lax.fori_loop(0, count, hear, (packed, nothing))
            return packed, words.pack(_foretold(core, unpack(packed), said))

        def decide(packed: packing.Packed) -> Any:
            before = unpack(packed)
            ts, directive, held = core.decide(before)
            ts, keeps = kept_at_once(ts)
            said = words.pack(_said(core, directive, False, ts, before.slots))
            report = held, core.space.decode(ts.incumbent), ts.plan.kind[held.index], ts.discarded, keeps
            return packing.pack(ts), said, report

        def observe(packed: packing.Packed, metric: Any) -> Any:
            ts, keeps = kept_at_once(core.observe_eval(unpack(packed), metric))
            said = _said(core, _nothing(ts)._replace(keep=keeps), False, ts, ts.slots)
            return packing.pack(ts), words.pack(said)

        def spoil(packed: packing.Packed) -> packing.Packed:
            return packing.pack(spoiled(unpack(packed)))

        self.begin, self.unpack, self.spoil = seldom_run(begin), seldom_run(unpack), seldom_run(spoil)
        self.tick = jax.jit(tick, donate_argnums=0)
        # Not donated: they may have to be undone.
        self.decide, self.observe = seldom_run(decide), seldom_run(observe)


def _nothing(ts: TunerState) -> Directive:
    fields: dict[str, Any] = dict.fromkeys(Directive._fields, 0)
    return Directive(**{**fields, "data_step": ts.data_step})


def _numbers(directive: Directive, due: Any, ts: TunerState, slots: Slots) -> _Said:
    """All that is said but the values."""
    said = _Said(
        values=None,
        directive=directive,
        is_due=due,
        phase=ts.phase,
        step=ts.step,
        saved_step=slots.saved_step,
        kept_step=slots.kept_step,
        has_fallen=ts.validation.has_fallen,
        may_copy=may_copy(ts),
        saved_data=ts.slots.saved_data,
    )
    return jax.tree.map(lambda number: jnp.asarray(number).astype(jnp.int32), said)


def _said(core: Core, directive: Directive, due: Any, ts: TunerState, slots: Slots) -> _Said:
    values = [jnp.asarray(value, jnp.float32) for value in core.hyperparams(ts).values()]
    return _numbers(directive, due, ts, slots)._replace(values=jnp.stack(values))


def _foretold(core: Core, ts: TunerState, said: _Said) -> _Foretold:
    ahead = core.outlook(ts)
    values = jnp.stack([*ahead.values.values()], axis=1)
    slots = ts.slots.saved_step, ts.slots.kept_step
    return _Foretold(said._replace(values=values[0]), ahead.steps, ahead.verdict, *slots, ahead.low, ahead.high, values)


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
        foretold = _kinds(len(self._readers))
        self._said_size = words.size(foretold.said)
        self._as_said, self._as_foretold = words.row_reader(foretold.said), words.row_reader(foretold)
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
            held, chosen, kind, discarded, keeps = jax.device_get(report)
        return Decision(self._replace(packed, said).directive, held, chosen, int(kind), int(discarded), bool(keeps))

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
        self._packed, row = self._before
        self._read(row)

    def _replace(self, packed: packing.Packed, said: Any) -> Tick:
        before = self._packed, self._row
        tick = self._read(said)
        self._packed, self._before = packed, before
        return tick

    def _read(self, row: Any) -> Tick:
        """Takes in what a program said."""
        row = self._row = np.asarray(row)
        # Only a loss comes with an outlook; after anything else the next one is heard at once.
        self._may_wait = 0
        if row.size == self._said_size:
            said: _Said = self._as_said(row)
        else:
            foretold: _Foretold = self._as_foretold(row)
            self._foresee(foretold)
            said = foretold.said
        self._values, self.phase, self.step = said.values.tolist(), said.phase, said.step
        self.may_copy, self.saved_data, self.data_step = bool(said.may_copy), said.saved_data, said.directive.data_step
        return Tick(said.directive, bool(said.is_due), said.saved_step, said.kept_step, bool(said.has_fallen))

    def _foresee(self, foretold: _Foretold) -> None:
        # After the last of them something may be due.
        self._may_wait, self._low, self._high = max(foretold.steps - 1, 0), foretold.low, foretold.high
        self._later = foretold.values[1:].tolist()
        nothing = Directive(**{**dict.fromkeys(Directive._fields, 0), "verdict": foretold.verdict})
        has_fallen = bool(foretold.said.has_fallen)
        self._calm = Tick(nothing, False, foretold.saved_step, foretold.kept_step, has_fallen)

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
