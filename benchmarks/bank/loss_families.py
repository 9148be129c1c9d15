"""Families that are apart by their loss: noise from a key, heavy tails, plateaus, values near zero or below it."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from benchmarks.bank.problems import (
    Batch,
    Key,
    Params,
    Problem,
    classifier,
    cross_entropy,
    divide,
    huber,
    network,
    regressor,
    standardised,
)

Generator = np.random.Generator
FIXED = 20  # the key that stands in for none where an evaluation needs noise


def _key(key: Key) -> jax.Array:
    return jax.random.key(FIXED) if key is None else key


def factorisation(rng: Generator) -> Problem:
    """Completion of a matrix of low rank from its entries; a small start makes a plateau."""
    size, rank, true = 60, int(rng.choice([4, 8])), int(rng.choice([1, 2, 3]))
    scale, noise = float(rng.choice([0.03, 0.1, 0.3])), float(rng.choice([0.0, 0.2]))
    full = rng.normal(size=(size, true)) @ rng.normal(size=(true, size))
    full = full / full.std() + noise * rng.normal(size=full.shape)
    rows, columns = np.divmod(np.arange(size * size), size)

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        shape = (size, rank)
        return {"body": scale * jax.random.normal(first, shape), "head": scale * jax.random.normal(second, shape)}

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        return jnp.mean(((params["body"][batch[0]] * params["head"][batch[1]]).sum(-1) - batch[2]) ** 2)

    return Problem(init, loss, *divide(rng, rows, columns, full.ravel()))


def contrastive(rng: Generator) -> Problem:
    """Two noisy views of a digit are to be told from those of the 15 others of its group (InfoNCE)."""
    group, temperature, noise = 16, float(rng.choice([0.1, 0.3])), float(rng.choice([0.2, 0.4]))
    net = network(rng, 64, 16, widths=(24, 48), depths=(1, 2))

    def view(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        seen = jax.random.bernoulli(first, 0.7, x.shape) * (x + noise * jax.random.normal(second, x.shape))
        z = net.apply(params, seen, None)
        return z * jax.lax.rsqrt((z**2).sum(-1, keepdims=True) + 1e-6)

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        first, second = jax.random.split(_key(key))
        x = batch[0][: len(batch[0]) // group * group]
        a, b = (view(params, x, k).reshape(-1, group, 16) for k in (first, second))
        logits = jnp.einsum("gid,gjd->gij", a, b) / temperature
        return cross_entropy(logits, jnp.broadcast_to(jnp.arange(group), logits.shape[:2]))

    return Problem(net.init, loss, *divide(rng, load_digits().data / 16), noisy=True)


def denoising(rng: Generator) -> Problem:
    """A diffusion model: the noise that was added to points of a spiral or to digits is to be told."""
    if rng.integers(2):
        angle = rng.uniform(2, 10, 3000)
        x = standardised(np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1) + 0.1 * rng.normal(size=(3000, 2)))
    else:
        x = 2 * load_digits().data / 16 - 1
    size = x.shape[1]
    net = network(rng, size + 2, size, widths=(48, 96), depths=(2, 3))

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        first, second = jax.random.split(_key(key))
        angle = jax.random.uniform(first, (len(batch[0]), 1), maxval=np.pi / 2)
        noise = jax.random.normal(second, batch[0].shape)
        seen = jnp.cos(angle) * batch[0] + jnp.sin(angle) * noise
        told = net.apply(params, jnp.concatenate([seen, jnp.cos(angle), jnp.sin(angle)], 1), None)
        return jnp.mean((told - noise) ** 2)

    return Problem(net.init, loss, *divide(rng, x), noisy=True)


def policy(rng: Generator) -> Problem:
    """A contextual bandit by REINFORCE: a surrogate on sampled actions; evaluated by the reward expected, negated."""
    n, inputs, actions = 3000, 8, int(rng.choice([4, 8]))
    x = rng.normal(size=(n, inputs))
    hidden = np.tanh(x @ rng.normal(size=(inputs, 16)) / np.sqrt(inputs) * 2)
    rewards = standardised((hidden @ rng.normal(size=(16, actions))).ravel()).reshape(n, actions)
    noise, bonus = float(rng.choice([0.0, 0.5])), float(rng.choice([0.0, 0.02]))
    net = network(rng, inputs, actions, widths=(24, 48), depths=(1, 2))

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        logs = jax.nn.log_softmax(net.apply(params, batch[0], None))
        if key is None:
            return -(jnp.exp(logs) * batch[1]).sum(-1).mean()
        first, second = jax.random.split(key)
        action = jax.random.categorical(first, logs)[:, None]
        reward = jnp.take_along_axis(batch[1], action, 1)[:, 0]
        reward = reward + noise * jax.random.normal(second, reward.shape)
        entropy = -(jnp.exp(logs) * logs).sum(-1).mean()
        chosen = jnp.take_along_axis(logs, action, 1)[:, 0]
        return -(chosen * (reward - reward.mean())).mean() - bonus * entropy

    return Problem(net.init, loss, *divide(rng, x, rewards), noisy=True, signed=True)


def heavytail(rng: Generator) -> Problem:
    """Regression under Student noise of 1.5 degrees of freedom, by squares or Huber's loss; evaluated by Huber's."""
    n, squared, scale = 4000, bool(rng.integers(2)), float(rng.choice([0.1, 0.2]))
    x = rng.normal(size=(n, 8))
    y = standardised(np.tanh(x @ rng.normal(size=(8, 16)) / 2) @ rng.normal(size=16))
    y = (y + scale * rng.standard_t(1.5, n))[:, None]
    net = network(rng, 8, 1)

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        errors = net.apply(params, batch[0], None) - batch[1]
        return jnp.mean(errors**2) if squared and key is not None else huber(errors)

    return Problem(net.init, loss, *divide(rng, x, y), noisy=squared)


def plateau(rng: Generator) -> Problem:
    """Losses that stay flat at first: a parity of bits, or deep and narrow networks from a small start."""
    if rng.integers(2):
        n, inputs, bits = 4000, 8, int(rng.choice([2, 3]))
        x = rng.choice([-1.0, 1.0], (n, inputs))
        net = network(rng, inputs, 2, widths=(32, 64), depths=(1, 2), gains=(0.3, 0.7), norms=(False,))
        return Problem(net.init, classifier(net), *divide(rng, x, (x[:, :bits].prod(1) > 0).astype(int)))
    x, y = load_digits().data / 16, load_digits().target
    depths, curves = ((3, 4), (jnp.tanh,)) if rng.integers(2) else ((2, 3), (jax.nn.sigmoid,))
    net = network(rng, 64, 10, widths=(12, 16), depths=depths, activations=curves, gains=(0.2, 0.4), norms=(False,))
    return Problem(net.init, classifier(net), *divide(rng, x, y))


def nearzero(rng: Generator) -> Problem:
    """Regression without noise, whose loss falls by decades: a linear map, a sine or a small network."""
    kind, n = str(rng.choice(["linear", "sine", "teacher"])), 3000
    inputs = 1 if kind == "sine" else 6
    x = rng.uniform(-1.5, 1.5, (n, inputs))
    hidden = x @ rng.normal(size=(inputs, 4))
    y = np.sin(2 * x) if kind == "sine" else (np.tanh(hidden) if kind == "teacher" else hidden).sum(1, keepdims=True)
    curves = {"linear": (lambda z: z,)}.get(kind, (jnp.tanh, jax.nn.gelu))
    net = network(rng, inputs, 1, widths=(16, 32, 64), depths=(1, 2), activations=curves, norms=(False,))
    return Problem(net.init, regressor(net), *divide(rng, x, standardised(y)))


def negative(rng: Generator) -> Problem:
    """The likelihood of numbers whose spread is learnt along with their mean: losses fall below zero."""
    n, inputs = 4000, int(rng.choice([1, 6]))
    x = rng.uniform(-1.5, 1.5, (n, inputs))
    mean = np.tanh(2 * x @ rng.normal(size=(inputs, 6))) @ rng.normal(size=6) / 2
    y = (mean + np.exp(-2.5 + x[:, 0]) * rng.normal(size=n))[:, None]
    net = network(rng, inputs, 2, widths=(24, 48), depths=(1, 2), gains=(0.5, 1.0))

    def loss(params: Params, batch: Batch, key: Key) -> jax.Array:
        mean, spread = jnp.split(net.apply(params, batch[0], None), 2, -1)
        spread = jnp.maximum(spread, -6.0)  # the logarithm of the deviation
        return jnp.mean(0.5 * ((batch[1] - mean) * jnp.exp(-spread)) ** 2 + spread)

    return Problem(net.init, loss, *divide(rng, x, y), signed=True)
