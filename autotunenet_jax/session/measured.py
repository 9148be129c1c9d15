"""The best state is copied in the same breath as it is measured: a step later it is another one."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ..controller.state import TunerState


def kept_at_once(ts: TunerState) -> tuple[TunerState, Bool[Array, ""]]:
    """The state after a metric, if a host that has the measured state at hand copies it over the kept one now.

    Returns:
      The state with that in its books, and whether the host has to.
    """
    slots, seen = ts.slots, ts.validation
    keeps = seen.keeps
    slots = slots._replace(
        kept_step=jnp.where(keeps, ts.step, slots.kept_step), kept_data=jnp.where(keeps, ts.data_step, slots.kept_data)
    )
    seen = seen._replace(keeps=jnp.zeros_like(keeps), is_kept=seen.is_kept | keeps)
    return ts._replace(slots=slots, validation=seen), keeps


def is_better(metric: float | None, other: float | None, mode: Any) -> bool:
    """Whether a metric is the better one in the direction of a mode; what is none, or not finite, never is."""
    if metric is None or not math.isfinite(metric):
        return False
    sign = -1.0 if mode == "max" else 1.0
    return other is None or not math.isfinite(other) or sign * metric < sign * other
