"""What a validation metric does to a run that has no round to come: going back to the best state."""

import functools

import jax
import jax.numpy as jnp
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
    # The first of them goes back to where the first round began.
    assert not np.any(directive.restore[settled[1:]]), "nothing was unhealthy"
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


@functools.partial(jax.jit, static_argnums=(0, 3))
def retreats(tuned, metrics, levels, ends=True):
    """How often a settled run went back, told nothing but metrics and the level of its training loss.

    Without ``ends`` only the ways back are counted that lower the rates, not those near the end.
    """
    ts = tuned.init(jax.random.key(0))
    ts = ts._replace(
        phase=jnp.int32(_state.TRAIN),
        round=ts.round._replace(index=jnp.int32(1)),
        initial_loss=levels[0],
    )

    def one(ts, told):
        number, metric, level = told
        ts = ts._replace(
            step=number * (TOTAL // (len(metrics) - 1)),
            guard=ts.guard._replace(short=level),
            # The state of the best metric has been copied by the next one.
            validation=ts.validation._replace(is_kept=ends),
        )
        return tuned.observe_eval(ts, metric), ts.validation.retreats

    return jax.lax.scan(one, ts, (jnp.arange(len(metrics)), metrics, levels))[1][-1]


def test_the_fall_from_the_untrained_state_is_no_noise():
    """With few metrics it would hide a rise for most of a run."""
    metrics = np.float32([2.68, 0.39, 0.43, 0.52, 0.69, 0.75])
    levels = np.float32([2.3, 0.3, 0.2, 0.14, 0.1, 0.06])
    assert retreats(VALIDATED, metrics, levels)
    assert not retreats(VALIDATED, np.float32([2.68, 0.39, 0.38, 0.38, 0.37, 0.37]), levels)


def test_a_jump_long_past_does_not_hide_that_the_end_is_worse():
    """A loss that jumped, came back, and settled well above the best metric: its jumps are not the noise of the end."""
    metrics = np.float32([2.7, 0.12, 0.12, 0.08, 0.12, 0.07, 0.22, 0.33, 0.31, 0.28, 0.12, 0.21, 0.15, *[0.139] * 7])
    levels = np.float32(0.05 * 0.8 ** np.arange(len(metrics)))
    levels[6:9] += 0.3
    assert retreats(VALIDATED, metrics, levels)
    assert not retreats(VALIDATED, np.minimum(metrics, np.minimum.accumulate(metrics) + 0.01), levels)


@pytest.mark.parametrize("count", [10, 50])
def test_noise_about_a_metric_that_follows_seldom_looks_like_a_rise(count):
    rng = np.random.default_rng(0)
    fall = 1.9 * np.exp(-np.arange(count + 1) / (0.2 * count))
    noise = 0.05 * rng.normal(size=(200, count + 1)) * (np.arange(count + 1) > 0)
    metrics, levels = (0.4 + fall + noise).astype(np.float32), (0.4 + fall).astype(np.float32)
    went_back = jax.vmap(lambda each: retreats(VALIDATED, each, levels, False))(metrics)
    assert np.mean(np.asarray(went_back) > 0) < 0.05
    # The best of many metrics is a lucky one: near the end some go back to it for nothing, and lose little.
    went_back = jax.vmap(lambda each: retreats(VALIDATED, each, levels))(metrics)
    assert np.mean(np.asarray(went_back) > 0) < (0.02 if count == 10 else 0.3)
