"""Batches that run one member after the other give what each gives alone, and hold no batch of factorisations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import autotunenet_jax as atn
from autotunenet_jax.compiler.sequential_vmap import sequential_vmap


@sequential_vmap(static_argnums=(1,))
def weighted(x, power, rest):
    matrix = jnp.eye(3) * (1.0 + x @ x) + rest["shift"]
    return {"root": jnp.linalg.cholesky(matrix)[0, 0] ** power, "count": rest["count"] + 1}


X = jnp.arange(12.0).reshape(4, 3)
REST = {"shift": jnp.float32(0.5), "count": jnp.arange(4)}


def ranks(jaxpr):
    """Numbers of dimensions of what is factorised anywhere in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cholesky":
            yield equation.invars[0].aval.ndim
        for part in jaxprs_in_params(equation.params):
            yield from ranks(part)


def batch(x, rest):
    return jax.vmap(lambda x, rest: weighted(x, 2, rest), in_axes=(0, {"shift": None, "count": 0}))(x, rest)


def test_members_are_as_they_are_alone():
    found = batch(X, REST)
    for number in range(len(X)):
        alone = weighted(X[number], 2, {"shift": REST["shift"], "count": REST["count"][number]})
        np.testing.assert_allclose(found["root"][number], alone["root"], rtol=1e-6)
        assert int(found["count"][number]) == int(alone["count"])


def test_a_batch_of_batches():
    nested = jax.vmap(lambda x: jax.vmap(lambda y: weighted(x + y, 1, {"shift": 0.0, "count": 0}))(X))(X)
    for row in range(4):
        for column in range(4):
            alone = weighted(X[row] + X[column], 1, {"shift": 0.0, "count": 0})
            np.testing.assert_allclose(nested["root"][row, column], alone["root"], rtol=1e-6)


def test_no_batch_of_factorisations():
    program = jax.make_jaxpr(batch)(X, REST)
    assert set(ranks(program.jaxpr)) == {2}


@pytest.mark.parametrize("count", [None, 2])
def test_nor_in_many_suggestions_at_once(count):
    optimizer = atn.BayesianOptimizer({"x": (0.0, 1.0)}, capacity=8)
    states = jax.vmap(optimizer.init)(jax.random.split(jax.random.key(0), 3))
    program = jax.make_jaxpr(jax.vmap(lambda state: optimizer.suggest(state, count)))(states)
    found = set(ranks(program.jaxpr))
    # The fit factorises for its few starts at once.
    alone = jax.make_jaxpr(lambda state: optimizer.suggest(state, count))(jax.tree.map(lambda leaf: leaf[0], states))
    assert found == set(ranks(alone.jaxpr))
