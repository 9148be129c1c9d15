"""What a validation metric does to a run that has no round to come: going back to the best state."""

import functools

import jax
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _state

TOTAL, EVAL_EVERY = 200, 10


def overfitting(count=TOTAL, turn=120):
    """Losses that fall all the time, and metrics that rise from a turning point on."""
    rng = np.random.default_rng(5)
    losses = 2.0 * np.exp(-np.arange(count) / 60) + 0.01 * rng.normal(size=count)
    metrics = 0.1 + np.where(np.arange(count) < turn, losses, losses[turn] + 0.02 * (np.arange(count) - turn))
    return losses.astype(np.float32), metrics.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def validated(tuned, ts, losses, metrics):
    """A run that hears a metric now and then; what it was told, its rate and phase, and the step of its kept copy."""

    def one(carry, inputs):
        loss, metric = inputs
        ts = jax.lax.cond(carry.step % EVAL_EVERY == 0, lambda t: tuned.observe_eval(t, metric), lambda t: t, carry)
        ts, directive = tuned.update(ts, loss)
        return ts, (directive, ts.incumbent[0], ts.phase, ts.slots.kept_step)

    return jax.lax.scan(one, ts, (losses, metrics))[1]


VALIDATED = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, TOTAL, initial={"learning_rate": 1e-3})


def returns_to_the_best(losses, metrics):
    told = validated(VALIDATED, VALIDATED.init(jax.random.key(0)), losses, metrics)
    directive, incumbent, phase, kept_step = jax.device_get(told)
    settled = np.flatnonzero(phase == _state.TRAIN)
    assert not np.any(directive.restore[settled]), "nothing was unhealthy"
    steps = [i for i in np.flatnonzero(directive.adopt) if phase[i - 1] == _state.TRAIN]
    return [(kept_step[i], incumbent[i], incumbent[settled[0]]) for i in steps]


def test_when_validation_rises_training_goes_on_from_the_best_state_at_a_lower_rate():
    returned = returns_to_the_best(*overfitting())
    assert returned, "the best state was never returned to"
    kept_step, rate, before = returned[0]
    # Of 4 decades one is a quarter; the copy is that of the step after the best metric.
    assert rate == pytest.approx(max(before - 0.25, 0.0), abs=1e-6)
    assert 110 <= kept_step <= 125


def test_validation_that_does_not_follow_the_training_loss_is_as_bad_as_one_that_rises():
    losses, _ = overfitting()
    noise = 0.002 * np.random.default_rng(3).normal(size=len(losses)).astype(np.float32)
    flat = np.maximum(losses, losses[110]) + noise
    assert returns_to_the_best(losses, flat)
    assert not returns_to_the_best(np.maximum(losses, losses[110]), flat), "neither falls any more"
    assert not returns_to_the_best(losses, losses + noise), "it follows"
