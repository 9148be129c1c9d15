"""The state before the first step, and the values it starts from, each in one compiled function."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ..space.search_space import Choice, SearchSpace
from ..space.search_space import Float as FloatParameter
from . import fork_round, fork_surrogate
from .plan import Plan
from .state import (
    FORK,
    FORMAT,
    KEY_IMPL,
    OUTCOME_NONE,
    SWEEP,
    TRAIN,
    Slots,
    TunerState,
    empty_range_test,
    empty_round,
    empty_window,
    no_health,
    no_validation,
)

# Where slow hyperparameters on a linear scale start when the user names no value: little regularisation, not none.
_SLOW_START = 0.2

PARTS = ("search space", "plan", "policy")
"""What a state's fingerprint tells apart."""


def fingerprint(space: SearchSpace, plan: Plan, policy: Any) -> np.ndarray:
    """Digests of what a state is only good for; uint32[3], in the order of `PARTS`."""
    described = (space.params, [np.asarray(column).tolist() for column in plan], policy)
    digests = [hashlib.sha256(repr(part).encode()).digest()[:4] for part in described]
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint32)


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
    space: SearchSpace, capacity: int, *, key: PRNGKeyArray, start: Mapping[str, Any], plan: Plan, digests: np.ndarray
) -> TunerState:
    """The state before the first step.

    Raises:
      ValueError: JAX is told to raise at every NaN or infinity, and here they stand for what is not known yet.
    """
    flags = [name for name in ("jax_debug_nans", "jax_debug_infs") if getattr(jax.config, name)]
    if flags:
        raise ValueError(
            f"{' and '.join(flags)} would stop the tuner, whose state has NaN and infinity for what is not known yet; "
            f"steps that give NaN are skipped and counted. Switch it off, jax.config.update({flags[0]!r}, False), and "
            "look for NaN in a step of your own without the tuner."
        )
    starts_now, has_test = int(plan.start[0]) == 0, int(plan.range_test[0]) > 0
    phase = (SWEEP if has_test else FORK) if starts_now else TRAIN
    segment = (plan.range_test[0] if has_test else plan.length[0]) if starts_now else plan.start[0]
    given = {name: as_argument(space[name], start[name]) for name in space.names if name in start}
    return _first(space, capacity, key, given, plan, np.int32(phase), np.int32(segment), digests)


def as_argument(param: Any, value: Any) -> Any:
    """A value as a compiled function can take it."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    if isinstance(param, Choice) and not param.is_numeric:
        is_position = isinstance(value, np.number)
        return np.int32(value if is_position else param.position(value))
    return np.float32(value)


def _words(key: Array) -> Array:
    """The key as the state holds it; a generator of another kind draws one."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if str(jax.random.key_impl(key)) != KEY_IMPL:
        key = jax.random.key(jax.random.bits(key), impl=KEY_IMPL)
    return jax.random.key_data(key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first(
    space: SearchSpace,
    capacity: int,
    key: PRNGKeyArray,
    given: dict[str, Any],
    plan: Plan,
    phase: Array,
    segment: Array,
    digests: Array,
) -> TunerState:
    incumbent = space.snap(space.encode({**defaults(space), **given}))
    zero = jnp.zeros((), jnp.int32)
    held = empty_round(space.dims, 0)
    state = TunerState(
        format=jnp.int32(FORMAT),
        fingerprint=digests,
        key=_words(key),
        step=zero,
        data_step=zero,
        phase=phase,
        segment_left=segment,
        segment_length=segment,
        incumbent=incumbent,
        trial=incumbent,
        discarded=zero,
        rollbacks=zero,
        anneal_start=jnp.int32(-1),
        anneal_steps=zero,
        outcome=jnp.int32(OUTCOME_NONE),
        health=no_health(),
        range_test=empty_range_test(),
        window=empty_window(),
        round=held._replace(x=jnp.broadcast_to(incumbent, held.x.shape)),
        slots=Slots(zero, zero, zero, zero),
        validation=no_validation(),
        knowledge=fork_surrogate.no_knowledge(space, capacity, incumbent),
        plan=plan,
    )
    in_fork = fork_round.length_at(space, state, incumbent)
    segment = jnp.where(phase == FORK, in_fork, segment)
    state = state._replace(segment_left=segment, segment_length=segment)
    # Leaves share buffers neither with each other nor with the caller, or donating one would donate another.
    return jax.tree.map(jnp.copy, state)
