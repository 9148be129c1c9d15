"""The time-varying Gaussian process bandit of PB2, for one rate.

| symbol | meaning |
|---|---|
| x | ``[n, 3]``: round, loss before the round, log rate; the last two scaled to [0, 1] |
| y | ``[n]``: improvement in the round, standardised |
| k | variance times ``exp(-d**2 / scale)`` in loss and rate times ``(1 - forgetting)**(rounds apart / 2)`` |
| beta | weight of exploration, ``0.2 log(0.4 n)`` |
"""

import math

import numpy as np
import scipy.linalg
import scipy.optimize

# The constants of the confidence bound, the bound of standardised improvements and the ranges of the kernel's
# parameters are those of the paper and its public implementation.
_BETA = (0.2, 0.4)
_CLIP = 2.0
_START = np.array([1.0, 1.0, 0.1, 1.0])
_BOUNDS = np.array([(1e-2, 1e2), (1e-3, 1.0), (1e-3, 0.5), (1e-4, 1e1)])
_GRID = 201


def suggest(x: np.ndarray, y: np.ndarray, *, at: tuple[float, float]) -> float:
    """The scaled log rate of largest upper confidence bound.

    Args:
      x: float ``[n, 3]``: what each earlier step of a member began with.
      y: float ``[n]``: how much it improved.
      at: Round and scaled loss that the new rate begins with.

    Returns:
      A value in [0, 1].
    """
    y = np.clip((y - y.mean()) / (y.std() + 1e-8), -_CLIP, _CLIP)
    theta = _fit(x, y)
    variance, *_, noise = theta
    grid = np.linspace(0.0, 1.0, _GRID)
    points = np.column_stack([np.full(_GRID, at[0]), np.full(_GRID, at[1]), grid])
    factor = scipy.linalg.cho_factor(_kernel(x, x, theta) + noise * np.eye(len(x)), lower=True)
    cross = _kernel(points, x, theta)
    mean = cross @ scipy.linalg.cho_solve(factor, y)
    spread = variance - np.sum(cross.T * scipy.linalg.cho_solve(factor, cross.T), axis=0)
    beta = max(_BETA[0] * math.log(_BETA[1] * len(x)), 0.0)
    return float(grid[np.argmax(mean + np.sqrt(beta * np.maximum(spread, 0.0)))])


def _kernel(a: np.ndarray, b: np.ndarray, theta: np.ndarray) -> np.ndarray:
    variance, scale, forgetting, _ = theta
    apart = np.abs(a[:, None, 0] - b[None, :, 0])
    distance = np.sum(np.square(a[:, None, 1:] - b[None, :, 1:]), axis=-1)
    return variance * np.exp(-distance / scale) * (1.0 - forgetting) ** (apart / 2.0)


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Variance, scale, forgetting and noise of largest marginal likelihood."""

    def misfit(log_theta):
        theta = np.exp(log_theta)
        covariance = _kernel(x, x, theta) + (theta[-1] + 1e-8) * np.eye(len(x))
        lower = np.linalg.cholesky(covariance)
        white = scipy.linalg.solve_triangular(lower, y, lower=True)
        return 0.5 * white @ white + np.sum(np.log(np.diag(lower)))

    found = scipy.optimize.minimize(misfit, np.log(_START), bounds=np.log(_BOUNDS), method="L-BFGS-B")
    return np.exp(found.x)
