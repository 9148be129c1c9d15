"""What the range sweep says of the rate, for the shapes that losses take over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _state, _tick

LO, HI = 1e-5, 1.0
LENGTH = 60


def swept(loss_of_rate, *, noise=0.0, seed=0):
    """log10 of the rate that a sweep over a loss, as a function of log10 of the rate, points at."""
    rng = np.random.default_rng(seed)
    update = jax.jit(_tick._update_sweep)
    state = _state.Sweep(*(jnp.zeros(()) for _ in _state.Sweep._fields))
    rates = np.log10(LO) + np.arange(LENGTH) / (LENGTH - 1) * np.log10(HI / LO)
    for step in range(LENGTH):
        # A loss shows what the rate of the step before did.
        loss = loss_of_rate(rates[max(step - 1, 0)]) + noise * rng.normal()
        state = update(state, jnp.int32(step), jnp.int32(LENGTH), jnp.float32(loss), jnp.float32(noise))
    return np.log10(LO) + float(state.position) * np.log10(HI / LO)


def test_a_valley_is_found_at_its_bottom():
    assert swept(lambda rate: 4.0 - 2.0 * np.exp(-((rate + 2.0) ** 2))) == pytest.approx(-2.0, abs=0.4)


@pytest.mark.parametrize("seed", range(5))
def test_a_plateau_is_found_where_it_begins(seed):
    """Noise makes any place of a plateau the lowest; its high end is next to where training breaks."""
    found = swept(lambda rate: 4.0 - np.clip(rate + 4.0, 0.0, 2.0) / 2.0, noise=0.03, seed=seed)
    assert -2.2 < found < -1.2


def test_a_plateau_that_still_sinks_a_little_is_a_plateau():
    assert swept(lambda rate: 4.0 - np.clip(rate + 4.0, 0.0, 2.0) / 2.0 - 0.005 * max(rate + 2.0, 0.0)) < -1.2


def test_a_loss_that_falls_to_the_end_points_at_the_end():
    assert swept(lambda rate: 4.0 - 0.5 * (rate + 5.0)) > -0.4


def test_the_unit_of_the_loss_and_a_constant_in_it_do_not_matter():
    def loss(rate):
        return 4.0 - 2.0 * np.exp(-((rate + 2.0) ** 2))

    assert swept(lambda rate: 1000.0 * loss(rate) - 7.0) == pytest.approx(swept(loss), abs=1e-6)


def test_a_run_begins_below_the_plateau():
    tuner = atn.AutoTuneNet({"learning_rate": (LO, HI)}, total_steps=1000)
    update = jax.jit(tuner.update)
    ts = tuner.init(jax.random.key(0))
    while int(ts.phase) == _state.SWEEP:
        rate = np.log10(float(tuner.hyperparams(ts)["learning_rate"]))
        ts, _ = update(ts, jnp.float32(4.0 - np.clip(rate + 4.0, 0.0, 2.0) / 2.0 - 1e-3 * rate))
    center = float(tuner.space.decode(ts.prior.center)["learning_rate"])
    assert 2e-3 < center < 4e-2
