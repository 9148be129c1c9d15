"""The controller: a pure phase machine from losses to directives."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from . import _decide, _kernels, _plan, _policy, _tick, _validation
from ._first_state import defaults, first_state
from ._float32 import in_float32
from ._guard import Guard
from ._one_by_one import one_by_one
from ._plan import NEVER
from ._space import SearchSpace
from ._state import (
    FORK,
    SWEEP,
    TRAIN,
    Directive,
    Round,
    TunerState,
)
from ._stored_program import named, stored_program

Decay = Literal["linear", "cosine", "none"]
_DECAYS = ("linear", "cosine", "none")

# The rate is never multiplied by less than this while a fork cools, so that its last steps still move.
_COOL_FLOOR = 0.02

# Share of the run over which rates warm up where training begins again after the first round.
_FRESH_SHARE = 0.02


def when(condition: Array, function: Callable[..., Any], *operands: Any) -> Any:
    """``function(*operands)`` where the condition holds, else the operands as they are.

    A loop of at most one turn: what passes through it unchanged stays in its place. ``jax.lax.cond`` would copy it, and
    under ``jax.vmap`` run the function at every step.
    """

    def turn(carry: Any) -> Any:
        return jnp.zeros_like(condition), function(*carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], turn, (condition, operands))[1]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Core:
    """Everything static that the compiled functions depend on; tuners with equal cores share compilations."""

    space: SearchSpace
    guard: Guard
    policy: _policy.Policy
    surrogate: _kernels.SurrogateConfig
    decay: Decay
    warmup_steps: int

    @in_float32
    def hyperparams(self, ts: TunerState) -> dict[str, Array]:
        pos = _tick.position(ts)
        is_rate = jnp.asarray(_policy.directions(self.space).is_rate)
        sweep_u = pos / jnp.maximum(ts.segment_length - 1, 1)
        swept = jnp.where(is_rate, jnp.clip(sweep_u, 0.0, 1.0), ts.incumbent)
        u = jnp.where(ts.phase == SWEEP, swept, jnp.where(ts.phase == FORK, ts.trial, ts.incumbent))
        hp = self.space.decode(u)
        factor = jnp.where(ts.phase == SWEEP, 1.0, self.schedule(ts) * self._cool_down(ts, pos))
        for name, role in zip(self.space.names, self.space.roles, strict=True):
            if role == "rate":
                hp[name] = hp[name] * factor
        return hp

    @in_float32
    def schedule(self, ts: TunerState) -> Float[Array, ""]:
        """The factor on the rates: a function of the budget spent, forks included."""
        total = ts.plan.total
        planned = jnp.where(ts.anneal_start >= 0, ts.anneal_steps, total)
        begin = jnp.where(ts.anneal_start >= 0, ts.anneal_start, 0)
        left = jnp.clip((begin + planned - ts.step) / jnp.maximum(planned, 1), 0.0, 1.0)
        # Where the decay waits it falls faster afterwards; one that is asked for sets in at once.
        hold = jnp.where(ts.anneal_start >= 0, 0.0, ts.hold)
        left = jnp.maximum(left, jnp.minimum(hold, left / (1.0 - self.policy.held_share)))
        shape = 0.5 * (1.0 - jnp.cos(math.pi * left)) if self.decay == "cosine" else left
        is_open = (planned <= 0) | (self.decay == "none")
        decay = jnp.where(is_open, 1.0, shape)
        # A fresh start warms up over a share of a short run.
        fresh = jnp.clip(_FRESH_SHARE * total, min(self.warmup_steps, _tick.REWARM_STEPS), _tick.REWARM_STEPS)
        fresh = jnp.where(total > 0, fresh, _tick.REWARM_STEPS)
        is_fresh = ts.since_restart < ts.since_rollback
        rewarm = (ts.since_restart + 1.0) / jnp.maximum(jnp.where(is_fresh, fresh, _tick.REWARM_STEPS), 1.0)
        return decay * jnp.minimum(rewarm, 1.0)

    def _cool_down(self, ts: TunerState, pos: Array) -> Float[Array, ""]:
        """A fork warms up briefly and ends with its rate near zero: what it learned is scored, not its noise."""
        length = ts.segment_length
        # The last step of the stretch has the smallest factor; lengths of one or two steps are not cooled.
        cool = (length - pos) / jnp.maximum(jnp.round(_tick.COOL_SHARE * length), 1.0)
        cool = jnp.clip(cool, _COOL_FLOOR, 1.0)
        warm = jnp.where(
            (ts.slots.saved_data == 0) & (ts.round.rung == 0), (pos + 1.0) / max(self.warmup_steps, 1), 1.0
        )
        return jnp.where(ts.phase == FORK, jnp.minimum(cool, jnp.minimum(warm, 1.0)), 1.0)

    def retreat(self, u: Array, decades: Array) -> Array:
        space_of = _policy.directions(self.space)
        return jnp.clip(jnp.where(space_of.is_rate, u - decades / space_of.decades, u), 0.0, 1.0)

    def tick(self, ts: TunerState, loss: Any) -> tuple[TunerState, Directive, Array]:
        return _tick.tick(self.guard, self.retreat, ts, jnp.asarray(loss, jnp.float32))

    @in_float32
    @one_by_one(static_argnums=(0,))
    @stored_program(like=lambda self, ts: (ts, named(Directive), ts.round), static_argnums=(0,))
    def decide(self, ts: TunerState) -> tuple[TunerState, Directive, Round]:
        return _decide.decide(self.surrogate, self.policy, self.space, ts)

    def update(self, ts: TunerState, loss: Array) -> tuple[TunerState, Directive]:
        ts, directive, due = self.tick(ts, loss)
        return self.decide_when(due, ts, directive)

    def decide_when(self, due: Array, ts: TunerState, directive: Directive) -> tuple[TunerState, Directive]:
        """What `tick` gave, or the decision where one is due."""

        def decided(ts: TunerState, first: Directive) -> tuple[TunerState, Directive]:
            ts, second, _ = self.decide(ts)
            return ts, second._replace(verdict=first.verdict)

        return when(due, decided, ts, directive)

    @in_float32
    def observe_eval(self, ts: TunerState, metric: Array) -> TunerState:
        metric = jnp.asarray(metric, jnp.float32)
        is_finite = jnp.isfinite(metric)
        in_score = (ts.phase == FORK) & (ts.segment_left == 1)
        is_settled = (ts.phase == TRAIN) | (ts.step == 0)
        # A validation metric that is not finite makes the fork's score NaN, and so the fork a failure.
        window = ts.window._replace(
            eval_sum=jnp.where(in_score, ts.window.eval_sum + metric, ts.window.eval_sum),
            eval_count=jnp.where(in_score, ts.window.eval_count + 1.0, ts.window.eval_count),
        )
        ts = ts._replace(
            window=window,
            eval_level=jnp.where(is_settled & is_finite, metric, ts.eval_level),
        )
        return _validation.validate(self.retreat, ts, metric, is_settled & is_finite)


def _surrogate_config(space: SearchSpace) -> _kernels.SurrogateConfig:
    space_of = _policy.directions(space)
    # A rate's effect changes over half a decade; other hyperparameters' over about half of their range.
    lengthscales = np.where(space_of.is_rate, 0.6 / space_of.decades, 0.7)
    return _kernels.SurrogateConfig(
        dims=space.dims,
        is_categorical=tuple(bool(flag) for flag in space.is_categorical),
        has_time=True,
        has_groups=True,
        standardise=False,
        lengthscale_loc=tuple(float(math.log(value)) for value in lengthscales),
        lengthscale_scale=0.4,
        signal_loc=math.log(0.25),
        signal_scale=0.6,
        noise_loc=math.log(0.04),
        noise_scale=0.6,
        time_loc=math.log(1.5),
        time_scale=0.4,
        fit_steps=12,
    )


def _check_total_steps(total_steps: Any) -> int | None:
    if total_steps is None:
        return None
    if isinstance(total_steps, bool) or not isinstance(total_steps, numbers.Integral):
        raise TypeError(f"total_steps must be an integer number of training steps, or None; got {total_steps!r}.")
    if not 0 < int(total_steps) < NEVER // 2:
        raise ValueError(f"total_steps must lie between 1 and {NEVER // 2}; got {total_steps!r}.")
    return int(total_steps)


def _check_initial(space: SearchSpace, initial: Mapping[str, Any] | None) -> dict[str, Any]:
    initial = dict(initial or {})
    for name, value in initial.items():
        if name not in space:
            raise ValueError(
                f"initial names {name!r}, which is not in the search space; it has {', '.join(space.names)}."
            )
        if not space[name].contains(value):
            raise ValueError(
                f"initial[{name!r}] = {value!r} lies outside the declared {space[name]!r}. "
                "Widen the range or start inside it."
            )
    return initial


class AutoTuneNet:
    """Tunes hyperparameters while one training run goes on.

    A pure controller: it holds no state of its own. `init` gives a `TunerState`; once per training step `update` takes
    the loss and returns the next state and a `Directive` that the loop carries out. `fit` is a ready loop, `autotune`
    does it inside an optax optimizer.

    Example:
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
      max_share: Most of the budget that discarded fork steps may take, in (0, 1). By default 0.2, or 0.45 when slow
        hyperparameters are tuned.
      decay: Shape of the base schedule on the budget spent: ``"linear"`` or ``"cosine"`` to zero, or ``"none"``.
      warmup_steps: Steps over which a fork that starts at the very beginning raises its rate from zero.
      capacity: Observations the surrogate keeps.
      recipe: Proportions of the plan; for experts.
      policy: Constants of the decisions; for experts.

    Raises:
      TypeError: An argument of the wrong type.
      ValueError: A bad space, an unknown or out-of-range initial value, a budget too small for one round, or an
        unknown mode or decay.

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
        decay: Decay = "linear",
        warmup_steps: int = 5,
        capacity: int = 64,
        recipe: _plan.Recipe | None = None,
        policy: _policy.Policy | None = None,
    ):
        self.space = SearchSpace(param_space)
        self.total_steps = _check_total_steps(total_steps)
        self.initial = _check_initial(self.space, initial)
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max'; got {mode!r}.")
        if decay not in _DECAYS:
            raise ValueError(f"decay must be one of {', '.join(_DECAYS)}; got {decay!r}.")
        if max_share is not None and not 0.0 < max_share < 1.0:
            raise ValueError(f"max_share must lie strictly between 0 and 1; got {max_share!r}.")
        if guard is not None and not isinstance(guard, Guard):
            raise TypeError(f"guard must be a Guard; got {guard!r}.")
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps must be an integer of at least 0; got {warmup_steps!r}.")
        least = 4 * _plan.MAX_FORKS
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < least:
            raise ValueError(f"capacity must be an integer of at least {least}; got {capacity!r}.")
        self.mode: Literal["min", "max"] = mode
        self.capacity = capacity
        self.plan = _plan.make(self.space, self.total_steps, recipe=recipe or _plan.Recipe(), share=max_share)
        self.core = Core(
            space=self.space,
            guard=guard or Guard(),
            policy=policy or _policy.Policy(),
            surrogate=_surrogate_config(self.space),
            decay=decay,
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
        """
        return first_state(
            self.space,
            self.core.policy,
            self.core.surrogate,
            self.capacity,
            key=key,
            start={**(start or {}), **self.initial},
            plan=self.plan,
        )

    def hyperparams(self, ts: TunerState) -> dict[str, Array]:
        """Values in force for the next step: schedule, fork and cool-down applied. Jit-able; O(d).

        Every value lies inside its bounds, except that a rate's decay, warm-up and cool-down may take it below ``lo``.
        """
        return self.core.hyperparams(ts)

    def update(self, ts: TunerState, loss: Any) -> tuple[TunerState, Directive]:
        """Takes in the loss of the step just done. Pure; jit, scan, vmap and donation all work.

        Args:
          ts: State before the step.
          loss: Scalar, any real dtype; non-finite is answered with a rollback, never an error.

        Returns:
          The next state, and what the loop must do before its next step.
        """
        return self.core.update(ts, loss)

    def observe_eval(self, ts: TunerState, metric: Any) -> TunerState:
        """Takes in a validation metric of the current training state, in the direction of ``mode``. Pure; O(1).

        Forks are compared by it when it is reported each time `Directive.evaluate` asks for it.
        """
        metric = jnp.asarray(metric, jnp.float32)
        return self.core.observe_eval(ts, -metric if self.mode == "max" else metric)

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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def decide_jit(core: Core, ts: TunerState) -> tuple[TunerState, Directive, Round]:
    """`Core.decide`, compiled once per core and donated."""
    return core.decide(ts)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def observe_eval_jit(core: Core, ts: TunerState, metric: Array) -> TunerState:
    """`Core.observe_eval`, compiled once per core and donated."""
    return core.observe_eval(ts, metric)


@functools.partial(jax.jit, static_argnums=0)
def hyperparams_jit(core: Core, ts: TunerState) -> dict[str, Array]:
    """`Core.hyperparams`, compiled once per core."""
    return core.hyperparams(ts)
