"""What the controller needs to know of a search space: which hyperparameters are rates, which slow, how wide it is."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..space.search_space import Choice, SearchSpace
from ..space.search_space import Float as FloatParameter
from ..space.search_space import Int as IntParameter

LINE_STEP_DECADES = 0.5
"""Step of the line search over the rates."""


class Roles(NamedTuple):
    """Constants of a search space, as arrays over its dimensions.

    Attributes:
      is_rate: Scaled by the schedule, searched in decades, and moved together.
      is_slow: Shows in long forks and on held-out data only.
      decades: Width of the range; a linear one counts four.
      step: Of a line search, in the unit cube: half a decade, or to the next value where those are further apart.
      batch_size: Name of the batch size, if it is tuned, and the middle of its range on a log scale.
    """

    is_rate: np.ndarray
    is_slow: np.ndarray
    decades: np.ndarray
    step: np.ndarray
    batch_size: tuple[str, float] | None

    def shifted(self, u: Float[Array, "d"], decades: Array | float) -> Float[Array, "d"]:
        """The point ``u`` with its rates moved by so many decades, inside the cube; half a decade changes them."""
        moved = decades / self.decades
        if np.any(self.is_rate & (self.step > LINE_STEP_DECADES / self.decades)):
            far = jnp.maximum(jnp.abs(moved), self.step) * jnp.sign(moved)
            moved = jnp.where(jnp.abs(decades) >= LINE_STEP_DECADES, far, moved)
        return jnp.clip(u + jnp.where(self.is_rate, moved, 0.0), 0.0, 1.0)


def _is_batch_size(name: str, p: FloatParameter | IntParameter | Choice) -> bool:
    if name.rsplit("/", 1)[-1] != "batch_size":
        return False
    if isinstance(p, Choice):
        return p.is_numeric and min(p.options) > 0
    return p.lo > 0


def _width(p: FloatParameter | IntParameter | Choice) -> float:
    """Decades from one end of the unit interval to the other."""
    if not isinstance(p, Choice):
        return math.log10(p.hi / p.lo) if p.log else 4.0
    if not p.is_numeric or p.options[0] <= 0 or list(p.options) != sorted(p.options):
        return 4.0
    # Options are the middles of their cells.
    return math.log10(p.options[-1] / p.options[0]) / (1.0 - _cell(p))


def _cell(p: FloatParameter | IntParameter | Choice) -> float:
    """Greatest distance of two neighbouring values in the unit interval."""
    if isinstance(p, Choice):
        return 1.0 / len(p.options)
    if isinstance(p, FloatParameter):
        return 0.0
    if not p.log:
        return 1.0 / (p.hi - p.lo + 1)
    return math.log((p.lo + 1) / p.lo) / math.log((p.hi + 0.5) / (p.lo - 0.5))


@functools.lru_cache(maxsize=64)
def roles_of(space: SearchSpace) -> Roles:
    """The roles of a space's dimensions."""

    def middle(p: FloatParameter | IntParameter | Choice) -> float:
        sizes = [float(option) for option in p.options] if isinstance(p, Choice) else [p.lo, p.hi]
        return math.exp(sum(map(math.log, sizes)) / len(sizes))

    decades = np.array([_width(p) for _, p in space.params], np.float32)
    sizes = [(name, middle(p)) for name, p in space.params if _is_batch_size(name, p)]
    return Roles(
        is_rate=np.array([role == "rate" for role in space.roles]),
        is_slow=np.array([role == "slow" for role in space.roles]),
        decades=decades,
        step=np.maximum(LINE_STEP_DECADES / decades, np.array([_cell(p) for _, p in space.params], np.float32)),
        batch_size=sizes[0] if sizes else None,
    )
