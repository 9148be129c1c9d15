"""What the range sweep says of the rate, for the shapes that losses take over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _state, _sweep
from tests.reference import first_round

LO, HI = 1e-5, 1.0
LENGTH = 60
RATES = np.log10(LO) + np.arange(LENGTH) / (LENGTH - 1) * np.log10(HI / LO)

_update, _read = jax.jit(_sweep.update), jax.jit(_sweep.read)


def losses_of(loss_of_rate, *, noise=0.0, seed=0):
    # A loss shows what the rate of the step before did.
    rng = np.random.default_rng(seed)
    before = [RATES[max(step - 1, 0)] for step in range(LENGTH)]
    return np.array([loss_of_rate(rate) + noise * rng.normal() for rate in before], np.float32)


def swept(losses, *, spread=0.0):
    """log10 of the rate in the middle of the fall, and how far it is trusted."""
    state = _sweep.begun()
    for step, loss in enumerate(losses):
        state = _update(state, jnp.int32(step), loss, jnp.float32(spread))
    middle, _, trust = _read(state, jnp.int32(LENGTH))
    return np.log10(LO) + float(middle) * np.log10(HI / LO), float(trust)


def valley(rate):
    return 4.0 - 2.0 * np.exp(-((rate + 2.0) ** 2))


def plateau(rate):
    return 4.0 - np.clip(rate + 4.0, 0.0, 2.0) / 2.0


def test_a_valley_is_found_on_the_way_to_its_bottom():
    found, trust = swept(losses_of(valley))
    assert -2.8 < found < -2.0
    assert trust > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_a_plateau_is_found_where_the_loss_falls_to_it(seed):
    """Noise makes any place of a plateau the lowest; its high end is next to where training breaks."""
    found, trust = swept(losses_of(plateau, noise=0.03, seed=seed), spread=0.03)
    assert -3.0 < found < -1.8
    assert trust > 0.95


def test_a_plateau_that_sinks_a_little_moves_the_middle_a_little():
    still, _ = swept(losses_of(plateau))
    sinking, _ = swept(losses_of(lambda rate: plateau(rate) - 0.02 * max(rate + 2.0, 0.0)))
    assert sinking == pytest.approx(still, abs=0.3)


def test_one_lucky_batch_at_the_start_is_not_the_best_rate():
    losses = losses_of(plateau, noise=0.02)
    losses[0] = 2.0
    assert swept(losses, spread=0.02)[0] == pytest.approx(swept(losses_of(plateau, noise=0.02))[0], abs=0.5)


@pytest.mark.parametrize("seed", range(5))
def test_noise_without_a_fall_is_not_trusted(seed):
    _, trust = swept(losses_of(lambda rate: 3.0, noise=0.3, seed=seed), spread=0.3)
    assert trust < 0.2


def test_the_unit_of_the_loss_and_a_constant_in_it_do_not_matter():
    found = swept(losses_of(lambda rate: 1000.0 * valley(rate) - 7.0))
    assert found == pytest.approx(swept(losses_of(valley)), abs=1e-3)


@pytest.mark.parametrize("length", [6, 13, 60, 120])
@pytest.mark.parametrize("seed", range(3))
def test_it_reads_as_the_plain_version_does(length, seed):
    rng = np.random.default_rng(seed)
    losses = (3.0 - np.linspace(0.0, 1.5, length) + 0.2 * rng.normal(size=length)).astype(np.float32)
    losses[length // 2] += 5.0
    count = length if seed else max(length * 2 // 3, 4)
    state, twin = _sweep.begun(), first_round.Sweep()
    for step, loss in enumerate(losses[:count]):
        state = _update(state, jnp.int32(step), loss, jnp.float32(0.2))
        blown = twin.see(loss, np.float32(0.2))
        assert bool(_sweep.is_blown(state, jnp.float32(0.2), jnp.int32(step))) == blown
    np.testing.assert_allclose(_read(state, jnp.int32(length)), twin.read(length), atol=1e-5)


def test_a_run_begins_where_the_fall_ends():
    tuner = atn.AutoTuneNet({"learning_rate": (LO, HI)}, total_steps=1000)
    update = jax.jit(tuner.update)
    ts = tuner.init(jax.random.key(0))
    while int(ts.phase) == _state.SWEEP:
        rate = np.log10(float(tuner.hyperparams(ts)["learning_rate"]))
        ts, _ = update(ts, jnp.float32(plateau(rate) - 1e-3 * rate))
    center = float(tuner.space.decode(ts.prior.center)["learning_rate"])
    assert 2e-3 < center < 2e-2
