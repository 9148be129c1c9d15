"""What a validation metric does between rounds: cooling down, going back to the best state, and ending in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax.bayesopt import trials
from autotunenet_jax.controller import plan, schedule, state, validation_monitor
from tests.controller.light import run, told, tuner

pytestmark = pytest.mark.usefixtures("light_surrogate")

TOTAL = 400
STEPS = np.arange(TOTAL)
LOSSES = (2.0 * np.exp(-STEPS / 120)).astype(np.float32)
# Falls until here, where a reading is due, and is worse from then on.
TURN = 220
WORSE = np.where(STEPS <= TURN, LOSSES, LOSSES[TURN] + 0.5 + 1e-3 * (STEPS - TURN)).astype(np.float32)


def tuned():
    """Without forks: all but the range test is ordinary training."""
    return tuner("rate", TOTAL, max_share=0.05)


CHECK = 20
BACK = validation_monitor.BACK_DECADES / 5.0


def validated(metrics, *, reports=False):
    rows, _ = run(tuned(), told(LOSSES, metrics, reports=reports))
    assert not np.any(rows["directive"].outcome == state.OUTCOME_ROLLBACK)
    return rows


def cooling(rows):
    return np.flatnonzero(rows["validation"].cools_from < plan.NEVER)


def went_back(rows):
    return np.flatnonzero(rows["directive"].adopt)


def test_readings_are_asked_for_at_regular_steps_and_before_the_last():
    asked = np.flatnonzero(validated(LOSSES)["directive"].evaluate) + 1
    assert int(tuned().plan.check_every) == CHECK
    np.testing.assert_array_equal(asked[asked > CHECK], [*range(2 * CHECK, TOTAL, CHECK), TOTAL - 1, TOTAL])


def test_a_metric_that_falls_every_other_time_changes_nothing():
    rows = validated(LOSSES + 0.5 * (STEPS // CHECK % 2 == 0))
    assert len(cooling(rows)) == len(went_back(rows)) == 0
    assert np.all(rows["incumbent"][CHECK:] == rows["incumbent"][-1])


CLIMB = validation_monitor.CLIMB_DECADES / 5.0


def climbed(rows):
    return np.flatnonzero(np.diff(rows["incumbent"][CHECK:, 0]) > 0) + CHECK + 1


def test_two_readings_in_a_row_that_are_the_lowest_let_the_rates_climb_until_they_are_to_fall():
    rows = validated(LOSSES)
    steps = climbed(rows)
    # After a climb the next two readings say whether there is another, and none comes near the bound.
    assert len(steps) >= 2 and np.all(np.diff(steps) == 2 * CHECK) and steps[-1] <= 0.6 * TOTAL
    np.testing.assert_allclose(np.diff(rows["incumbent"][:, 0])[steps - 1], CLIMB, atol=1e-6)
    assert rows["incumbent"].max() <= 1.0 and len(went_back(rows)) == 0


def test_rates_that_climbed_too_high_are_taken_back_with_the_state_and_climb_no_more():
    first = climbed(validated(LOSSES))[0]
    metrics = LOSSES.copy()
    metrics[first + 1 : first + CHECK + 1] += 0.5
    rows = validated(metrics)
    assert climbed(rows)[0] == first
    back = went_back(rows)[0]
    assert back == first + CHECK and rows["slots"].kept_step[back] == first + 1
    np.testing.assert_allclose(rows["incumbent"][back], rows["incumbent"][first - 1], atol=1e-6)
    assert len(climbed(rows)) == len(went_back(rows)) == 1 and len(cooling(rows)) == 0


def read(metrics, *, incumbent, retreats=0, first_fork=0.8):
    """The incumbents after readings of one state, on five decades, whose first fork was at ``first_fork``."""
    begun = tuner("rate", TOTAL)
    ts = begun.init(jax.random.key(0))
    tried = trials.add(ts.knowledge.observations, jnp.array([first_fork]), jnp.float32(0.0), group=0)
    ts = ts._replace(
        phase=jnp.int32(state.TRAIN),
        segment_left=jnp.int32(plan.NEVER),
        incumbent=jnp.array([incumbent], jnp.float32),
        knowledge=ts.knowledge._replace(observations=tried),
        validation=ts.validation._replace(retreats=jnp.int32(retreats)),
    )
    found = []
    for number, metric in enumerate(metrics, start=1):
        ts = begun.core.observe_eval(ts._replace(step=jnp.int32(CHECK * number)), jnp.float32(metric))
        ts, _ = validation_monitor.kept_at_once(ts)
        found.append(float(ts.incumbent[0]))
    return np.array(found)


def test_rates_far_below_the_first_fork_climb_half_of_the_way_to_it_until_the_end_comes_near():
    falling = np.arange(20.0, 0.0, -1.0)
    found = read(falling, incumbent=0.2)
    # By 1.5 decades and by .75; then they are near, and half way through the run.
    steps = np.round(np.diff(found, prepend=0.2), 6)
    np.testing.assert_allclose(steps[[1, 3, 5, 7]], [0.3, 0.15, CLIMB, CLIMB], atol=1e-6)
    assert np.count_nonzero(steps) == 6 and not steps[12:].any()
    late = read(falling[10:], incumbent=0.2)
    np.testing.assert_allclose(late[:4], [0.2, 0.5, 0.5, 0.65], atol=1e-6)


@pytest.mark.parametrize(("incumbent", "climb"), [(0.2, 0.3), (0.65, 0.0)])
def test_from_far_below_rates_climb_though_training_once_went_back(incumbent, climb):
    found = read([5.0, 4.0], incumbent=incumbent, retreats=1)
    assert found[-1] - incumbent == pytest.approx(climb, abs=1e-6)


def test_a_climb_from_far_below_that_was_too_high_is_taken_back_and_there_is_no_other():
    found = read([5.0, 4.0, 9.0, 3.0, 2.0, 1.0], incumbent=0.2)
    np.testing.assert_allclose(found, [0.2, 0.5, 0.2, 0.2, 0.2, 0.2], atol=1e-6)


def test_two_worse_readings_cool_the_rates_down_and_a_third_goes_back_to_the_best_state():
    rows = validated(WORSE)
    # Read at 240 and 260: then the rates fall until 280.
    down = cooling(rows)[cooling(rows) < TURN + 3 * CHECK]
    assert down[0] == TURN + 2 * CHECK and down[-1] == TURN + 3 * CHECK - 1
    rates = rows["hp"]["learning_rate"][down] / rows["hp"]["learning_rate"][down[0] - 1]
    assert np.all(np.diff(rates) < 0) and rates[-1] == pytest.approx(schedule.COOL_FLOOR, abs=0.05)
    back = went_back(rows)[0]
    assert back == TURN + 3 * CHECK
    # The copy is that of the step after the best reading, and the data goes on.
    assert rows["slots"].kept_step[back] == TURN + 1
    assert rows["directive"].data_step[back] == rows["directive"].data_step[back - 1] + 1
    assert rows["incumbent"][back, 0] == pytest.approx(rows["incumbent"][back - 1 - CHECK, 0] - BACK, abs=1e-5)


def test_a_state_that_was_only_hot_goes_on_at_the_rate_it_had():
    metrics = WORSE.copy()
    metrics[TURN + 3 * CHECK :] = 0.9 * LOSSES[TURN + 3 * CHECK :]
    rows = validated(metrics)
    assert len(cooling(rows)) == CHECK
    assert len(went_back(rows)) == 0
    before, after = rows["incumbent"][TURN], rows["incumbent"][-1]
    np.testing.assert_array_equal(before, after)
    # And so do the rates in force: nothing of the cool-down is left.
    at = TURN + 3 * CHECK
    held = 1.0 if at < 0.6 * TOTAL else (1.0 - (at + 1) / TOTAL) / 0.4
    expected = tuned().space.decode(before)["learning_rate"] * held
    assert rows["hp"]["learning_rate"][at] == pytest.approx(float(expected), rel=1e-4)


def test_hot_readings_begin_anew_after_a_state_that_cooled_to_a_better_one():
    """At the rate it had, readings as high as before are no news."""
    metrics = WORSE.copy()
    metrics[TURN + 3 * CHECK] = 0.5 * LOSSES[TURN]
    rows = validated(metrics)
    assert len(cooling(rows)) > CHECK
    assert cooling(rows)[CHECK] >= TURN + 6 * CHECK


@pytest.mark.parametrize("turn", [0, TURN])
def test_readings_that_are_equal_say_nothing_against_a_state(turn):
    """An accuracy that is full, or counts what has not been learnt yet."""
    rows = validated(np.where(turn >= STEPS, LOSSES, LOSSES[turn]))
    assert len(cooling(rows)) == len(went_back(rows)) == 0
    assert np.all(rows["incumbent"][TURN + CHECK :] == rows["incumbent"][-1])


def test_the_run_ends_in_the_state_of_the_lowest_reading():
    metrics = np.where(STEPS <= 360, LOSSES, LOSSES[360] + 0.5)
    rows = validated(metrics)
    np.testing.assert_array_equal(went_back(rows), [TOTAL - 1])
    assert rows["slots"].kept_step[-1] == 361
    # There is no time to better it: nothing cools down, and no rate changes.
    assert len(cooling(rows)) == 0
    assert rows["incumbent"][-1] == rows["incumbent"][TURN]
    # Where the last reading is the lowest it stays.
    assert len(went_back(validated(LOSSES))) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_metric_that_is_not_finite_is_worse_than_any(value):
    metrics = np.where(STEPS <= TURN, LOSSES, value)
    rows = validated(metrics)
    assert went_back(rows)[0] == TURN + 3 * CHECK
    assert rows["slots"].kept_step[went_back(rows)[0]] == TURN + 1


def test_only_the_order_of_readings_counts():
    rows = validated(WORSE)
    for other in (WORSE**3 - 100.0, np.log(WORSE), -1.0 / WORSE):
        np.testing.assert_array_equal(np.stack(rows["directive"]), np.stack(validated(other)["directive"]))


def test_metrics_reported_at_every_step_do_not_count_more_often():
    rows = validated(WORSE, reports=True)
    reads = np.diff(rows["validation"].read_at)
    assert np.min(reads[reads > 0][:-1]) >= 0.8 * CHECK
    first = went_back(rows)[0]
    assert TURN + 2 * 0.8 * CHECK <= first <= TURN + 4 * CHECK
    assert rows["incumbent"][first, 0] == pytest.approx(rows["incumbent"][TURN, 0] - BACK, abs=1e-5)


@pytest.fixture(scope="module")
def settled():
    """A settled run about to go back to a kept state, and what a metric makes of it."""
    ts = tuned().init(jax.random.key(0))
    seen = ts.validation._replace(best=jnp.float32(1.0), hot=jnp.float32(1.0), read_at=jnp.int32(100))
    ts = ts._replace(phase=jnp.int32(state.TRAIN), step=jnp.int32(102), validation=seen)
    return ts, jax.jit(tuned().observe_eval)


def test_a_reading_that_does_not_count_leaves_the_way_back_open(settled):
    """A high loss may put it off for some steps; meanwhile metrics go on being reported."""
    ts, observe = settled
    ts = ts._replace(validation=ts.validation._replace(returns=jnp.bool_(True), is_kept=jnp.bool_(True)))
    after = observe(ts, 0.5).validation
    assert after.returns and after.is_kept
    assert float(after.best) == 1.0 and float(after.level) == 0.5


def test_a_metric_inside_a_fork_is_its_score_only_in_its_last_step(settled):
    ts, observe = settled
    ts = ts._replace(phase=jnp.int32(state.FORK), segment_left=jnp.int32(2))
    assert int(observe(ts, 0.5).window.eval_count) == 0
    last = observe(ts._replace(segment_left=jnp.int32(1)), 0.5)
    assert float(last.window.eval_sum) == 0.5 and int(last.window.eval_count) == 1
    assert float(last.validation.best) == 1.0


def unvalidated(losses, total=TOTAL):
    """Without any metric; a healthy loss throughout."""
    rows, _ = run(tuner("rate", total, max_share=0.05), told(losses, None))
    assert not np.any(rows["directive"].outcome == state.OUTCOME_ROLLBACK)
    return rows


# Higher by a twentieth from the turn on: nothing that the loss monitor minds.
HIGHER = np.where(STEPS < TURN, LOSSES, 1.05 * LOSSES[TURN - CHECK]).astype(np.float32)


def test_without_a_metric_a_training_loss_that_falls_changes_nothing():
    rows = unvalidated(LOSSES)
    assert np.all(rows["incumbent"][CHECK:] == rows["incumbent"][-1])


def test_without_a_metric_rates_fall_where_the_training_loss_does_not_and_nothing_is_undone():
    rows = unvalidated(HIGHER)
    assert not np.any(rows["directive"].adopt)
    falls = np.flatnonzero(np.diff(rows["validation"].has_fallen)) + 1
    # Two means of a twentieth of the budget each, above the lowest.
    assert falls[0] == TURN + 2 * CHECK - 1
    fallen = rows["incumbent"][falls[0] - 1] - rows["incumbent"][falls[0]]
    np.testing.assert_allclose(fallen, BACK, atol=1e-6)


def test_by_the_training_loss_rates_fall_once_however_long_it_rises():
    rows = unvalidated(np.where(STEPS < 60, LOSSES, LOSSES[60] * (1.0 + 0.2 * STEPS / TOTAL)).astype(np.float32))
    incumbents = rows["incumbent"][CHECK:]
    np.testing.assert_allclose(incumbents[0] - incumbents[-1], BACK, atol=1e-6)


def test_a_metric_takes_over_from_the_training_loss():
    metrics = np.where(STEPS < TURN, np.inf, np.linspace(1.0, 0.5, TOTAL)).astype(np.float32)
    rows, _ = run(tuned(), told(HIGHER, metrics))
    assert not rows["validation"].has_fallen[-1] and len(went_back(rows)) == 0


def test_a_metric_that_is_not_finite_says_something_only_where_one_was_asked_for():
    """So that one program serves steps with a metric and without."""
    net = tuned()
    ts = net.init(jax.random.key(0))
    ts = ts._replace(phase=jnp.full_like(ts.phase, state.TRAIN), step=jnp.full_like(ts.step, 5 * CHECK + 1))
    told = net.observe_eval(ts, jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, told._replace(key=0), ts._replace(key=0))
    due = ts._replace(step=jnp.full_like(ts.step, 5 * CHECK))
    assert int(net.observe_eval(due, jnp.nan).validation.worse) == 1
    assert float(net.observe_eval(ts, 0.5).validation.best) == 0.5
