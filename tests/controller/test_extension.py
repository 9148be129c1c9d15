"""Another budget on purpose, in the middle of a run and when it is resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller.extension import relaid
from autotunenet_jax.controller.plan import NEVER

SPACE = {"learning_rate": (1e-4, 1.0), "weight_decay": (1e-6, 1e-2)}


def made(total, **options):
    return atn.AutoTuneNet(SPACE, total, **options)


def starts(plan):
    return [int(start) for start in np.asarray(plan.start) if start < NEVER]


@pytest.fixture(scope="module")
def begun():
    """700 of 1,000 steps without forks: a state in ordinary training, two rounds behind it."""
    tuner = made(1000)
    ts = tuner.init(jax.random.key(0))
    held = ts.round._replace(index=jnp.int32(2))
    return tuner, ts._replace(
        step=jnp.int32(300), data_step=jnp.int32(250), phase=jnp.int32(0), round=held, segment_left=jnp.int32(100)
    )


def test_the_rest_is_laid_anew_and_what_was_held_stays(begun):
    tuner, ts = begun
    assert starts(tuner.plan) == [0, 120, 400, 650]
    longer = tuner.extend(ts, total_steps=3000)
    made(3000).check(longer)
    assert starts(longer.plan) == [0, 120, 1200, 1950]
    assert int(longer.plan.total) == 3000 and int(longer.segment_left) == 900
    assert int(longer.plan.length[1]) == int(tuner.plan.length[1])
    assert int(longer.plan.length[2]) == int(made(3000).plan.length[2])
    assert int(longer.plan.check_every) == 150
    shorter = tuner.extend(ts, total_steps=500)
    made(500).check(shorter)
    # What would have begun by now begins next.
    assert int(shorter.segment_left) == max(int(shorter.plan.start[2]) - 300, 1)
    # Rates follow the new budget: held till 60 % of it.
    one = float(tuner.hyperparams(ts)["learning_rate"])
    assert float(made(3000).hyperparams(longer)["learning_rate"]) == pytest.approx(one)
    late = ts._replace(step=jnp.int32(800))
    assert float(tuner.hyperparams(late)["learning_rate"]) == pytest.approx(0.5 * one)
    later = made(3000).hyperparams(tuner.extend(late, total_steps=3000))["learning_rate"]
    assert float(later) == pytest.approx(one)


def test_a_fork_under_way_is_finished(begun):
    tuner, ts = begun
    ts = ts._replace(phase=jnp.int32(2), segment_left=jnp.int32(33), segment_length=jnp.int32(80))
    longer = tuner.extend(ts, total_steps=4000)
    assert (int(longer.segment_left), int(longer.segment_length)) == (33, 80)
    assert starts(longer.plan) == [0, 120, 400, 2600]
    assert int(longer.plan.length[2]) == int(tuner.plan.length[2])


def test_there_and_back_is_where_it_was(begun):
    tuner, ts = begun
    back = made(2500).extend(tuner.extend(ts, total_steps=2500), total_steps=1000)
    tuner.check(back)
    for name in ("start", "length", "forks", "kind"):
        np.testing.assert_array_equal(getattr(back.plan, name), getattr(tuner.plan, name))
    assert int(back.segment_left) == 100


def test_what_cannot_be_is_refused(begun):
    tuner, ts = begun
    for total in (299, 300):
        with pytest.raises(ValueError, match=f"must exceed the 300 steps that are done; got {total}"):
            tuner.extend(ts, total_steps=total)
    with pytest.raises(TypeError, match="must be an integer"):
        tuner.extend(ts, total_steps=1e4)
    with pytest.raises(ValueError, match="made with another plan"):
        made(1200).extend(ts, total_steps=5000)
    with pytest.raises(ValueError, match="made with another plan"):
        made(3000).check(ts)


def test_schedules_and_open_ended_runs():
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 50, 2000)
    tuner = made(1000, schedule=shape)
    longer = tuner.extend(tuner.init(jax.random.key(0)), total_steps=2000)
    made(2000, schedule=shape).check(longer)
    tuner = made(None)
    ts = tuner.init(jax.random.key(0))._replace(step=jnp.int32(700), phase=jnp.int32(0))
    ts = ts._replace(round=ts.round._replace(index=jnp.int32(3)))
    plan = tuner.extend(ts, total_steps=2000).plan
    assert starts(plan)[3:] == [800, 1300]


def test_a_plan_never_loses_its_empty_last_row():
    long, short = made(5000).plan, made(300).plan
    for begun in (0, 1, 5, 31, 32):
        assert int(relaid(long, short, begun=begun, step=10).start[-1]) == NEVER
