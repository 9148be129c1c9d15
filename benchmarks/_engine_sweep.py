"""Random histories of the unpleasant kind: does every one lead to a finite suggestion inside the bounds?"""

import jax
import jax.numpy as jnp
import numpy as np

import autotunenet_jax as atn
from autotunenet_jax.bayesopt import kernels, surrogate

KINDS = ("plain", "clustered", "duplicated", "constant", "outlier", "failed", "huge", "tiny")
SPACE = {"rate": atn.Float(1e-5, 1e-1, log=True), "layers": atn.Int(1, 8), "kind": atn.Choice(["a", "b", "c"])}
CHUNK = 250


def histories(count, capacity, seed):
    """Points of the unit cube, scores, and how many of each are told; the kinds take turns."""
    generator = np.random.default_rng(seed)
    kind = np.arange(count) % len(KINDS)
    x = generator.uniform(size=(count, capacity, 3))
    centre = generator.uniform(size=(count, 1, 3))
    y = generator.normal(size=(count, capacity))

    def of(name):
        return kind == KINDS.index(name)

    x[of("clustered")] = (centre + 1e-3 * (x - 0.5))[of("clustered")]
    x[of("duplicated")] = np.broadcast_to(centre, x.shape)[of("duplicated")]
    y[of("constant")] = y[of("constant")][:, :1]
    y[of("outlier"), 0] = generator.choice([-1e30, 1e30], size=int(of("outlier").sum()))
    y[of("failed")] = np.nan
    y[of("huge")] *= 1e20
    y[of("tiny")] *= 1e-30
    # Every third history is empty or nearly so; of the others some fail here and there.
    used = np.where(generator.uniform(size=count) < 1 / 3, generator.integers(0, 3, count),
                    generator.integers(0, capacity + 1, count))  # fmt: skip
    y[generator.uniform(size=y.shape) < 0.05] = np.nan
    return np.clip(x, 0.0, 1.0).astype(np.float32), y.astype(np.float32), used.astype(np.int32)


def run(count, *, capacity=16, seed=0):
    """Counts of what went wrong among ``count`` histories."""
    optimizer = atn.BayesianOptimizer(SPACE, capacity=capacity)

    @jax.jit
    @jax.vmap
    def check(key, x, y, used):
        def step(state, trial):
            index, point, score = trial
            more = optimizer.observe(state, optimizer.space.decode(point), score)
            return jax.tree.map(lambda new, old: jnp.where(index < used, new, old), more, state), None

        state, _ = jax.lax.scan(step, optimizer.init(key), (jnp.arange(capacity), x, y))
        point, after = optimizer.suggest(state)
        values = jnp.stack([jnp.asarray(point[name], jnp.float32) for name in SPACE])
        low, high = jnp.array([1e-5, 1.0, 0.0]), jnp.array([1e-1, 8.0, 2.0])
        obs = state.observations
        posterior = surrogate.fit(optimizer.config, obs, start=state.hyper, key=key)
        query = jnp.concatenate([obs.x, optimizer.space.encode(point)[None]])
        mean, covariance = surrogate.predict(optimizer.config, posterior, query)
        # In units of the prior's variance, of which float32 resolves seven digits.
        variance = jnp.diagonal(covariance) / jnp.square(posterior.scale)
        return {
            "suggestions that are not finite": ~jnp.all(jnp.isfinite(values)),
            "suggestions outside the bounds": ~jnp.all((values >= low) & (values <= high)),
            "fits that are not finite": ~jnp.all(jnp.isfinite(kernels.flatten(after.hyper))),
            "means that are not finite": ~jnp.all(jnp.isfinite(mean)),
            "variances that are negative or not finite": ~jnp.all(jnp.isfinite(variance) & (variance >= 0.0)),
        }

    x, y, used = histories(-(-count // CHUNK) * CHUNK, capacity, seed)
    total = {}
    for start in range(0, len(used), CHUNK):
        part = slice(start, start + CHUNK)
        keys = jax.random.split(jax.random.key(start), CHUNK)
        for name, bad in check(keys, x[part], y[part], used[part]).items():
            total[name] = total.get(name, 0) + int(bad.sum())
    return {"histories": len(used)} | total
