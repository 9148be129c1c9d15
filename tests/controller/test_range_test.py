"""What the range test says of the rate, for the shapes that losses take over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax.controller import range_test, state
from tests.controller.light import tuner
from tests.reference.algorithm import RangeTest

LENGTH, LO, DECADES = 60, -5.0, 5.0
RATES = LO + DECADES * np.arange(LENGTH) / (LENGTH - 1)

_read, _is_blown = jax.jit(range_test.read), jax.jit(range_test.is_blown)


def losses_of(loss_of_rate, *, noise=0.0, seed=0, tails=None):
    rng = np.random.default_rng(seed)
    draw = rng.normal(size=LENGTH) if tails is None else rng.standard_t(tails, size=LENGTH)
    return np.array([loss_of_rate(rate) for rate in RATES], np.float32) + (noise * draw).astype(np.float32)


def test_of(losses):
    padded = np.zeros(state.empty_range_test().losses.shape, np.float32)
    padded[: len(losses)] = losses
    return state.RangeTest(jnp.asarray(padded), jnp.int32(len(losses)))


test_of.__test__ = False


def found(losses, *, length=LENGTH):
    """log10 of the rate to begin with; the test ends where the loss has blown up."""
    count = next((n for n in range(9, len(losses)) if _is_blown(test_of(losses[:n]))), len(losses))
    return LO + DECADES * float(_read(test_of(losses[:count]), jnp.int32(length), DECADES))


def fall(rate, *, centre=-3.0, width=0.25):
    """From 4 to 2: half of it at the centre, nine tenths ``width * log(9)`` above."""
    return 2.0 + 2.0 / (1.0 + np.exp((rate - centre) / width))


# Half way between the marks, and .3 decades above.
EXPECTED = -3.0 + 0.5 * 0.25 * np.log(9.0) + 0.3


def blowing_up(rate, *, at=-1.0):
    return 3.0 + 50.0 * np.maximum(rate - at, 0.0)


def test_it_begins_above_the_middle_of_the_fall():
    assert found(losses_of(fall)) == pytest.approx(EXPECTED, abs=0.15)
    moved = losses_of(lambda rate: fall(rate, centre=-2.2))
    assert found(moved) == pytest.approx(EXPECTED + 0.8, abs=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_it_little(seed):
    assert found(losses_of(fall, noise=0.1, seed=seed)) == pytest.approx(EXPECTED, abs=0.5)
    assert found(losses_of(fall, noise=0.05, seed=seed, tails=3)) == pytest.approx(EXPECTED, abs=0.6)


@pytest.mark.parametrize("at", [10, 24, 30, 50])
@pytest.mark.parametrize("value", [-3.0, 30.0])
def test_one_wild_batch_moves_it_little(at, value):
    losses = losses_of(fall, noise=0.01)
    losses[at] += value
    assert found(losses) == pytest.approx(EXPECTED, abs=0.3)


@pytest.mark.parametrize("pair", [(8, 9), (9, 10), (9, 11), (14, 16), (24, 25), (40, 42), (50, 51)])
@pytest.mark.parametrize("height", [2.0, 30.0, 1e8])
def test_a_pair_of_wild_batches_is_no_blow_up(pair, height):
    losses = losses_of(fall, noise=0.01)
    losses[list(pair)] += height
    assert found(losses) == pytest.approx(EXPECTED, abs=0.4)


def test_what_comes_after_a_blow_up_does_not_matter():
    losses = losses_of(lambda rate: fall(rate) + blowing_up(rate) - 3.0, noise=0.01)
    assert found(losses) == pytest.approx(EXPECTED, abs=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_fall_it_begins_below_where_the_loss_blows_up(seed):
    assert found(losses_of(blowing_up, noise=0.05, seed=seed)) == pytest.approx(-1.8, abs=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_fall_or_a_blow_up_it_begins_below_the_upper_bound(seed):
    assert found(losses_of(lambda rate: 3.0, noise=0.3, seed=seed)) == pytest.approx(-0.8, abs=0.2)


@pytest.mark.parametrize("value", [0.0, 2.5, -3.0, 1e-20, 1e12])
def test_a_constant_loss_is_no_fall(value):
    """Whatever the rounding of its mean."""
    assert found(np.full(LENGTH, value, np.float32)) == pytest.approx(-0.8, abs=0.01)


@pytest.mark.parametrize(("scale", "shift"), [(1000.0, 0.0), (1.0, -7.0), (1e-3, 100.0)])
def test_the_unit_of_the_loss_and_a_constant_in_it_do_not_matter(scale, shift):
    losses = losses_of(fall, noise=0.02)
    assert found(scale * losses + shift) == pytest.approx(found(losses), abs=0.05)


def test_it_stops_soon_after_a_blow_up_and_not_for_one_high_loss():
    losses = losses_of(blowing_up, noise=0.01)
    stops = [bool(_is_blown(test_of(losses[:n]))) for n in range(1, LENGTH)]
    first = stops.index(True)
    assert -1.0 < RATES[first] < -0.6
    spiked = losses_of(fall, noise=0.01)
    spiked[20] = 50.0
    assert not any(bool(_is_blown(test_of(spiked[:n]))) for n in range(1, LENGTH))


@pytest.mark.parametrize("length", [16, 60, 120])
@pytest.mark.parametrize("seed", range(3))
def test_it_reads_as_the_plain_twin_does(length, seed):
    rng = np.random.default_rng(seed)
    losses = (3.0 - np.linspace(0.0, 1.5, length) + 0.2 * rng.normal(size=length)).astype(np.float32)
    losses[length // 2] += 5.0
    count = length if seed else length * 2 // 3
    twin = RangeTest()
    for loss in losses[:count]:
        twin.see(loss)
    assert bool(_is_blown(test_of(losses[:count]))) == twin.is_blown()
    actual = _read(test_of(losses[:count]), jnp.int32(length), DECADES)
    assert float(actual) == pytest.approx(twin.read(length, DECADES), abs=1e-5)


@pytest.mark.usefixtures("light_surrogate")
def test_a_run_climbs_from_bound_to_bound_and_begins_again_where_the_test_says():
    tuned = tuner("rate", 100)
    update = jax.jit(lambda ts, loss: (*tuned.update(ts, loss), tuned.hyperparams(ts)["learning_rate"]))
    ts, rates = tuned.init(jax.random.key(0)), []
    while int(ts.phase) == state.SWEEP:
        rate = np.log10(float(tuned.hyperparams(ts)["learning_rate"]))
        ts, directive, value = update(ts, jnp.float32(fall(rate)))
        rates.append(float(value))
    np.testing.assert_allclose(rates, np.geomspace(1e-5, 1.0, len(rates)), rtol=1e-4)
    assert directive.restore and int(directive.data_step) == 0
    assert np.log10(float(tuned.hyperparams(ts)["learning_rate"])) == pytest.approx(EXPECTED, abs=0.5)
