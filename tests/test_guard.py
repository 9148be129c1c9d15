"""Verdicts over losses: what is noise, what is a spike, what is a catastrophe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _guard

GUARD = atn.Guard()
LONG = 200


@jax.jit
def watched(losses, ceiling, state):
    """States and verdicts of a run of losses."""

    def step(state, loss):
        state, verdict = _guard.watch(GUARD, state, loss, ceiling=ceiling)
        return state, (state, verdict)

    return jax.lax.scan(step, state, losses)


def verdicts(losses, *, ceiling=np.inf, state=None):
    state, (states, codes) = watched(
        jnp.asarray(losses, jnp.float32), jnp.float32(ceiling), _guard.init() if state is None else state
    )
    return np.asarray(codes), state, states


def noise(seed=0, count=LONG, level=1.0, scale=0.1):
    return (level + scale * np.random.default_rng(seed).normal(size=count)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sigmas": 0.5}, ValueError, "sigmas must be finite and at least 1; got 0.5"),
        ({"patience": 0}, ValueError, "patience must be finite and at least 1; got 0"),
        ({"window": float("inf")}, ValueError, "window must be finite"),
        ({"max_rollbacks": -1}, ValueError, "max_rollbacks must be finite and at least 0; got -1"),
        ({"warmup": "48"}, TypeError, "warmup must be a number; got '48'"),
        ({"patience": True}, TypeError, "patience must be a number; got True"),
    ],
)
def test_bad_thresholds(options, error, says):
    with pytest.raises(error, match=says):
        atn.Guard(**options)


def test_no_rollback_is_a_valid_wish():
    assert atn.Guard(max_rollbacks=0).max_rollbacks == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 3, 100])
def test_non_finite_losses_are_named_at_once_and_leave_no_trace(value, position):
    losses = noise()
    losses[position] = value
    codes, state, _ = verdicts(losses)
    assert codes[position] == _guard.NON_FINITE
    assert np.all(np.delete(codes, position) == _guard.HEALTHY)
    without, expected, _ = verdicts(np.append(np.delete(losses, position), losses[-1]))
    assert np.all(without == _guard.HEALTHY)
    assert abs(float(state.level) - float(expected.level)) < 0.02
    assert abs(float(state.spread) - float(expected.spread)) < 0.02


@pytest.mark.parametrize("position", [4, 20, 60, 199])
def test_a_single_huge_value_is_forgotten(position):
    losses = noise(count=400)
    losses[position] = 1e30
    codes, state, _ = verdicts(losses, ceiling=2.5)
    assert np.all(codes <= _guard.WATCHING)
    assert abs(float(state.level) - 1.0) < 0.1
    assert float(state.spread) < 0.2
    # The watch is awake again: a jump that stays is found.
    later, _, _ = verdicts(np.full(20, 5.0), state=state)
    assert np.any(later >= _guard.SPIKE)


def test_huge_values_that_stay_are_found_before_and_after_warm_up():
    for position in (10, 100):
        losses = noise()
        losses[position:] = 1e30
        codes, *_ = verdicts(losses, ceiling=3.0)
        assert np.any(codes[position : position + 10] >= _guard.SPIKE)


def test_a_spike_needs_patience_and_healthy_values_take_it_back():
    losses = noise()
    losses[100 : 100 + GUARD.patience - 1] = 3.0
    assert np.all(verdicts(losses)[0] <= _guard.WATCHING)
    losses[100 : 100 + GUARD.patience] = 3.0
    codes, *_ = verdicts(losses)
    assert codes[100 + GUARD.patience - 1] == _guard.SPIKE
    apart = noise()
    apart[60:160:2] = 3.0
    assert np.all(verdicts(apart)[0] <= _guard.WATCHING)


def test_unusual_values_do_not_enter_the_statistics():
    losses = noise()
    calm = verdicts(losses)[1]
    losses[150:153] = 4.0
    assert abs(float(verdicts(losses)[1].level) - float(calm.level)) < 0.01


def test_falling_losses_and_small_plateaus_are_healthy():
    steps = np.arange(LONG)
    for losses in (np.exp(-steps / 20), 5.0 - 0.02 * steps, np.where(steps < 100, 2.0, 1.0), 2.0 + 0 * steps):
        assert np.all(verdicts(losses)[0] == _guard.HEALTHY)


def test_a_slow_climb_over_the_ceiling_is_divergence():
    losses = noise(scale=0.02) + np.linspace(0, 3, LONG)
    codes, *_ = verdicts(losses, ceiling=2.0)
    first = int(np.argmax(codes == _guard.DIVERGED))
    assert 60 < first < 100


@pytest.mark.parametrize("shift", [-64.0, 64.0])
def test_only_differences_count(shift):
    losses = np.round(noise(3) * 2**8) / 2**8
    losses[100:110] += 2.0
    codes, *_ = verdicts(losses, ceiling=4.0)
    moved, *_ = verdicts(losses + shift, ceiling=4.0 + shift)
    np.testing.assert_array_equal(codes, moved)
    assert np.any(codes == _guard.SPIKE)


@pytest.mark.parametrize("heavy", [False, True])
def test_noise_is_no_failure(heavy):
    """Fewer than one false alarm in a hundred windows of a hundred steps, from a fresh start without any progress."""
    windows = 2000
    rng = np.random.default_rng(0)
    draw = rng.standard_t(df=5, size=(windows, 104)) if heavy else rng.normal(size=(windows, 104))
    losses = jnp.asarray(1.0 + 0.1 * draw, jnp.float32)
    spread = jnp.float32(0.1 * np.mean(np.abs(draw)))
    # As the tuner sets it: where the run began, from four losses, and six spreads above.
    ceilings = jnp.mean(losses[:, :4], axis=1) + 6.0 * spread
    states = _guard.init()._replace(level=jnp.float32(1.0), spread=spread)
    _, (_, codes) = jax.jit(jax.vmap(watched, in_axes=(0, 0, None)))(losses[:, 4:], ceilings, states)
    assert np.mean(np.any(np.asarray(codes) >= _guard.NON_FINITE, axis=1)) < 0.01


def test_every_verdict_has_a_message_for_the_user():
    assert set(_guard.MESSAGES) == set(range(5))
    failures = [bool(_guard.is_failure(jnp.int32(code))) for code in range(5)]
    assert failures == [False, False, True, True, True]
