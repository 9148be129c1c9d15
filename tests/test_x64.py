"""Programs that compute in 64 bits: the tuner stays in 32, and decides as it does elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn

LOSSES = 2.0 * np.exp(-np.arange(70) / 30)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} - {"key<fry>"}


def run(losses):
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, 200)
    ts = tuner.init(jax.random.key(0))
    ts, _ = jax.jit(lambda ts: jax.lax.scan(tuner.update, ts, losses))(ts)
    return ts, tuner.hyperparams(ts)


def test_the_controller_decides_alike():
    with jax.enable_x64(True):
        wide, values = run(jnp.asarray(LOSSES, jnp.float64))
    ts, _ = run(jnp.asarray(LOSSES, jnp.float32))
    assert int(ts.rounds_held) == 1
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(ts), strict=True):
        assert a.dtype == b.dtype
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert dtypes(values) == {"float32"}


def test_an_optimizer_of_64_bits_tunes_itself():
    with jax.enable_x64(True):
        optimizer = atn.autotune(optax.adam, {"learning_rate": (1e-5, 1e-1)}, 200, learning_rate=1e-3)
        params = {"w": jnp.ones(3, jnp.float64)}
        state = optimizer.init(params)

        @jax.jit
        def train(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
            updates, state = optimizer.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.jit(lambda carry: jax.lax.scan(train, carry, length=200))((params, state))
        state = atn.observe_eval(state, 0.5)
        assert params["w"].dtype == losses.dtype == jnp.float64
        assert int(state.tuner.rounds_held) == 1 and dtypes(state.tuner) <= {"float32", "int32", "bool"}
        assert losses[-1] < 0.1 * losses[0]


def test_the_optimiser_on_its_own():
    with jax.enable_x64(True):
        optimizer = atn.BayesianOptimizer({"x": (0.0, 1.0), "kind": ["a", "b"]}, capacity=16)
        suggest, observe = jax.jit(optimizer.suggest), jax.jit(optimizer.observe)
        state = optimizer.init(jax.random.key(0))
        for _ in range(12):
            point, state = suggest(state)
            state = observe(state, point, (point["x"] - 0.3) ** 2)
        assert abs(float(optimizer.best(state)["x"]) - 0.3) < 0.05
        assert dtypes(state) <= {"float32", "int32", "bool"}
