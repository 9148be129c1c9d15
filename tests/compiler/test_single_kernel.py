"""Functions compiled as one kernel give what they give otherwise, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax.compiler.single_kernel import single_kernel


def scores(options, key, state, loss):
    """A little of everything that a state machine does; the count of the state is not used."""
    noise = jax.random.normal(key, state["level"].shape) * options[0]
    level = jnp.where(state["is_on"], state["level"] + noise, loss)
    return {"level": level, "is_high": level > options[1], "step": state["step"] + 1}, jax.random.split(key)[0]


one = single_kernel(static_argnums=(0,))(scores)
OPTIONS = (0.5, 0.1)


def arguments():
    state = {
        "level": jnp.arange(6.0).reshape(2, 3),
        "is_on": jnp.array([[True], [False]]),
        "step": jnp.int32(-3),
        "count": jnp.uint32(7),
    }
    return jax.random.key(1), state, jnp.float32(np.nan)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_it_gives_what_the_function_gives(outer):
    given = outer(lambda *args: one(OPTIONS, *args))(*arguments())
    assert_same(given, scores(OPTIONS, *arguments()))


def test_it_is_one_kernel():
    def several(x):
        return tuple(jnp.tanh(x * factor) for factor in range(2, 12))

    def kernels(function):
        program = str(jax.jit(function).lower(jnp.ones(3)).compile().as_text())
        entry = program[program.index("ENTRY") :]
        return entry.count(" fusion(") + entry.count(" call(")

    assert kernels(several) == 10
    assert kernels(single_kernel()(several)) <= 2


def test_in_another_kernel_it_is_a_part_of_that():
    outer = single_kernel()(lambda *args: one(OPTIONS, *args))
    assert_same(outer(*arguments()), scores(OPTIONS, *arguments()))


def test_a_function_compiled_before_may_be_part_of_it():
    jitted = jax.jit(lambda *args: one(OPTIONS, *args))
    assert_same(jitted(*arguments()), scores(OPTIONS, *arguments()))
    assert_same(single_kernel()(lambda *args: jitted(*args))(*arguments()), scores(OPTIONS, *arguments()))


def test_vmap_and_scan():
    key, state, loss = arguments()
    keys = jax.random.split(key, 3)
    batched = jax.jit(jax.vmap(lambda k: one(OPTIONS, k, state, loss)))(keys)
    assert_same(batched, jax.vmap(lambda k: scores(OPTIONS, k, state, loss))(keys))

    def step(carry, _):
        new, key = one(OPTIONS, carry[1], {**carry[0], "count": jnp.uint32(0)}, loss)
        return ({"is_on": state["is_on"], "level": new["level"], "step": new["step"]}, key), new["is_high"]

    start = {name: state[name] for name in ("is_on", "level", "step")}
    (final, _), highs = jax.lax.scan(step, (start, key), length=4)
    assert int(final["step"]) == 1 and highs.shape == (4, 2, 3)


def test_a_batch_may_need_the_library_that_one_does_not():
    function = single_kernel()(lambda x: (jnp.sum(x * 2.0), jnp.max(x)))
    total, most = jax.jit(jax.vmap(function))(jnp.ones((2048, 8)))
    assert total.shape == (2048,) and float(total[0]) == 16.0 and float(most[0]) == 1.0


def test_it_has_a_gradient():
    function = single_kernel()(lambda x, n: jnp.sum(jnp.where(x > 0, x, 0.0) ** 2) * n)
    x = jnp.array([-1.0, 2.0, 3.0])
    np.testing.assert_allclose(jax.grad(lambda x: function(x, jnp.int32(2)))(x), [0.0, 8.0, 12.0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ x,
        lambda x: jnp.sort(x),
        lambda x: jnp.linalg.cholesky(x @ x.T + jnp.eye(x.shape[0])),
        lambda x: jnp.sum(jnp.tile(x, (8, 8)) ** 2),
        lambda x: x.at[jnp.array([0, 2])].set(0.0),
        lambda x: x.astype(jnp.bfloat16) * 2,
    ],
    ids=["matrices", "sort", "factor", "large sum", "scatter", "bfloat16"],
)
def test_what_needs_a_library_is_compiled_as_usual(function):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)
    given = jax.jit(single_kernel()(function))(x)
    np.testing.assert_allclose(
        np.asarray(given, np.float32), np.asarray(jax.jit(function)(x), np.float32), rtol=1e-5, atol=1e-5
    )


def test_other_types_come_out_as_they_are():
    function = single_kernel()(lambda x: (x, x.astype(jnp.float16), x.astype(jnp.int8)))
    x = jnp.arange(3.0)
    assert_same(function(x), (x, x.astype(jnp.float16), x.astype(jnp.int8)))


def test_nothing_is_compiled_again():
    traces = []

    def count(x):
        traces.append(x)
        return x + 1, x * 2

    function = single_kernel()(count)
    for value in range(4):
        function(jnp.float32(value))
    assert len(traces) == 1
