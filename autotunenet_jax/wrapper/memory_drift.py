"""``memory="drift"``, tuning without snapshots: small moves, judged by how fast the loss falls while in force.

The forks of a round follow one another in the one state there is, so a later fork starts from a lower loss. Each is
judged as if it had started where the round did: the fall since is added back to its losses.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..controller.plan import FAST, MAX_ROUNDS, NEVER, SLOW, Plan
from ..controller.roles import roles_of
from ..controller.state import FORK, TRAIN, TunerState
from ..space.search_space import SearchSpace

# How far one round may move: a rate in decades, anything else in the unit cube.
_REACH_DECADES = 0.3
_REACH = 0.15

# Memory of the running level, in steps: long enough to see through noise, short against a fork.
_LEVEL_MEMORY = 10

_ROUNDS = 12
_FORK_SHARE = 0.015
_FORKS = 3
_FIRST_ROUND, _LAST_ROUND = 0.04, 0.75
_OPEN_ENDED_STEPS = 2000


class Drift(NamedTuple):
    """Running level of the loss, and how far it (and the validation metric) fell before the running fork began."""

    level: Float[Array, ""]
    origin: Float[Array, ""]
    fall: Float[Array, ""]
    eval_last: Float[Array, ""]


def init() -> Drift:
    """No loss seen yet."""
    nan = np.float32(np.nan)
    return Drift(jnp.array(nan), jnp.array(nan), jnp.zeros((), jnp.float32), jnp.array(nan))


def plan(space: SearchSpace, base: Plan) -> Plan:
    """A plan of many small rounds; steps are never thrown away here, so they are cheap."""
    total = int(base.total) or _OPEN_ENDED_STEPS
    length = max(round(_FORK_SHARE * total), 10)
    is_slow = [role == "slow" for role in space.roles]
    kinds = [kind for kind, is_there in ((FAST, not all(is_slow)), (SLOW, any(is_slow))) if is_there]
    spacing = max((_LAST_ROUND - _FIRST_ROUND) * total / _ROUNDS, 1.2 * _FORKS * length)
    starts = np.arange(_FIRST_ROUND * total, _LAST_ROUND * total, spacing)[:MAX_ROUNDS].astype(np.int32)
    if not int(base.total):
        starts = np.concatenate([starts, (2 ** np.arange(1, 12) * total)])[:MAX_ROUNDS].astype(np.int32)
    count = len(starts)

    def column(values: Any, padding: int) -> np.ndarray:
        out = np.full(MAX_ROUNDS, padding, np.int32)
        out[:count] = values
        return out

    return base._replace(
        start=column(starts, NEVER),
        kind=column([kinds[i % len(kinds)] for i in range(count)], FAST),
        forks=column(_FORKS, 0),
        length=column(length, 1),
        range_test=np.zeros(MAX_ROUNDS, np.int32),
    )


def feed(drift: Drift, ts: TunerState, loss: Array) -> tuple[Drift, Float[Array, ""]]:
    """Takes a loss in, and says what the tuner is to be told instead."""
    loss = jnp.asarray(loss, jnp.float32)
    known = jnp.where(jnp.isfinite(drift.level), drift.level, loss)
    level = jnp.where(jnp.isfinite(loss), known + (loss - known) / _LEVEL_MEMORY, drift.level)
    return drift._replace(level=level), loss + jnp.where(ts.phase == FORK, drift.fall, 0.0)


def feed_eval(drift: Drift, ts: TunerState, metric: Array) -> tuple[Drift, Float[Array, ""]]:
    """The same for a validation metric, whose level before a fork is the metric at the end of the last one."""
    counts = (ts.phase == FORK) & (ts.segment_left == 1)
    before = jnp.where((ts.round.fork > 0) & jnp.isfinite(drift.eval_last), drift.eval_last, ts.validation.level)
    fall = jnp.where(jnp.isfinite(before) & counts, ts.validation.level - before, 0.0)
    last = jnp.where(counts & jnp.isfinite(metric), metric, drift.eval_last)
    return drift._replace(eval_last=last), metric + jnp.where(jnp.isfinite(fall), fall, 0.0)


def tighten(space: SearchSpace, before: TunerState, after: TunerState) -> TunerState:
    """Keeps a decision's values near those in force, and its books free of losses: no step is thrown away."""
    decades = roles_of(space)
    reach = jnp.asarray(np.where(decades.is_rate, _REACH_DECADES / decades.decades, _REACH), jnp.float32)

    def near(u: Array) -> Array:
        return space.snap(jnp.clip(u, before.incumbent - reach, before.incumbent + reach))

    return after._replace(
        trial=near(after.trial),
        incumbent=near(after.incumbent),
        discarded=jnp.zeros_like(after.discarded),
    )


def mark(drift: Drift, before: TunerState, after: TunerState) -> Drift:
    """Notes the level where a round, or a fork in it, begins."""
    opens = (before.phase == TRAIN) & (after.phase == FORK)
    follows = (before.phase == FORK) & (after.phase == FORK) & (after.round.fork != before.round.fork)
    origin = jnp.where(opens, drift.level, drift.origin)
    fall = jnp.where(opens, 0.0, jnp.where(follows, origin - drift.level, drift.fall))
    return drift._replace(
        origin=origin,
        fall=jnp.where(after.phase == FORK, jnp.where(jnp.isfinite(fall), fall, 0.0), 0.0),
        eval_last=jnp.where(opens, jnp.nan, drift.eval_last),
    )
