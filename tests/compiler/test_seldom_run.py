import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax.compiler.seldom_run import seldom_run


@pytest.mark.parametrize("off", ["", "seldom_run"])
def test_it_is_jit_with_or_without_optimisation(monkeypatch, off):
    monkeypatch.setenv("AUTOTUNENET_COMPILER_OFF", off)
    traces, options, jit = [], [], jax.jit

    def noted(function, *, compiler_options, **others):
        options.append(compiler_options)
        return jit(function, compiler_options=compiler_options, **others)

    monkeypatch.setattr(jax, "jit", noted)

    @functools.partial(seldom_run, static_argnums=0, donate_argnums=1)
    def scaled(factor, x):
        """Said of it."""
        traces.append(factor)
        return factor * jnp.cumsum(x)

    for factor in (2, 3, 2, 3):
        given = jnp.arange(4.0)
        np.testing.assert_array_equal(scaled(factor, given), factor * np.array([0.0, 1.0, 3.0, 6.0]))
        assert given.is_deleted()
    assert traces == [2, 3]
    assert [level and level["xla_backend_optimization_level"] for level in options] == [None if off else 0]
    assert scaled.__doc__ == "Said of it."
