"""The state before the first step, and the values it starts from, each in one compiled function."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from . import _belief, _guard, _kernels, _observations, _sweep
from ._plan import NEVER, Plan
from ._policy import Policy, directions
from ._space import Choice, SearchSpace
from ._space import Float as FloatParameter
from ._state import (
    FORK,
    OUTCOME_NONE,
    SWEEP,
    TRAIN,
    Slots,
    TunerState,
    empty_round,
    empty_window,
    no_validation,
)

# Where slow hyperparameters on a linear scale start when the user names no value: little regularisation, not none.
_SLOW_START = 0.2


@functools.partial(jax.jit, static_argnums=0)
def defaults(space: SearchSpace) -> dict[str, Array]:
    """Where hyperparameters start of which nothing is said, by name."""
    values = {}
    for name, role in zip(space.names, space.roles, strict=True):
        param = space[name]
        is_linear = isinstance(param, FloatParameter) and not param.log
        values[name] = param.decode(jnp.float32(_SLOW_START if role == "slow" and is_linear else 0.5))
    return values


def first_state(
    space: SearchSpace,
    policy: Policy,
    surrogate: _kernels.SurrogateConfig,
    capacity: int,
    *,
    key: PRNGKeyArray,
    start: Mapping[str, Any],
    plan: Plan,
) -> TunerState:
    """The state before the first step.

    Args:
      space: What may be tuned.
      policy: Constants of the decisions.
      surrogate: What the surrogate consists of.
      capacity: Most observations held.
      key: A typed PRNG key, or a legacy uint32 one.
      start: Values to start from, by name: numbers, arrays, or options of a choice.
      plan: When rounds are held; of NumPy arrays.
    """
    starts_now = int(plan.start[0]) == 0
    has_sweep = starts_now and int(plan.sweep[0]) > 0
    phase = (SWEEP if has_sweep else FORK) if starts_now else TRAIN
    segment = (plan.sweep[0] if has_sweep else plan.early[0]) if starts_now else plan.start[0]
    given = {name: as_argument(space[name], start[name]) for name in space.names if name in start}
    return _first(space, policy, surrogate, capacity, key, given, plan, np.int32(phase), np.int32(segment))


def as_argument(param: Any, value: Any) -> Any:
    """A value as a compiled function can take it."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    if isinstance(param, Choice) and not param.is_numeric:
        is_position = isinstance(value, np.number)
        return np.int32(value if is_position else param.position(value))
    return np.float32(value)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _first(
    space: SearchSpace,
    policy: Policy,
    surrogate: _kernels.SurrogateConfig,
    capacity: int,
    key: PRNGKeyArray,
    given: dict[str, Any],
    plan: Plan,
    phase: Array,
    segment: Array,
) -> TunerState:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    incumbent = space.snap(space.encode({**defaults(space), **given}))
    zero_i = jnp.zeros((), jnp.int32)
    held = empty_round(space.dims, index=0, group=0)
    state = TunerState(
        key=key,
        step=zero_i,
        data_step=zero_i,
        phase=phase,
        segment_left=segment,
        segment_length=segment,
        incumbent=incumbent,
        trial=incumbent,
        has_failed=jnp.zeros((), bool),
        has_faulted=jnp.zeros((), bool),
        retries=zero_i,
        initial_loss=jnp.full((), jnp.nan, jnp.float32),
        best_level=jnp.full((), jnp.inf, jnp.float32),
        eval_level=jnp.full((), jnp.nan, jnp.float32),
        validation=no_validation(),
        discarded=zero_i,
        rollbacks=zero_i,
        relapses=zero_i,
        since_rollback=jnp.int32(NEVER),
        since_restart=jnp.int32(NEVER),
        probation=zero_i,
        promised=jnp.full((), jnp.inf, jnp.float32),
        unmet=zero_i,
        reached=jnp.full((), jnp.inf, jnp.float32),
        last_rates=incumbent,
        hold=jnp.zeros((), jnp.float32),
        rounds_held=zero_i,
        anneal_start=jnp.int32(-1),
        anneal_steps=zero_i,
        outcome=jnp.int32(OUTCOME_NONE),
        window=empty_window(),
        sweep=_sweep.begun(),
        round=held._replace(x=jnp.broadcast_to(incumbent, held.x.shape)),
        slots=Slots(zero_i, zero_i, zero_i, zero_i),
        guard=_guard.init(),
        observations=_observations.empty(capacity, space.dims),
        prior=_belief.first_prior(policy, directions(space), incumbent),
        hyper=_kernels.initial_hyper(surrogate),
        plan=plan,
    )
    # Leaves share buffers neither with each other nor with the caller, or donating one would donate another.
    return jax.tree.map(jnp.copy, state)
