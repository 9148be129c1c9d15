"""The whole controller under JAX's transformations: jit with donation, scan, vmap, and none."""

import functools

import jax
import numpy as np
import pytest

from tests.controller.light import bits, compiled, losses_like_training, tuner

pytestmark = pytest.mark.usefixtures("light_surrogate")


@functools.cache
def updated():
    """One compiled step, donated, and how often it was traced."""
    traces = []

    def step(ts, loss):
        traces.append(None)
        return tuner().update(ts, loss)

    return jax.jit(step, donate_argnums=0), traces


def loop(losses, total_steps=100):
    ts, directives = tuner(total_steps=total_steps).init(jax.random.key(0)), []
    for loss in losses:
        ts, directive = updated()[0](ts, loss)
        directives.append(directive)
    return ts, jax.tree.map(lambda *column: np.stack(column), *jax.device_get(directives))


def test_one_trace_donated_whatever_happens_and_a_state_of_fixed_size():
    start = tuner(total_steps=100).init(jax.random.key(0))
    for total_steps in (100, 400, None):
        ts, _ = loop(losses_like_training("everything", 5, 120)[0], total_steps)
        assert jax.tree.map(jax.typeof, start) == jax.tree.map(jax.typeof, ts)
    assert len(updated()[1]) == 1
    assert compiled(tuner().core)._cache_size() <= 1


def test_three_runs_at_once_scanned_are_three_loops():
    columns = np.stack([losses_like_training("healthy", 1, 60)[0]] * 3)
    columns[1, 4:12], columns[2, 30:] = np.nan, 1e30
    start = tuner().init(jax.random.key(0))
    scan = jax.jit(jax.vmap(lambda losses: jax.lax.scan(tuner().update, start, losses)))
    together, directives = scan(columns)
    for i, losses in enumerate(columns):
        ts, expected = loop(losses, 400)
        for name, column in expected._asdict().items():
            np.testing.assert_array_equal(getattr(directives, name)[i], column, err_msg=name)
        np.testing.assert_allclose(together.incumbent[i], ts.incumbent, atol=1e-6)
    assert len({directives.outcome[i].tobytes() for i in range(3)}) == 3


def test_without_jit_it_is_the_same():
    """At the end of a range test, where a decision is taken, and about it."""
    losses = losses_like_training("healthy", 2, 20)[0]
    length = int(tuner(total_steps=100).plan.range_test[0])
    eager, _ = loop(losses[: length - 1])
    said = []
    for loss in losses[length - 1 : length + 1]:
        eager, directive = tuner(total_steps=100).update(eager, loss)
        said.append(directive)
    compiled_, directives = loop(losses[: length + 1])
    for name, column in directives._asdict().items():
        np.testing.assert_array_equal(column[length - 1 :], [getattr(directive, name) for directive in said])
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled_), strict=True):
        np.testing.assert_allclose(bits(a), bits(b), rtol=1e-6)
