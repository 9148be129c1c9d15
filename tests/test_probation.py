"""Training that begins again after the first round, and is not as far as its forks were by the time it should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _guard, _state

TOTAL = 1000
TUNER = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, TOTAL)
UPDATE = jax.jit(TUNER.update)
LATE = int(TUNER.plan.late[0])


@functools.cache
def run(kind, noise=0.01, outlier_at=None):
    """A run whose forks get from 2 to 1; afterwards training falls on ('healthy'), or stays at 1.7 until its rate is
    lowered by a decade ('ruined'), or two, getting to 1.5 after one ('halfway'), or for good ('lost')."""
    rng = np.random.default_rng(0)
    ts, level, trace = TUNER.init(jax.random.key(0)), 2.0, []
    begun = rate = None
    while int(ts.round.index) < 2 and int(ts.step) < TOTAL // 2:
        in_fork, was = int(ts.phase) == _state.FORK, ts
        if in_fork and int(ts.segment_left) == int(ts.segment_length):
            level = 2.0
        if in_fork:
            level = max(level - 1.0 / LATE, 1.0)
        elif begun is not None:
            fallen = round((rate - float(ts.incumbent[0])) / 0.25)  # decades, of four
            is_well = fallen >= {"healthy": 0, "ruined": 1, "halfway": 2, "lost": 9}[kind]
            worst = 1.5 if kind == "halfway" and fallen == 1 else 1.7
            level = max(level - (0.02 if is_well else 0.01), 0.5 if is_well else worst)
        is_outlier = begun is not None and int(ts.step) + 1 - begun == outlier_at
        ts, directive = UPDATE(ts, jnp.float32(1e30 if is_outlier else level + noise * rng.normal()))
        if begun is None and int(ts.rounds_held) == 1:
            begun, rate, level = int(ts.step), float(ts.incumbent[0]), 2.0
        elif begun is not None and not in_fork:
            level = 2.0 if bool(directive.restore) else level
            trace.append((int(was.step) - begun + 1, directive, float(ts.incumbent[0]), ts))
    return rate, trace


def rollbacks(kind, **options):
    return [at for at, d, *_ in run(kind, **options)[1] if int(d.outcome) == _state.OUTCOME_ROLLBACK]


def test_training_that_keeps_up_is_left_alone():
    assert rollbacks("healthy") == []


def test_training_that_stays_behind_begins_again_at_a_lower_rate():
    rate, trace = run("ruined")
    assert rollbacks("ruined") == [4 * LATE]
    _, directive, after, _ = trace[4 * LATE - 1]
    assert bool(directive.restore) and not bool(directive.adopt)
    assert int(directive.verdict) == _guard.BEHIND
    assert after == pytest.approx(rate - 0.25, abs=1e-5)  # a decade of four


def test_it_begins_from_where_the_round_began():
    """No snapshot takes the place of that state before it is known whether it is needed."""
    for kind in ("healthy", "ruined"):
        assert not any(bool(d.save) for at, d, *_ in run(kind)[1] if at <= 4 * LATE)


def test_a_lower_rate_that_gets_no_farther_is_taken_back():
    """It was not the rate: training goes on at the one that was chosen, and is not held up again."""
    rate, trace = run("lost")
    assert rollbacks("lost") == [4 * LATE]
    rates = [after for *_, after, _ in trace]
    assert rates[4 * LATE] == pytest.approx(rate - 0.25, abs=1e-5)
    assert rates[8 * LATE] == pytest.approx(rate, abs=1e-6)
    assert int(trace[8 * LATE][3].probation) == 0


def test_lower_rates_are_tried_while_each_gets_farther():
    rate, trace = run("halfway")
    assert rollbacks("halfway") == [4 * LATE, 8 * LATE]
    assert trace[8 * LATE][2] == pytest.approx(rate - 0.5, abs=1e-5)


def test_noise_is_no_reason():
    """Where the forks gained less than twice what single losses differ by, they promise nothing."""
    assert rollbacks("lost", noise=1.0) == []


@pytest.mark.parametrize(
    ("spread", "unmet", "is_behind"),
    [(0.1, 20, True), (0.6, 20, False), (0.1, 5, False)],
    ids=["behind", "within noise", "met of late"],
)
def test_what_is_missing_has_to_tell_from_noise_and_to_last(spread, unmet, is_behind):
    *_, ts = run("healthy")[1][2 * LATE]
    guard = ts.guard._replace(short=jnp.float32(1.7), level=jnp.float32(1.7), spread=jnp.float32(spread))
    due = {"probation": jnp.int32(1), "unmet": jnp.int32(unmet), "segment_left": jnp.int32(9)}
    ts = ts._replace(promised=jnp.float32(1.0), initial_loss=jnp.float32(2.0), guard=guard, **due)
    _, directive = UPDATE(ts, jnp.float32(1.7))
    assert (int(directive.verdict) == _guard.BEHIND) == is_behind


@pytest.mark.parametrize("before", [0, 1, 4])
def test_a_single_loss_beyond_all_measure_is_no_reason(before):
    assert rollbacks("healthy", outlier_at=4 * LATE - before) == []
