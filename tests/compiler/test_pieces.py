"""A program in pieces gives what it gives in one, with calls that share nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax.compiler import pieces


def machine(state, loss):
    """Each of the results leads through most of the others; one is a constant, one is given back as it came."""
    level, count, key = state
    for number in range(8):
        is_low = level < loss * number
        level = jnp.where(is_low, level + 0.25 * number, level - loss)
        count = count + is_low
    key, drawn = jax.random.split(key)
    return level, count, 3, jax.random.uniform(drawn), loss, key


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_it_gives_what_it_gives_in_one(monkeypatch, size):
    monkeypatch.setattr(pieces, "_EQUATIONS", size)
    args = (jnp.float32(1.0), jnp.int32(4), jax.random.PRNGKey(2)), jnp.float32(0.3)
    program = jax.make_jaxpr(machine)(*args)
    leaves = jax.tree.leaves(args)
    for value, expected in zip(
        jax.jit(lambda *leaves: pieces.evaluate(program, leaves))(*leaves), machine(*args), strict=True
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_what_results_share_is_compiled_once(monkeypatch):
    args = (jnp.float32(1.0), jnp.int32(4), jax.random.PRNGKey(2)), jnp.float32(0.3)
    program = jax.make_jaxpr(machine)(*args)

    def comparisons(size):
        monkeypatch.setattr(pieces, "_EQUATIONS", size)
        run = jax.jit(lambda *leaves: pieces.evaluate(program, leaves))
        return run.lower(*jax.tree.leaves(args)).compile().as_text().count("compare(")

    assert comparisons(4) < comparisons(10_000)
