"""What the optimisers of `benchmarks.engine` are asked to minimise: functions of the unit cube and of time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn

HARTMANN_WEIGHTS = np.array([1.0, 1.2, 3.0, 3.2])
HARTMANN_3 = (
    np.array([[3, 10, 30], [0.1, 10, 35], [3, 10, 30], [0.1, 10, 35]]),
    1e-4 * np.array([[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]]),
)
HARTMANN_6 = (
    np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14],
              [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]),
    1e-4 * np.array([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                     [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]]),
)  # fmt: skip
JUMP_EVERY = 20
"""Evaluations between two jumps of the optimum."""


def branin(u, t):
    x, y = 15.0 * u[0] - 5.0, 15.0 * u[1]
    bowl = y - 5.1 / (4.0 * np.pi**2) * x**2 + 5.0 / np.pi * x - 6.0
    return bowl**2 + 10.0 * (1.0 - 1.0 / (8.0 * np.pi)) * jnp.cos(x) + 10.0 - 0.39788735772973816


def hartmann(u, t):
    a, p = HARTMANN_3 if u.size == 3 else HARTMANN_6
    top = 3.86277978 if u.size == 3 else 3.32236801
    return top - jnp.sum(
        jnp.asarray(HARTMANN_WEIGHTS) * jnp.exp(-jnp.sum(jnp.asarray(a) * (u - jnp.asarray(p)) ** 2, 1))
    )


def rosenbrock(u, t):
    x = 15.0 * u - 5.0
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def levy(u, t):
    w = 1.0 + (20.0 * u - 11.0) / 4.0
    middle = jnp.sum((w[:-1] - 1.0) ** 2 * (1.0 + 10.0 * jnp.sin(np.pi * w[:-1] + 1.0) ** 2))
    return jnp.sin(np.pi * w[0]) ** 2 + middle + (w[-1] - 1.0) ** 2 * (1.0 + jnp.sin(2.0 * np.pi * w[-1]) ** 2)


def ackley(u, t):
    x = 40.0 * u - 15.0
    return -20.0 * jnp.exp(-0.2 * jnp.sqrt(jnp.mean(x**2))) - jnp.exp(jnp.mean(jnp.cos(2.0 * np.pi * x))) + 20.0 + np.e


def camel(u, t):
    x, y = 6.0 * u[0] - 3.0, 4.0 * u[1] - 2.0
    return (4.0 - 2.1 * x**2 + x**4 / 3.0) * x**2 + x * y + (4.0 * y**2 - 4.0) * y**2 + 1.031628453


def styblinski(u, t):
    x = 10.0 * u - 5.0
    return jnp.sum(x**4 - 16.0 * x**2 + 5.0 * x) / 2.0 + 39.16616570377142 * u.size


def valley(u, t):
    """Gentle on one side, exponential on the other, as a loss over the logarithm of a learning rate is."""
    x = 8.0 * (u - 0.37)
    return jnp.sum(jnp.where(x < 0.0, 0.3 * x**2, jnp.expm1(x) - x))


def cliff(u, t):
    """A bowl beside a region where every trial fails."""
    x = u - jnp.array([0.6, 0.35])
    score = 20.0 * jnp.sum(x**2) + 0.3 * jnp.sin(12.0 * x[0]) ** 2
    return jnp.where(u[0] + 0.3 * u[1] > 0.85, jnp.nan, score)


def plateau(u, t):
    """A basin in a plain without slope, and a corner where every trial fails."""
    distance = jnp.sum((u - jnp.array([0.3, 0.65, 0.5])) ** 2)
    return jnp.where(u[0] > 0.8, jnp.nan, jnp.minimum(8.0 * distance, 1.0))


def mixed(u, t):
    """One log-scaled rate, one integer, one option without order; large rates fail."""
    rate, layers, kind = 4.0 * u[0] - 5.0, jnp.floor(8.0 * u[1]) + 1.0, jnp.floor(3.0 * u[2])
    score = (rate + 3.0) ** 2 + 0.2 * jnp.abs(layers - 5.0) + kind
    return jnp.where(rate > -1.5, jnp.nan, score)


def circling(u, t):
    """A bowl whose minimum circles once in a hundred evaluations."""
    phase = 2.0 * np.pi * t / 100.0
    return 10.0 * jnp.sum((u - 0.5 - 0.3 * jnp.stack([jnp.cos(phase), jnp.sin(phase)])) ** 2)


def jumping(u, t):
    """A bowl whose minimum jumps every `JUMP_EVERY` evaluations."""
    places = jnp.array([[0.2, 0.3], [0.7, 0.8], [0.3, 0.8], [0.8, 0.2], [0.5, 0.5]])
    return 10.0 * jnp.sum((u - places[(t // JUMP_EVERY).astype(int) % 5]) ** 2)


def falling(u, t):
    """The valley of a learning rate: the minimum falls as it does in training."""
    x = 8.0 * (u - jnp.array([0.75, 0.3]) + 0.4 * t / 100.0 * jnp.array([1.0, 0.0]))
    return jnp.sum(jnp.where(x < 0.0, 0.3 * x**2, jnp.expm1(jnp.minimum(x, 4.0)) - x))


class Problem(NamedTuple):
    """A function, and what is random or moving about it. Regret is measured without the noise."""

    function: Any
    dims: int
    noise: float = 0.0
    """Standard deviation of the scores."""
    is_drifting: bool = False
    is_mixed: bool = False

    @property
    def space(self):
        if self.is_mixed:
            return {"x0": atn.Float(0.0, 1.0), "x1": atn.Int(0, 7), "x2": atn.Choice(["a", "b", "c"])}
        return {f"x{i}": atn.Float(0.0, 1.0) for i in range(self.dims)}

    def unit(self, point):
        """Unit-cube coordinates of a point of `space`, on which the function is defined."""
        values = [jnp.asarray(point[f"x{i}"], jnp.float32) for i in range(self.dims)]
        if self.is_mixed:
            values = [values[0], (values[1] + 0.5) / 8.0, (values[2] + 0.5) / 3.0]
        return jnp.stack(values)

    def compiled(self):
        return jax.jit(self.function)


PROBLEMS = {
    "branin": Problem(branin, 2),
    "hartmann3": Problem(hartmann, 3),
    "hartmann6": Problem(hartmann, 6),
    "rosenbrock2": Problem(rosenbrock, 2),
    "rosenbrock4": Problem(rosenbrock, 4),
    "levy4": Problem(levy, 4),
    "ackley4": Problem(ackley, 4),
    "camel": Problem(camel, 2),
    "styblinski3": Problem(styblinski, 3),
    "valley": Problem(valley, 2),
    "cliff": Problem(cliff, 2),
    "plateau": Problem(plateau, 3),
    "mixed": Problem(mixed, 3, is_mixed=True),
    "branin noisy": Problem(branin, 2, noise=5.0),
    "hartmann6 noisy": Problem(hartmann, 6, noise=0.1),
    "valley noisy": Problem(valley, 2, noise=0.3),
    "circling": Problem(circling, 2, is_drifting=True),
    "jumping": Problem(jumping, 2, is_drifting=True),
    "falling": Problem(falling, 2, is_drifting=True),
}
