"""The compiled controller as a plain object: losses in, Python numbers out.

A compiled function pays for each array it takes and returns, and the controller's state has some ninety small ones.
Those that a training step reads or writes, a fifth of all numbers, are packed apart from the others, which steps do not
touch. And losses that need no answer, which the controller tells of beforehand, wait for the next that may need one:
they are heard together, in one call, with the same result as one by one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..compiler import packing
from ..compiler.blas_threads import one_blas_thread
from ..controller import AutoTuneNet
from ..controller.fork_score import spoiled
from ..controller.outlook import MOST
from ..controller.rollback import may_copy
from ..controller.state import Directive, TunerState
from ..controller.validation_monitor import kept_at_once
from ..space.search_space import Choice, Float, Int
from .session import Decision, Tick

_DIRECTIVE_FIELDS = len(Directive._fields)
# Numbers that follow the directive in what a program says, and that begin an outlook; see `_spoken` and `_foretold`.
_POSITION, _SLOTS = 8, 4


def touched(function: Callable[..., Any], tree: Any, *arguments: Any) -> frozenset[int]:
    """Which leaves of ``tree`` matter to ``function(tree, *arguments)``, whose first result is the next such tree.

    The others come back in their own place as they were, and nothing is computed from them.
    """
    traced = jax.make_jaxpr(function)(tree, *arguments).jaxpr
    count = len(jax.tree.leaves(tree))
    inputs, outputs = traced.invars[:count], traced.outvars
    used = {id(variable) for equation in traced.eqns for variable in equation.invars}
    used |= {id(variable) for variable in outputs[count:]}
    kept = [id(before) == id(after) for before, after in zip(inputs, outputs[:count], strict=True)]
    return frozenset(i for i in range(count) if not kept[i] or id(inputs[i]) in used)


class _Halves(NamedTuple):
    """A state in two parts: what a step touches, and the rest."""

    live: packing.Packed
    idle: packing.Packed


class _Programs:
    """The compiled functions of one controller, on packed states."""

    def __init__(self, core: Any, like: TunerState, live: frozenset[int]):
        leaves, structure = jax.tree.flatten(like)
        order = sorted(range(len(leaves)), key=lambda number: number not in live)
        layouts = [packing.layout([leaves[n] for n in order if (n in live) == side]) for side in (True, False)]
        idle_like = [leaf for number, leaf in enumerate(leaves) if number not in live]

        def pack(ts: TunerState) -> _Halves:
            flat = jax.tree.leaves(ts)
            return _Halves(*(packing.pack([flat[n] for n in order if (n in live) == side]) for side in (True, False)))

        def unpack(live: packing.Packed, idle: packing.Packed | None = None) -> TunerState:
            rest = map(_zeros, idle_like) if idle is None else packing.unpack(idle, layouts[1])
            flat: list[Any] = [None] * len(leaves)
            for number, leaf in zip(order, [*packing.unpack(live, layouts[0]), *rest], strict=True):
                flat[number] = leaf
            return jax.tree.unflatten(structure, flat)

        def begin(ts: TunerState) -> Any:
            return pack(ts), _spoken(core, _nothing(ts), False, ts, ts.slots)

        def tick(live: packing.Packed, losses: jax.Array, count: Any) -> Any:
            def hear(number: Any, carry: Any) -> Any:
                ts, numbers = _tick(core, unpack(carry[0]), losses[number])
                return pack(ts).live, numbers

            ts = unpack(live)
            nothing = _numbers(_nothing(ts), False, ts, ts.slots)
            live, numbers = jax.lax.fori_loop(0, count, hear, (live, nothing))
            return live, _foretold(core, unpack(live), numbers)

        def decide(halves: _Halves) -> Any:
            before = unpack(*halves)
            ts, directive, held = core.decide(before)
            said = _spoken(core, directive, False, ts, before.slots)
            return pack(ts), said, (held, core.space.decode(ts.incumbent), ts.plan.kind[held.index], ts.discarded)

        def observe(halves: _Halves, metric: Any) -> Any:
            ts, keeps = kept_at_once(core.observe_eval(unpack(*halves), metric))
            return pack(ts), _spoken(core, _nothing(ts)._replace(keep=keeps), False, ts, ts.slots)

        def spoil(halves: _Halves) -> _Halves:
            return pack(spoiled(unpack(*halves)))

        self.begin, self.unpack, self.spoil = jax.jit(begin), jax.jit(unpack), jax.jit(spoil)
        self.tick = jax.jit(tick, donate_argnums=0)
        # Not donated: they may have to be undone.
        self.decide, self.observe = jax.jit(decide), jax.jit(observe)


def _zeros(leaf: Any) -> jax.Array:
    if not _is_key(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.wrap_key_data(jnp.zeros(jax.eval_shape(jax.random.key_data, leaf).shape, jnp.uint32))


def _nothing(ts: TunerState) -> Directive:
    fields: dict[str, Any] = dict.fromkeys(Directive._fields, 0)
    return Directive(**{**fields, "data_step": ts.data_step})


def _spoken(core: Any, directive: Directive, due: Any, ts: TunerState, slots: Any) -> jax.Array:
    """All that Python reads after a call, as one int32 vector; hyperparameters first, by their bits."""
    values = jnp.stack([jnp.asarray(value, jnp.float32) for value in core.hyperparams(ts).values()])
    numbers = _numbers(directive, due, ts, slots)
    return jnp.concatenate([jax.lax.bitcast_convert_type(values, jnp.int32), numbers])


def _numbers(directive: Directive, due: Any, ts: TunerState, slots: Any) -> jax.Array:
    numbers = (*directive, due, ts.phase, ts.step, slots.saved_step, slots.kept_step, ts.validation.has_fallen)
    numbers = (*numbers, may_copy(ts), ts.slots.saved_data)
    return jnp.stack([jnp.asarray(number).astype(jnp.int32) for number in numbers])


def _tick(core: Any, before: TunerState, loss: Any) -> tuple[TunerState, jax.Array]:
    ts, directive, due = core.tick(before, loss)
    return ts, _numbers(directive, due, ts, before.slots)


def _foretold(core: Any, ts: TunerState, numbers: jax.Array) -> jax.Array:
    """As `_spoken`, with the outlook: how many losses need no answer, what is said to them, bounds and later values."""
    ahead = core.outlook(ts)
    values = jnp.stack([*ahead.values.values()], axis=1)
    words = jnp.concatenate([values[0], ahead.low[None], ahead.high[None], values[1:].reshape(-1)])
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    slots = jnp.stack([ahead.steps, ahead.verdict, ts.slots.saved_step, ts.slots.kept_step])
    return jnp.concatenate([words[: values.shape[1]], numbers, slots, words[values.shape[1] :]])


@functools.lru_cache(maxsize=16)
def _programs(core: Any, structure: Any, kinds: tuple[Any, ...]) -> _Programs:
    """Compiled once for all controllers alike."""
    like = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds])
    loss = jax.ShapeDtypeStruct((), jnp.float32)

    def step(ts: TunerState, loss: Any) -> Any:
        ts, numbers = _tick(core, ts, loss)
        return ts, _foretold(core, ts, numbers)

    return _Programs(core, like, touched(step, like, loss))


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
        (self._live, self._idle), said = self._programs.begin(jax.device_put(ts, _cpu()))
        self._read(said)

    @property
    def state(self) -> TunerState:
        """The state as the controller knows it."""
        self._catch_up()
        return self._programs.unpack(self._live, self._idle)

    def hyperparams(self) -> dict[str, Any]:
        """Values in force for the next step, as Python objects."""
        readers = zip(self.tuner.space.names, self._readers, self._values, strict=True)
        return {name: read(value) for name, read, value in readers}

    def tick(self, loss: float) -> Tick:
        """Takes the loss of one step in."""
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
        self._live, said = self._programs.tick(self._live, self._losses, np.int32(count))
        return self._read(said)

    def _catch_up(self) -> None:
        if self._waiting:
            self._hear()

    def decide(self) -> Decision:
        """Takes the decision that `tick` called due."""
        self._catch_up()
        with one_blas_thread():
            halves, said, report = self._programs.decide(_Halves(self._live, self._idle))
            held, chosen, kind, discarded = jax.device_get(report)
        return Decision(self._replace(halves, said).directive, held, chosen, int(kind), int(discarded))

    def observe_eval(self, metric: float) -> bool:
        """Takes a validation metric in, in the direction of the tuner's mode; whether to keep the measured state."""
        self._catch_up()
        sign = -1.0 if self.tuner.mode == "max" else 1.0
        halves, said = self._programs.observe(_Halves(self._live, self._idle), np.float32(sign * metric))
        return bool(self._replace(halves, said).directive.keep)

    def spoil_fork(self) -> None:
        """Lets the running fork fail: the training that it led to is not whole."""
        self._catch_up()
        self._live, self._idle = self._programs.spoil(_Halves(self._live, self._idle))

    def undo(self) -> None:
        """Takes the last decision or metric back."""
        (self._live, self._idle), words = self._before
        self._read(words)

    def _replace(self, halves: _Halves, said: Any) -> Tick:
        before = _Halves(self._live, self._idle), self._words
        tick = self._read(said)
        (self._live, self._idle), self._before = halves, before
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
        return np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in self._arrays()])

    def from_bytes(self, data: np.ndarray, *, extend: bool = False) -> None:
        """Takes back what `to_bytes` gave, on request with another budget.

        Raises:
          ValueError: It is the state of another tuner; see `AutoTuneNet.check`.
        """
        arrays = self._arrays()
        ends = np.cumsum([array.nbytes for array in arrays])
        if data.size != ends[-1]:
            raise ValueError(
                f"the state is of another tuner: it has {data.size} bytes, and this one's {ends[-1]}. "
                "Make the AutoTuneNet as it was when the state was saved."
            )
        parts = np.split(np.asarray(data, np.uint8), ends[:-1])
        leaves, structure = jax.tree.flatten(self.state)
        new = [part.copy().view(array.dtype).reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]
        with jax.default_device(_cpu()):
            new = [
                jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array
                for array, leaf in zip(new, leaves, strict=True)
            ]
        self._begin(self.tuner.taken_over(jax.tree.unflatten(structure, new), extend=extend))

    def _arrays(self) -> list[np.ndarray]:
        leaves = jax.tree.leaves(self.state)
        return [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in leaves]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


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
