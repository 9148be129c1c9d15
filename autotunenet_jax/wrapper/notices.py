"""What the user of a tuned optimizer is told, where the host looks anyway."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..compiler import cpu_queue, packing
from ..controller.state import TRAIN
from ..session.notices import BAD_SHARE, MANY_ROLLBACKS, MISSED_SHARE, are_many, bound_at, of_slow
from ..user_warning import warn
from .bookkeeping import MAX_ATTEMPTS
from .state import AutotuneState

# Updates without a single loss after which the user is told.
_SILENT_STEPS = 20
# Updates on one way back to a snapshot that are more than a clipped one takes.
_LONG_WAY = 16

# Texts stay the same, so that Python shows each once.
_SILENT = (
    "autotune has not been told a single loss, so it tunes nothing. "
    "Pass value=loss to update, or call autotunenet_jax.observe(opt_state, loss) after each step."
)
_AT_BOUND = "{name} lies at the {end} bound of its range, {bound:g}; the best value may lie beyond. Widen the range."
HOW = "Report one by autotunenet_jax.observe_eval(opt_state, metric) where wants_eval(opt_state) asks for it"
"""How a metric is reported."""

_BAD = (
    f"a hundred steps, or {BAD_SHARE:.0%} of them, were skipped or more, since loss or gradients were not finite. "
    "Look for bad batches in the data, or for a loss that divides by zero."
)
_ROLLBACKS = (
    f"training went back to a snapshot {MANY_ROLLBACKS} times or more. "
    "Lower the upper bound of the learning rate, or look at what breaks it: opt_state.tuner.health tells."
)

_SHORTENED = (
    f"a way back to a snapshot takes more than {_LONG_WAY} updates, in which nothing is learned: something after "
    "autotune in the chain changes them, such as clipping or a decay of weights. Put it into the optimizer inside."
)
_SPENT = (
    "autotune has had more updates than its total_steps: nothing is tuned any more, and a decayed rate is zero. "
    "Give it the number of updates that are made, or extend its budget by autotunenet_jax.extend."
)


def tell(state: AutotuneState, *, waits: bool = False) -> None:
    """Warns of what there is to say; where the device still works on the state, only if it may be waited for."""
    if not state.settings.is_on:
        return
    if waits:
        packing.wait(state.packed)
    for text in _texts(state):
        warn(text)


def tell_of_queue(updates: Any) -> None:
    """Warns that steps on several devices may hang, where they may."""
    text = cpu_queue.hazard(updates)
    if text is not None:
        warn(f"autotune: {text}")


def _texts(state: AutotuneState) -> Iterator[str]:
    places: Any = packing.positions(state.settings.layout)
    tuner = places.tuner

    def number(place: tuple[str | None, int], offset: int = 0) -> Any:
        return packing.read_number(state.packed, (place[0], place[1] + offset))

    step, lag = number(tuner.step), number(places.lag)
    if step is None or lag is None:
        return
    if step == 0:
        if lag >= _SILENT_STEPS:
            yield _SILENT
        return
    if number(places.home) and number(places.attempts) < MAX_ATTEMPTS - _LONG_WAY:
        yield _SHORTENED
    health, space = tuner.health, state.settings.core.space
    if are_many(number(health.bad_steps), step):
        yield _BAD
    if number(tuner.rollbacks) >= MANY_ROLLBACKS:
        yield _ROLLBACKS
    total = number(tuner.plan.total)
    if total and step > total:
        yield _SPENT
    is_seen, is_late = not np.isnan(number(tuner.validation.level)), step >= MISSED_SHARE * total
    if total and is_late and not is_seen:
        yield from (notice.message for notice in of_slow(space, HOW))
    if number(tuner.phase) != TRAIN or number(tuner.round.index) < 1 or not is_late:
        return
    has_gone_back = number(tuner.rollbacks) > 0 or number(tuner.validation.retreats) > 0
    for k, (name, role) in enumerate(zip(space.names, space.roles, strict=True)):
        u = number(tuner.incumbent, k)
        side = bound_at(space, name, u, is_seen=is_seen, has_gone_back=has_gone_back) if role == "rate" else None
        if side:
            bound = float(space[name].decode(jnp.float32(side == "upper")))
            yield _AT_BOUND.format(name=name, end=side, bound=bound)
