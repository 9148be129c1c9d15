"""What the contract tests share: a small problem, and a surrogate that compiles in no time.

These tests are about who is told what, what is copied and what compiles; the phase machine is the real one. Only the
Gaussian process, the part whose compilation takes seconds in every new program, is replaced by a local average.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.bayesopt import surrogate, trials

TOTAL = 160


def light_fit(config, observations, candidates, *, prior_mean):
    del config, candidates, prior_mean
    return observations


def light_predict(config, obs, x, *, time):
    del config, time
    usable = trials.mask(obs) & ~obs.failed
    near = jnp.exp(-jnp.sum((x[:, None] - obs.x[None]) ** 2, -1) / 0.01) * usable
    mean = (near @ obs.y + 0.5e-3) / (jnp.sum(near, -1) + 1e-3)
    return mean, 0.01 * jnp.eye(len(x))


def lighten(set_attribute=setattr):
    """Puts the light surrogate in."""
    set_attribute(surrogate, "fit_among", light_fit)
    set_attribute(surrogate, "predict", light_predict)


@pytest.fixture(autouse=True)
def light_surrogate(monkeypatch):
    lighten(monkeypatch.setattr)


def data(count=256):
    x = jax.random.normal(jax.random.key(1), (count, 4))
    return x, jnp.tanh(x @ jnp.array([1.0, -2.0, 0.5, 0.3]))


def make_params(dtype=jnp.float32):
    hidden = 0.5 * jax.random.normal(jax.random.key(2), (4, 8))
    out = 0.5 * jax.random.normal(jax.random.key(3), (8,))
    return {"hidden": hidden.astype(dtype), "out": out.astype(dtype)}


def loss_fn(params, key):
    x, y = data()
    rows = jax.random.randint(key, (16,), 0, len(x))
    hidden = jnp.tanh(x[rows] @ params["hidden"].astype(jnp.float32))
    return jnp.mean((hidden @ params["out"].astype(jnp.float32) - y[rows]) ** 2)


def wrapped(optimizer=None, space=None, total_steps=TOTAL, **options):
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3) if optimizer is None else optimizer
    # A capacity of their own keeps these programs apart from those with the real surrogate.
    return atn.autotune(optimizer, space or {"learning_rate": (1e-4, 1.0)}, total_steps, capacity=33, **options)


def make_step(optimizer, *, loss=loss_fn, poison=None):
    """A pure step ``(carry, key) -> (carry, loss)``; ``poison(i, loss, grads)`` may spoil what the tuner hears."""

    def step(carry, key):
        params, opt_state, i = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        if poison is not None:
            value, grads = poison(i, value, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        return (optax.apply_updates(params, updates), opt_state, i + 1), value

    return step


def start(optimizer, params=None):
    """On a device by name, as restored arrays are: for others the compiled step would be a second program."""
    params = make_params() if params is None else params
    return jax.device_put((params, optimizer.init(params), jnp.int32(0)), jax.devices()[0])


@functools.cache
def _all_draws(seed):
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), 520)))


def draws(count=TOTAL, seed=5):
    """Keys as rows of plain numbers, of which one can be taken without a program for it."""
    return _all_draws(seed)[:count]


def run(optimizer, steps=TOTAL, *, params=None, seed=5, **options):
    """A whole run as one compiled scan. Returns parameters, optimizer state and losses."""
    scan = jax.jit(lambda carry, keys: jax.lax.scan(make_step(optimizer, **options), carry, keys))
    (params, opt_state, _), losses = scan(start(optimizer, params), draws(steps, seed))
    return params, opt_state, losses


class Usual:
    """The usual optimizer, its compiled step and how a run with it ends, which many tests hold others against."""

    def __init__(self):
        self.optimizer = wrapped()
        self.step = jax.jit(make_step(self.optimizer))

    def run(self, carry, keys):
        """A loop: a scan would be a second program as large as the step."""
        losses = []
        for key in keys:
            carry, loss = self.step(carry, key)
            losses.append(loss)
        return carry, np.asarray(losses)

    @functools.cached_property
    def end(self):
        (params, opt_state, _), losses = self.run(start(self.optimizer), draws())
        return params, opt_state, losses


usual = functools.cache(Usual)


def quality(params):
    return float(jnp.mean(jax.vmap(lambda key: loss_fn(params, key))(draws(32, seed=9))))


def rounds_begun(ts):
    """How many rounds have had a fork that ended."""
    obs = ts.knowledge.observations
    return len(np.unique(obs.group[: int(obs.count)]))


def find(opt_state):
    """The state of autotune in a tree."""
    is_it = lambda node: hasattr(node, "tuner")  # noqa: E731
    return next(node for node in jax.tree.leaves(opt_state, is_leaf=is_it) if is_it(node))


@pytest.fixture(scope="session")
def toy():
    return types.SimpleNamespace(**{
        name: globals()[name]
        for name in ("TOTAL", "data", "make_params", "loss_fn", "wrapped", "make_step", "start", "draws", "run",
            "usual",
                     "quality", "rounds_begun", "find")
    })  # fmt: skip
