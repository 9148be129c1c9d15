"""Whole trainings that do what they are told: bad batches, damage, hard data, and the unit of the loss."""

import functools

import numpy as np
import pytest

from autotunenet_jax.controller import loss_monitor, state
from tests.controller.light import live, training, tuner

pytestmark = pytest.mark.usefixtures("light_surrogate")

TOTAL = 800
ENDED = 264
"""The step that ends the last round of an undisturbed run."""


@functools.cache
def undisturbed(total=TOTAL):
    return live(tuner("rate", total), training(total))


def lived(total=TOTAL, **disturbances):
    return live(tuner("rate", total), training(total, **disturbances))


def outcomes(rows):
    """The outcomes in their order, without the steps at which nothing happened."""
    told = rows["directive"].outcome
    return told[told != state.OUTCOME_NONE].tolist()


def rolled_back(rows):
    return np.flatnonzero(rows["directive"].outcome == state.OUTCOME_ROLLBACK)


def falls(rows):
    """Steps of ordinary training at which the rate fell."""
    fell = np.diff(rows["incumbent"][:, 0], prepend=rows["incumbent"][0, 0]) < -1e-6
    ends = np.isin(rows["directive"].outcome, [state.OUTCOME_ROUND_MOVED, state.OUTCOME_ROUND_FAILED])
    return np.flatnonzero(fell & (rows["phase"] == state.TRAIN) & ~ends)


def random_steps(share, seed, total=TOTAL):
    return np.flatnonzero(np.random.default_rng(seed).random(total) < share)


def but_for_moves(rows):
    """Outcomes; a last round may find that the first one had been right."""
    same = {state.OUTCOME_ROUND_MOVED: state.OUTCOME_ROUND_STAYED}
    return [same.get(outcome, outcome) for outcome in outcomes(rows)]


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_bad_batches_here_and_there_change_no_decision_and_never_lower_the_rate(share, seed):
    rows = lived(bad=random_steps(share, seed))
    assert but_for_moves(rows) == but_for_moves(undisturbed())
    assert int(rows["rollbacks"][-1]) == 0
    assert set(rows["directive"].verdict) <= {loss_monitor.HEALTHY, loss_monitor.WATCHING, loss_monitor.SKIPPED}
    # The rate found is as good as that of a run without them, two decades from where it began.
    assert np.all(np.abs(rows["incumbent"][[300, -1], 0] - 0.6) < 0.13)
    assert len(falls(rows)) <= len(falls(undisturbed()))
    assert rows["learnt"][-1] > 0.9 * (1.0 - share) * undisturbed()["learnt"][-1] - 10.0


@pytest.mark.parametrize("begins", [0, 3, 40, 130, 350])
def test_a_burst_of_seven_is_waited_out(begins):
    rows = lived(bad=range(begins, begins + loss_monitor.BAD_RUN - 1))
    # One in the range test shifts what the first forks see.
    told = but_for_moves if begins < 40 else outcomes
    assert told(rows) == told(undisturbed())
    assert int(rows["rollbacks"][-1]) == 0
    assert abs(rows["incumbent"][300, 0] - undisturbed()["incumbent"][300, 0]) < 0.07
    assert rows["learnt"][-1] > 0.95 * undisturbed()["learnt"][-1]


def test_bursts_of_seven_all_along_are_no_reason_to_roll_back():
    rows = lived(bad=np.flatnonzero(np.arange(TOTAL) % 20 < 7))
    assert but_for_moves(rows) == but_for_moves(undisturbed())
    np.testing.assert_array_equal(rows["incumbent"][300], undisturbed()["incumbent"][300])


def test_one_more_than_that_is_rolled_back_and_costs_no_rate():
    begins = 350
    rows = lived(bad=range(begins, begins + loss_monitor.BAD_RUN))
    np.testing.assert_array_equal(rolled_back(rows), [begins + loss_monitor.BAD_RUN - 1])
    np.testing.assert_array_equal(rows["incumbent"][-1], undisturbed()["incumbent"][-1])


@pytest.mark.parametrize("begins", [3, 40, 130])
def test_a_range_test_or_fork_that_meets_a_bad_run_begins_again_behind_it(begins):
    rows = lived(bad=range(begins, begins + loss_monitor.BAD_RUN))
    at = begins + loss_monitor.BAD_RUN - 1
    (again,) = np.flatnonzero(rows["directive"].outcome == state.OUTCOME_RETRIED)
    assert again == at and rows["directive"].restore[at]
    assert int(rows["directive"].data_step[at]) == int(rows["directive"].data_step[at - 1]) + 1
    assert state.OUTCOME_ROUND_FAILED not in outcomes(rows)
    assert abs(rows["incumbent"][300, 0] - 0.6) < 0.13


def test_a_range_test_or_fork_begins_with_a_batch_that_is_good():
    """Those that come before it are no part of it."""
    first = int(np.flatnonzero(undisturbed()["directive"].outcome == state.OUTCOME_FORK_STARTED)[0])
    for begins in (0, first + 1):
        rows = lived(bad=range(begins, begins + 5))
        told = np.flatnonzero(rows["directive"].outcome)
        expected = np.flatnonzero(undisturbed()["directive"].outcome)
        np.testing.assert_array_equal(told[told > begins] - 5, expected[expected > begins])


def test_a_round_whose_forks_each_meet_a_bad_batch_ends_as_without_them():
    starts = np.flatnonzero(undisturbed()["directive"].outcome == state.OUTCOME_FORK_STARTED)
    rows = lived(bad=[at + offset for at, offset in zip(starts, (4, 9, 14, 19, 22, 12, 7, 3), strict=False)])
    assert outcomes(rows) == outcomes(undisturbed())
    np.testing.assert_allclose(rows["incumbent"][300], undisturbed()["incumbent"][300], atol=1e-6)


def test_no_round_begins_right_after_a_bad_step():
    starts = np.flatnonzero(undisturbed()["directive"].outcome == state.OUTCOME_ROUND_STARTED)
    rows = lived(bad=range(starts[-1], starts[-1] + 3))
    assert np.flatnonzero(rows["directive"].outcome == state.OUTCOME_ROUND_STARTED)[-1] == starts[-1] + 3


LONG = 1600


def test_a_thousand_bad_steps_in_a_row_are_one_rollback_and_the_run_goes_on_after_them():
    begins, calm = 500, undisturbed(LONG)
    rows = lived(LONG, bad=range(begins, begins + 1000))
    back = rolled_back(rows)
    assert len(back) == 1 and back[0] < begins + loss_monitor.BAD_RUN
    np.testing.assert_array_equal(rows["incumbent"][begins : begins + 1000] - calm["incumbent"][begins - 1], 0.0)
    assert rows["incumbent"][-1] >= calm["incumbent"][-1]
    # No more than a snapshot's worth was lost, and more was learnt after them.
    learnt = rows["learnt"]
    assert learnt[begins + 999] > learnt[begins - 1] - 80.0
    assert learnt[-1] > learnt[begins + 999] + 20.0
    assert np.all(rows["directive"].verdict[-90:] < loss_monitor.NON_FINITE)


@pytest.mark.parametrize(("begins", "total", "count"), [(0, TOTAL, 50), (40, TOTAL, 50), (300, LONG, 1000)])
def test_a_long_bad_run_in_a_round_lowers_no_rate(begins, total, count):
    rows = lived(total, bad=range(begins, begins + count))
    before = rows["incumbent"][max(begins - 1, 0), 0]
    assert np.all(rows["incumbent"][begins : begins + count, 0] >= before - 0.06)


@pytest.mark.parametrize("begins", [0, 40])
def test_after_a_bad_run_in_the_first_round_the_run_goes_on(begins):
    rows = lived(bad=range(begins, begins + 50))
    assert len(rolled_back(rows)) <= 4
    # A later round finds a better rate.
    assert rows["incumbent"][-1, 0] > 0.2 and rows["learnt"][-1] > 100.0


@pytest.mark.parametrize("at", [ENDED + 7, ENDED + 20, 320, 500])
def test_a_collapse_to_the_first_level_soon_after_a_round_is_rolled_back(at):
    """While the monitor knows too few losses of the new state to call them unusual by themselves."""
    rows = lived(collapses=[at])
    (back,) = rolled_back(rows)
    assert at < back < at + 8
    assert rows["learnt"][back] > 0.5 * rows["learnt"][at - 1]
    # The first time is no reason to lower the rate.
    np.testing.assert_array_equal(rows["incumbent"][-1], undisturbed()["incumbent"][-1])


def hard_blocks(total, starts, height):
    hard = np.zeros(total)
    for begin in starts:
        hard[begin : begin + 100] = height
    return hard


@pytest.mark.parametrize(("first", "height"), [(800, 1.0), (660, 3.0), (800, 3.0)])
def test_blocks_of_hard_data_cause_two_rollbacks_in_the_whole_run_and_cost_no_rate(first, height):
    """Seven of them, each of 100 steps: what was accepted once as the data's doing is not unusual again."""
    total = 3000
    rows = lived(total, hard=hard_blocks(total, range(first, total - 100, 400), height))
    assert len(rolled_back(rows)) <= 2
    assert outcomes(rows).count(state.OUTCOME_ACCEPTED) <= 1
    # The one fall that a training loss without a metric may cause comes in the undisturbed run as well.
    assert len(falls(rows)) == len(falls(undisturbed(total))) == 1
    np.testing.assert_array_equal(rows["incumbent"][-1], undisturbed(total)["incumbent"][-1])
    assert rows["learnt"][-1] > 0.85 * undisturbed(total)["learnt"][-1]


@pytest.mark.parametrize("begins", [100, 300, 600])
def test_a_hard_block_that_begins_in_a_round_causes_two_rollbacks_at_most(begins):
    rows = lived(3000, hard=hard_blocks(3000, [begins], 3.0))
    assert len(rolled_back(rows)) <= 2


def test_one_wildly_low_loss_does_not_blind_the_guard():
    low, at = np.zeros(TOTAL), 420
    low[350] = -1e4
    assert len(rolled_back(lived(hard=low))) == 0
    rows = lived(hard=low, collapses=[at])
    (back,) = rolled_back(rows)
    assert at < back < at + 8 and rows["learnt"][back] > 0.5 * rows["learnt"][at - 1]


@pytest.mark.parametrize(
    "unit",
    [1e-30, 1e-12, 1e3, 1e12, 1e22],
)
@pytest.mark.parametrize("collapses", [[], [320]])
def test_the_unit_of_the_loss_changes_nothing(unit, collapses):
    rows, expected = lived(unit=unit, collapses=collapses), lived(collapses=collapses)
    for name in ("outcome", "verdict", "save", "restore", "keep", "adopt", "data_step"):
        np.testing.assert_array_equal(
            getattr(rows["directive"], name), getattr(expected["directive"], name), err_msg=name
        )
    np.testing.assert_allclose(rows["incumbent"], expected["incumbent"], atol=1e-5)
