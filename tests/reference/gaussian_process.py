"""The surrogate and its acquisition once more: NumPy and SciPy in float64, slow, by the textbook."""

import numpy as np
from scipy import linalg, special


def kernel(theta, x, z, *, categorical, lag=None):
    """Covariance of the shape; ``theta`` holds log lengthscales, signal, noise and time lengthscale."""
    d = x.shape[1]
    delta = x[:, None, :] - z[None, :, :]
    delta = np.where(categorical, (np.abs(delta) > 1e-4).astype(float), delta)
    distance = np.sqrt(np.sum((delta / np.exp(theta[:d])) ** 2, axis=-1))
    root = np.sqrt(5.0) * distance
    covariance = np.exp(2.0 * theta[d]) * (1.0 + root + root**2 / 3.0) * np.exp(-root)
    return covariance if lag is None else covariance * np.exp(-np.abs(lag) / np.exp(theta[d + 2]))


def gram(theta, x, *, categorical, group, intercept, noise, floor, time=None):
    """Covariance of the scores."""
    lag = None if time is None else time[:, None] - time[None, :]
    covariance = kernel(theta, x, x, categorical=categorical, lag=lag)
    covariance += intercept**2 * (group[:, None] == group[None, :])
    return covariance + np.diag(np.exp(2.0 * theta[-2]) + floor**2 + noise)


def negative_log_posterior(theta, y, *, loc, scale, **model):
    """What the fit minimises, up to a constant."""
    lower = linalg.cholesky(gram(theta, **model), lower=True)
    white = linalg.solve_triangular(lower, y, lower=True)
    return 0.5 * white @ white + np.sum(np.log(np.diag(lower))) + 0.5 * np.sum(((theta - loc) / scale) ** 2)


def central_gradient(function, theta, step=1e-5):
    """Derivative by central differences."""
    shifts = step * np.eye(theta.size)
    return np.array([(function(theta + shift) - function(theta - shift)) / (2.0 * step) for shift in shifts])


def posterior(theta, x_new, y, *, time_new=None, level=0.0, **model):
    """Mean and covariance of the shape at new points; ``level`` is the prior variance of a mean shared with it."""
    lag = None if time_new is None else time_new[:, None] - model["time"][None, :]
    lag_new = None if time_new is None else time_new[:, None] - time_new[None, :]
    categorical = model["categorical"]
    cross = kernel(theta, x_new, model["x"], categorical=categorical, lag=lag) + level
    prior = kernel(theta, x_new, x_new, categorical=categorical, lag=lag_new) + level
    covariance = gram(theta, **model)
    return cross @ linalg.solve(covariance, y, assume_a="pos"), prior - cross @ linalg.solve(
        covariance, cross.T, assume_a="pos"
    )


def log_expected_positive_part(z):
    """``log(phi(z) + z Phi(z))`` in three regimes."""
    z = np.asarray(z, np.float64)
    log_pdf = -0.5 * z**2 - 0.5 * np.log(2.0 * np.pi)
    far, near = np.minimum(z, -30.0), np.clip(z, -30.0, -1.0)
    inverse = 1.0 / far**2
    series = np.log(inverse) + np.log1p(-inverse * (3.0 - inverse * (15.0 - inverse * (105.0 - 945.0 * inverse))))
    middle = np.log1p(near * np.sqrt(np.pi / 2.0) * special.erfcx(-near / np.sqrt(2.0)))
    direct = np.log(np.exp(-0.5 * np.maximum(z, -1) ** 2) / np.sqrt(2.0 * np.pi)
                    + np.maximum(z, -1) * special.ndtr(np.maximum(z, -1)))  # fmt: skip
    return np.where(z > -1.0, direct, np.where(z > -30.0, log_pdf + middle, log_pdf + series))


def log_improvement(mean, covariance, normal, *, jitter):
    """Log expected improvement of the last of several jointly normal values on the minimum of the others.

    Averaged over the samples of the others that the standard normal ``normal[samples, others]`` makes.
    """
    others = covariance[:-1, :-1] + jitter * np.eye(mean.size - 1)
    lower = linalg.cholesky(others, lower=True)
    weights = linalg.solve_triangular(lower, covariance[:-1, -1], lower=True)
    deviation = np.sqrt(covariance[-1, -1] - weights @ weights)
    values = []
    for z in normal:
        best = np.min(mean[:-1] + lower @ z)
        values.append(log_expected_positive_part((best - mean[-1] - weights @ z) / deviation) + np.log(deviation))
    return special.logsumexp(values) - np.log(len(values))


def tamed(y, *, least, noise):
    """Scores about the median of the better half, in its standard deviations; logarithms far above it."""
    better = y[np.array([np.mean(y < score) + 0.5 * np.mean(y == score) for score in y]) <= 0.5]
    median = better.max()
    scale = np.sqrt(np.mean((better - median) ** 2))
    limit = max(4.0 * noise / scale, least)
    value = (y - median) / scale
    return np.where(value > limit, limit * (1.0 + np.log(np.maximum(value, limit) / limit)), value), median, scale
