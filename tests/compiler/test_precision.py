"""The tuner computes in 32 bits, no more and no fewer, and decides alike whatever the program around it does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn

LOSSES = 2.0 * np.exp(-np.arange(110) / 30)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} - {"key<fry>"}


def run(losses):
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, 200)
    ts = tuner.init(jax.random.key(0))

    @jax.jit
    def whole(ts):
        ts, _ = jax.lax.scan(tuner.update, ts, losses)
        return ts, tuner.hyperparams(ts)

    return whole(ts)


def test_the_controller_decides_alike():
    with jax.enable_x64(True):
        wide, values = run(jnp.asarray(LOSSES, jnp.float64))
    ts, _ = run(jnp.asarray(LOSSES, jnp.float32))
    assert int(ts.round.index) >= 1 and int(ts.knowledge.observations.count) >= 2
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(ts), strict=True):
        assert a.dtype == b.dtype
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert dtypes(values) == {"float32"}


@pytest.mark.soak
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
        assert int(state.tuner.round.index) >= 1 and dtypes(state.tuner) <= {"float32", "int32", "uint32", "bool"}
        assert losses[-1] < 0.1 * losses[0]


def test_the_optimiser_on_its_own():
    with jax.enable_x64(True):
        optimizer = atn.BayesianOptimizer({"x": (0.0, 1.0), "kind": ["a", "b"]}, capacity=16)
        suggest, observe, best = (jax.jit(part) for part in (optimizer.suggest, optimizer.observe, optimizer.best))
        state = optimizer.init(jax.random.key(0))
        for _ in range(12):
            point, state = suggest(state)
            state = observe(state, point, (point["x"] - 0.3) ** 2)
        assert abs(float(best(state)["x"]) - 0.3) < 0.05
        assert dtypes(state) <= {"float32", "int32", "bool"}


def products(jaxpr):
    """The equations of a program that multiply matrices, those of its inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products(getattr(inner, "jaxpr", inner))


@pytest.fixture
def traced_anew():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_no_product_is_rounded_to_less(precision, traced_anew):
    """Accelerators multiply in fewer bits unless told not to."""
    tuner = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1), "dropout": (0.0, 0.5)}, 200)
    optimizer = atn.BayesianOptimizer({"x": (0.0, 1.0), "kind": ["a", "b"]}, capacity=16)
    with jax.default_matmul_precision(precision):
        ts, state = tuner.init(jax.random.key(0)), optimizer.init(jax.random.key(0))
        decides = jax.make_jaxpr(tuner.update)(ts, 1.0)
        suggests = jax.make_jaxpr(lambda state: optimizer.suggest(state, count=2))(state)
    for program in (decides, suggests):
        found = [equation.params["precision"] for equation in products(program.jaxpr)]
        assert len(found) > 20
        highest = jax.lax.Precision.HIGHEST
        assert set(found) == {(highest, highest)}
