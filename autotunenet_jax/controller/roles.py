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


class Roles(NamedTuple):
    """Constants of a search space, as arrays over its dimensions.

    Attributes:
      is_rate: Scaled by the schedule, searched in decades, and moved together.
      is_slow: Shows in long forks and on held-out data only.
      decades: Width of the range; a linear one counts four.
      batch_size: Name of the batch size, if it is tuned, and the middle of its range on a log scale.
    """

    is_rate: np.ndarray
    is_slow: np.ndarray
    decades: np.ndarray
    batch_size: tuple[str, float] | None

    def shifted(self, u: Float[Array, "d"], decades: Array | float) -> Float[Array, "d"]:
        """The point ``u`` with its rates moved by so many decades, inside the cube."""
        return jnp.clip(u + jnp.where(self.is_rate, decades / self.decades, 0.0), 0.0, 1.0)


def _is_batch_size(name: str, p: FloatParameter | IntParameter | Choice) -> bool:
    if name.rsplit("/", 1)[-1] != "batch_size":
        return False
    if isinstance(p, Choice):
        return p.is_numeric and min(p.options) > 0
    return p.lo > 0


@functools.lru_cache(maxsize=64)
def roles_of(space: SearchSpace) -> Roles:
    """The roles of a space's dimensions."""

    def width(p: FloatParameter | IntParameter | Choice) -> float:
        return 4.0 if isinstance(p, Choice) or not p.log else math.log10(p.hi / p.lo)

    def middle(p: FloatParameter | IntParameter | Choice) -> float:
        sizes = [float(option) for option in p.options] if isinstance(p, Choice) else [p.lo, p.hi]
        return math.exp(sum(map(math.log, sizes)) / len(sizes))

    sizes = [(name, middle(p)) for name, p in space.params if _is_batch_size(name, p)]
    return Roles(
        is_rate=np.array([role == "rate" for role in space.roles]),
        is_slow=np.array([role == "slow" for role in space.roles]),
        decades=np.array([width(p) for _, p in space.params], np.float32),
        batch_size=sizes[0] if sizes else None,
    )
