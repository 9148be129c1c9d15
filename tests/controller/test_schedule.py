"""The hyperparameters in force: shapes of the schedule, warm-ups, and a fork's cool-down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import schedule, state

SPACE = {"learning_rate": (1e-5, 1e-1)}
TOTAL = 200
AT = np.arange(TOTAL + 1)


def tuner(total_steps: int | None = TOTAL, **options):
    return atn.AutoTuneNet(SPACE, total_steps, initial={"learning_rate": 1e-2}, **options)


def rates(tuned, *, phase=state.TRAIN, steps=AT, length=None, saved_data=0, **changes):
    """The rate at some steps, as a share of the one that is claimed; in a fork, at its positions."""
    ts = tuned.init(jax.random.key(0))._replace(phase=jnp.int32(phase), **changes)

    def rate(step):
        at = ts._replace(step=step, data_step=step)
        if length is not None:
            begun = {"segment_length": jnp.int32(length), "segment_left": length - step, "step": saved_data + step}
            slots = ts.slots._replace(saved_data=jnp.int32(saved_data))
            at = at._replace(data_step=saved_data + step, slots=slots, **begun)
        return tuned.hyperparams(at)["learning_rate"]

    return np.asarray(jax.jit(jax.vmap(rate))(jnp.asarray(steps))) / 1e-2


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("hold", np.minimum(1.0, (1 - AT / TOTAL) / (1 - schedule.HOLD_SHARE))),
        ("linear", 1 - AT / TOTAL),
        ("cosine", 0.5 + 0.5 * np.cos(np.pi * AT / TOTAL)),
        ("none", np.ones(TOTAL + 1)),
        (lambda spent: (1.0 - spent) ** 2, (1 - AT / TOTAL) ** 2),
    ],
)
def test_rates_follow_the_shape_over_the_budget(decay, expected):
    np.testing.assert_allclose(rates(tuner(decay=decay)), expected, rtol=1e-4, atol=1e-6)


def test_an_open_ended_run_holds_its_rates():
    np.testing.assert_allclose(rates(tuner(None)), 1.0, rtol=1e-5)


def test_rates_rise_at_the_beginning_and_after_a_rollback():
    np.testing.assert_allclose(rates(tuner(warmup_steps=10))[:12], np.minimum((AT[:12] + 1) / 10, 1), rtol=1e-4)
    health = tuner().init(jax.random.key(0)).health._replace(since_rollback=jnp.int32(4))
    np.testing.assert_allclose(rates(tuner(), health=health)[:100], 5 / 20, rtol=1e-4)


def test_a_schedule_keeps_its_shape_and_its_peak_is_what_is_tuned():
    own = optax.warmup_cosine_decay_schedule(0.0, 3.0, 40, TOTAL)
    np.testing.assert_allclose(rates(tuner(schedule=own)), [own(step) / 3.0 for step in AT], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"warmup_steps": 100}, {"schedule": optax.linear_schedule(0.0, 1.0, 100)}])
def test_a_fork_reaches_the_rate_that_it_claims_however_long_the_warm_up_is(options):
    reached = rates(tuner(**options), phase=state.FORK, steps=np.arange(20), length=20)
    np.testing.assert_allclose(reached[5:15], 1.0, rtol=1e-4)
    assert rates(tuner(**options))[10] < 0.2


def test_a_fork_cools_down_over_its_last_quarter():
    reached = rates(tuner(), phase=state.FORK, steps=np.arange(40), length=40)
    np.testing.assert_allclose(reached[:30], 1.0, rtol=1e-4)
    assert np.all(np.diff(reached[30:]) < 0)
    assert schedule.COOL_FLOOR <= reached[-1] < 0.15
    # It stands on the schedule as it is where the round is held.
    late = rates(tuner(), phase=state.FORK, steps=np.arange(20), length=20, saved_data=160)
    assert late[0] == pytest.approx(0.5, rel=1e-3)


def test_rates_cool_down_where_validation_asks_for_it():
    tuned = tuner()
    seen = tuned.init(jax.random.key(0)).validation._replace(cools_from=jnp.int32(40))
    check = int(tuned.plan.check_every)
    cooled = rates(tuned, validation=seen)[40 : 40 + check + 1]
    np.testing.assert_allclose(
        cooled, np.maximum(1 - np.arange(check + 1) / check, schedule.COOL_FLOOR), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"decay": "sqrt"}, ValueError, "decay must be one of hold, linear, cosine, none.*got 'sqrt'"),
        ({"schedule": 0.1}, TypeError, "schedule must be an optax schedule.*got 0.1"),
        ({"decay": "linear", "schedule": optax.constant_schedule(1.0)}, ValueError, "give one of them"),
        ({"schedule": optax.constant_schedule(0.0)}, ValueError, "finite, and positive somewhere"),
        ({"schedule": lambda step: np.nan}, ValueError, "finite, and positive somewhere"),
        ({"total_steps": None, "schedule": optax.constant_schedule(1.0)}, ValueError, "a schedule needs total_steps"),
    ],
)
def test_bad_schedules_name_the_rule(options, error, says):
    with pytest.raises(error, match=says):
        tuner(**options)
