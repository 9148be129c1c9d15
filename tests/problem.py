"""A small training problem that every test of a whole run shares, so that it is compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn

TOTAL_STEPS = 160
SPACE = {"learning_rate": (1e-5, 1.0)}
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)

_TRUTH = np.random.default_rng(0).normal(size=8).astype(np.float32)


def new_state(seed=0):
    params = {"w": 0.1 * jax.random.normal(jax.random.key(seed), (8,)), "b": jnp.zeros(())}
    return {
        "params": params,
        "opt": OPTIMIZER.init(params),
        "key": jax.random.key(seed),
        "seen": jnp.zeros((), jnp.int32),
    }


def loss_fn(params, x, y):
    return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y))


def train_step(state, batch, hp):
    """Linear regression with a little noise from the state's own key; ``seen`` adds up the batches' numbers."""
    x, y, number = batch
    key, noise = jax.random.split(state["key"])
    x = x + 0.01 * jax.random.normal(noise, x.shape)
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], x, y)
    opt_state = atn.set_hyperparams(state["opt"], hp)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt_state, "key": key, "seen": state["seen"] + number}, loss


@functools.cache
def batch(step):
    rng = np.random.default_rng(step + 1)
    x = rng.normal(size=(16, 8)).astype(np.float32)
    y = (x @ _TRUTH + 0.5 + 0.1 * rng.normal(size=16)).astype(np.float32)
    return x, y, np.int32(step)


def batches(step, hp):
    return batch(step)


def eval_step(state):
    x, y, _ = batch(-1)
    return loss_fn(state["params"], x, y)


def tuner(start=1e-5, total_steps=TOTAL_STEPS, **options):
    return atn.AutoTuneNet(SPACE, total_steps=total_steps, initial={"learning_rate": start}, **options)


def same(a, b):
    """Whether two trees hold the same bits."""

    def raw(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(raw(x), raw(y), equal_nan=raw(x).dtype.kind == "f") for x, y in pairs)
