"""The tuner as a user makes it: eager checks of every argument, and the pure functions as methods."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ..arguments import scalar, whole_number
from ..compiler.precision import in_float32
from ..space.search_space import Choice, SearchSpace
from . import plan as planning
from . import schedule as shapes
from . import validation_monitor
from .core import Core
from .extension import extended
from .first_state import PARTS, defaults, fingerprint, first_state
from .loss_monitor import Guard
from .plan import NEVER
from .rollback import select
from .state import FORMAT, TRAIN, Directive, TunerState


def _check_total_steps(total_steps: Any) -> int | None:
    if total_steps is None:
        return None
    if isinstance(total_steps, bool) or not isinstance(total_steps, numbers.Integral):
        raise TypeError(f"total_steps must be an integer number of training steps, or None; got {total_steps!r}.")
    if not 0 < int(total_steps) < NEVER // 2:
        raise ValueError(f"total_steps must lie between 1 and {NEVER // 2}; got {total_steps!r}.")
    return int(total_steps)


def _check_initial(space: SearchSpace, initial: Mapping[str, Any] | None) -> dict[str, Any]:
    if initial is not None and not isinstance(initial, Mapping):
        raise TypeError(f"initial must be a mapping from names to values to start from; got {initial!r}.")
    initial = dict(initial or {})
    for name, value in initial.items():
        if name not in space:
            raise ValueError(
                f"initial names {name!r}, which is not in the search space; it has {', '.join(space.names)}."
            )
        if isinstance(value, str) and not isinstance(space[name], Choice):
            raise TypeError(f"initial[{name!r}] must be a number; got {value!r}, which is text.")
        if not space[name].contains(value):
            raise ValueError(
                f"initial[{name!r}] = {value!r} lies outside the declared {space[name]!r}. "
                "Widen the range or start inside it."
            )
    return initial


def _by_name(space: SearchSpace) -> SearchSpace:
    """The space with its names in alphabetical order, so that states fit whatever order they were given in."""
    return SearchSpace(dict(sorted(space.params)))


class AutoTuneNet:
    """Tunes hyperparameters while one training run goes on.

    A pure controller: it holds no state of its own. `init` gives a `TunerState`; once per training step `update` takes
    the loss and returns the next state and a `Directive` that the loop carries out. `fit` is a ready loop, `autotune`
    does it inside an optax optimizer.

    Example:
        >>> import jax
        >>> tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=1000, initial={"learning_rate": 1e-5})
        >>> ts = tuner.init(jax.random.key(0))
        >>> hp = tuner.hyperparams(ts)
        >>> ts, directive = tuner.update(ts, jnp.float32(2.3))
        >>> int(ts.step)
        1

    Args:
      param_space: A `SearchSpace`, or a mapping it takes.
      total_steps: Training steps of the whole run, forks included. With it the rate decays to zero at the end. None
        for an open-ended run: rounds come at doubling intervals and `anneal` starts a decay.
      initial: Values to start from, any subset of the names. The others start in the middle of their range, slow ones
        on a linear scale at a fifth of it.
      mode: Whether the validation metric of `observe_eval` is minimised (``"min"``) or maximised (``"max"``). The loss
        of `update` is always minimised.
      guard: Thresholds of the watch over training.
      max_share: Most of the budget that discarded steps may take, in (0, 1). By default 0.25 at a thousand steps, up
        to 0.4 in shorter runs and less in longer ones, or 0.45 when slow hyperparameters are tuned.
      decay: Shape of the base schedule on the budget spent: ``"hold"`` (the rate is held for 60 % and then falls
        linearly to zero), ``"linear"``, ``"cosine"``, ``"none"``, or a function from the share of the budget that is
        spent to a factor.
      schedule: An optax schedule in the place of ``decay``: its shape is kept, warm-up included, and its peak tuned.
      warmup_steps: Steps over which the rates rise to their value at the beginning of training. A fork rises within a
        quarter of its own steps, so that rates are compared at what they claim.
      capacity: Observations the surrogate keeps.
      recipe: Proportions of the plan; for experts.

    Raises:
      TypeError: An argument of the wrong type.
      ValueError: A bad space, an unknown or out-of-range initial value, a budget too small for one round, or an
        unknown mode, decay or schedule.

    Cost:
      `update` is O(1) outside decisions. A decision is one surrogate fit and one acquisition, O(capacity^3).
    """

    def __init__(
        self,
        param_space: Any,
        total_steps: int | None = None,
        *,
        initial: Mapping[str, Any] | None = None,
        mode: Literal["min", "max"] = "min",
        guard: Guard | None = None,
        max_share: float | None = None,
        decay: shapes.Decay | Callable[[Array], Array] = "hold",
        schedule: Callable[[Any], Any] | None = None,
        warmup_steps: int = 0,
        capacity: int = 64,
        recipe: planning.Recipe | None = None,
    ):
        self.space = _by_name(SearchSpace(param_space))
        self.total_steps = _check_total_steps(total_steps)
        self.initial = _check_initial(self.space, initial)
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max'; got {mode!r}.")
        if max_share is not None and not (isinstance(max_share, numbers.Real) and 0.0 < max_share < 1.0):
            raise ValueError(f"max_share must lie strictly between 0 and 1; got {max_share!r}.")
        if guard is not None and not isinstance(guard, Guard):
            raise TypeError(f"guard must be a Guard; got {guard!r}.")
        most = None if self.total_steps is None else self.total_steps - 1
        warmup_steps = whole_number("warmup_steps", warmup_steps, least=0, most=most)
        self.mode: Literal["min", "max"] = mode
        self.capacity = whole_number("capacity", capacity, least=4 * planning.MAX_FORKS)
        self.recipe = recipe or planning.Recipe()
        self.max_share = max_share
        self.plan = planning.make(self.space, self.total_steps, recipe=self.recipe, share=max_share)
        self.core = Core(
            space=self.space,
            guard=guard or Guard(),
            shape=shapes.shape_of(decay, schedule, self.total_steps),
            warmup_steps=warmup_steps,
        )

    def __repr__(self) -> str:
        return f"AutoTuneNet({self.space!r}, total_steps={self.total_steps}, mode={self.mode!r})"

    @in_float32
    def start(self) -> dict[str, Any]:
        """The values the run starts from, by name."""
        return {**defaults(self.space), **self.initial}

    @in_float32
    def init(self, key: PRNGKeyArray, *, start: Mapping[str, Any] | None = None) -> TunerState:
        """The state before the first step; the loop's saved and kept copies are of the initial training state.

        Args:
          key: A typed PRNG key, or a legacy uint32 one.
          start: Values to start from where ``initial`` names none; arrays under jit too.

        Raises:
          TypeError: ``key`` is no random key.
          ValueError: ``jax_debug_nans`` or ``jax_debug_infs`` is on: NaN and infinity stand for what is not known yet.
        """
        if not hasattr(key, "dtype") or (np.shape(key) == () and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
            raise TypeError(f"key must be a random key, such as jax.random.key(0); got {key!r}.")
        return first_state(
            self.space,
            self.capacity,
            key=key,
            start={**(start or {}), **self.initial},
            plan=self.plan,
            digests=self._fingerprint(),
        )

    def _fingerprint(self) -> np.ndarray:
        shape = shapes.described(self.core.shape)
        policy = (self.core.guard, shape, self.core.warmup_steps, self.capacity, self.mode)
        return fingerprint(self.space, self.plan, policy)

    def check(self, ts: TunerState) -> None:
        """Whether a state is one of this tuner's: what `fit` and the adapters ask before they go on from a snapshot.

        Host only. The order in which the names of a space are given makes no difference.

        Raises:
          ValueError: It is of another version, search space, plan (such as another ``total_steps``) or policy (guard,
            schedule, warm-up, capacity, mode); the message says which.
        """
        if int(ts.format) != FORMAT:
            raise ValueError(
                f"the tuner's state has format {int(ts.format)}, this version reads {FORMAT}. "
                "Go on with the version that wrote it."
            )
        differs = np.asarray(ts.fingerprint) != self._fingerprint()
        if differs.any():
            parts = " and ".join(part for part, other in zip(PARTS, differs, strict=True) if other)
            held, told, way = int(ts.plan.total) or None, "", ""
            if held != self.total_steps:
                told = f": total_steps was {held}, and is {self.total_steps} here"
                way = ' Another budget is gone on to by `AutoTuneNet.extend`, or a loop\'s resume="extend".'
            raise ValueError(
                f"the tuner's state was made with another {parts}{told}. "
                f"Make the AutoTuneNet as it was when the state was saved.{way}"
            )

    def taken_over(self, ts: TunerState, *, extend: bool = False) -> TunerState:
        """A state that was saved, to go on from: one of this tuner's or, to extend, one with another budget. Host only.

        Raises:
          ValueError: It is neither; see `check` and `extend`.
        """
        held, total = int(ts.plan.total) or None, self.total_steps
        if extend and total is not None and held != total and int(ts.format) == FORMAT:
            ts = self.with_total_steps(held).extend(ts, total_steps=total)
        self.check(ts)
        return ts

    def with_total_steps(self, total_steps: int | None) -> "AutoTuneNet":
        """The same tuner for another budget; a schedule over steps is the same function of the step."""
        shape = self.core.shape
        return AutoTuneNet(
            self.space,
            total_steps,
            initial=self.initial,
            mode=self.mode,
            guard=self.core.guard,
            max_share=self.max_share,
            decay="hold" if shape.steps else shape.form,
            schedule=shape.form if shape.steps else None,
            warmup_steps=self.core.warmup_steps,
            capacity=self.capacity,
            recipe=self.recipe,
        )

    def extend(self, ts: TunerState, *, total_steps: int) -> TunerState:
        """The state of a run that goes on to another budget, longer or shorter, from wherever it is. Host only.

        The rounds that were held stay held, the others are laid anew over what remains, and the decay follows the new
        budget. From here on the state is one of ``AutoTuneNet(..., total_steps=total_steps)``.

        Example:
            >>> import jax
            >>> tuner = AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=1000)
            >>> ts = tuner.extend(tuner.init(jax.random.key(0)), total_steps=3000)
            >>> AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, total_steps=3000).check(ts)

        Raises:
          TypeError: ``total_steps`` is not an integer.
          ValueError: It does not exceed the steps done or is too small for a plan, or the state is another tuner's.
        """
        self.check(ts)
        if total_steps is None:
            raise TypeError("total_steps must be an integer number of training steps; got None.")
        other = self.with_total_steps(total_steps)
        return extended(ts, other.plan, other._fingerprint())

    def hyperparams(self, ts: TunerState) -> dict[str, Array]:
        """Values in force for the next step: schedule, fork and cool-down applied. Jit-able; O(d).

        Every value lies inside its bounds, except that a rate's decay, warm-up and cool-down may take it below ``lo``.
        """
        return self.core.hyperparams(ts)

    def update(self, ts: TunerState, loss: Any) -> tuple[TunerState, Directive]:
        """Takes in the loss of the step just done. Pure; jit, scan, vmap and donation all work.

        Args:
          ts: State before the step.
          loss: Scalar, any real dtype. NaN says that the step was skipped, or has to be: it counts for nothing, and
            eight in a row are answered with a rollback. Never an error.

        Returns:
          The next state, and what the loop must do before its next step.

        Raises:
          TypeError: The loss is no real number.
          ValueError: It is no scalar.
        """
        return self.core.update(ts, scalar("loss", loss))

    def observe_eval(self, ts: TunerState, metric: Any) -> TunerState:
        """Takes in a validation metric of the current training state, in the direction of ``mode``. Pure; O(1).

        Forks are compared by it when it is reported each time `Directive.evaluate` asks for it. One that is not finite
        says that the state is broken; where none was asked for, it says nothing.

        Raises:
          TypeError: The metric is no real number.
          ValueError: It is no scalar.
        """
        metric = scalar("metric", metric).astype(jnp.float32)
        told = self.core.observe_eval(ts, -metric if self.mode == "max" else metric)
        return select(validation_monitor.is_heard(ts, metric), told, ts)

    @in_float32
    def anneal(self, ts: TunerState, steps: int) -> TunerState:
        """Starts a decay of the rates to zero over the next ``steps`` steps, and holds no more rounds. Pure.

        Raises:
          ValueError: ``steps`` is below 1.
        """
        if isinstance(steps, numbers.Integral) and int(steps) < 1:
            raise ValueError(f"steps must be at least 1; got {steps!r}. Say over how many steps the rates decay.")
        return ts._replace(
            # A copy: no two leaves of a state that is donated may share a buffer.
            anneal_start=jnp.copy(ts.step),
            anneal_steps=jnp.asarray(steps, jnp.int32),
            plan=ts.plan._replace(start=jnp.full_like(ts.plan.start, NEVER)),
            segment_left=jnp.where(ts.phase == TRAIN, NEVER, ts.segment_left),
        )
