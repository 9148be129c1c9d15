"""Dropout modules with a traced rate: one program whatever the rate, and the usual switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen, nnx

from autotunenet_flax.linen import TracedDropout as LinenDropout
from autotunenet_flax.nnx import TracedDropout as NnxDropout

X = jnp.full((2000,), 2.0)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dropout = NnxDropout(rngs=rngs)

    def __call__(self, x, rate):
        return self.dropout(x, rate)


def test_nnx_one_program_for_every_rate():
    net, traces = Net(nnx.Rngs(0)), []

    @nnx.jit
    def call(net, x, rate):
        traces.append(None)
        return net(x, rate)

    shares, seen = [], []
    for rate in (0.0, 0.2, 0.7, 0.7):
        seen.append(call(net, X, jnp.float32(rate)))
        shares.append(float(jnp.mean(seen[-1] == 0.0)))
    assert len(traces) == 1
    np.testing.assert_allclose(shares, [0.0, 0.2, 0.7, 0.7], atol=0.05)
    np.testing.assert_array_equal(seen[0], X)
    # Each call draws anew.
    assert bool(jnp.any(seen[2] != seen[3]))


def test_nnx_evaluation_passes_on():
    net = Net(nnx.Rngs(0))
    net.eval()
    np.testing.assert_array_equal(net(X, 0.5), X)
    net.train()
    assert bool(jnp.any(net(X, 0.5) == 0.0))
    assert bool(jnp.any(net.dropout(X, 0.5) == 0.0))
    np.testing.assert_array_equal(net.dropout(X, 0.5, deterministic=True), X)


def test_nnx_draws_from_the_stream_it_is_told():
    def drawn(**seeds):
        return NnxDropout(rng_collection="noise", rngs=nnx.Rngs(**seeds))(X, 0.5)

    np.testing.assert_array_equal(drawn(noise=1, dropout=2), drawn(noise=1, dropout=3))
    assert bool(jnp.any(drawn(noise=1) != drawn(noise=2)))


class LinenNet(linen.Module):
    is_training: bool = True

    @linen.compact
    def __call__(self, x, rate):
        return LinenDropout(deterministic=not self.is_training)(x, rate)


def test_linen_one_program_for_every_rate():
    traces = []

    @jax.jit
    def call(key, rate):
        traces.append(None)
        return LinenNet().apply({}, X, rate, rngs={"dropout": key})

    shares = [float(jnp.mean(call(jax.random.key(i), jnp.float32(rate)) == 0.0)) for i, rate in enumerate((0.0, 0.3))]
    assert len(traces) == 1
    np.testing.assert_allclose(shares, [0.0, 0.3], atol=0.05)
    assert bool(jnp.any(call(jax.random.key(1), 0.3) != call(jax.random.key(2), 0.3)))


def test_linen_evaluation_needs_no_random_numbers():
    np.testing.assert_array_equal(LinenNet(is_training=False).apply({}, X, 0.5), X)
    np.testing.assert_array_equal(LinenDropout().apply({}, X, 0.5, deterministic=True), X)
    with pytest.raises(Exception, match="dropout"):
        LinenNet().apply({}, X, 0.5)
