"""Ordinary training: what an unhealthy loss is answered with, and which snapshots are taken."""

import jax
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import loss_monitor, state
from tests.controller.light import SPACES, run, told, tuner

pytestmark = pytest.mark.usefixtures("light_surrogate")

TOTAL = 400
AT = 200


def losses_like_training(seed=0, count=TOTAL):
    rng = np.random.default_rng(seed)
    return (2.0 * np.exp(-np.arange(count) / 120) + 0.05 * rng.normal(size=count)).astype(np.float32)


def trained(losses):
    """A run without forks: all but the range test is ordinary training."""
    rows, _ = run(tuner("rate", TOTAL, max_share=0.05), told(losses))
    return rows


def rolled_back(rows):
    return np.flatnonzero(rows["directive"].outcome == state.OUTCOME_ROLLBACK)


RUN = loss_monitor.BAD_RUN


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, RUN - 1])
def test_losses_that_are_not_finite_are_skipped(value, count):
    losses = losses_like_training()
    calm = trained(losses)
    losses[AT : AT + count] = value
    rows = trained(losses)
    told_to = rows["directive"]
    assert len(rolled_back(rows)) == 0
    assert np.all(told_to.verdict[AT : AT + count] == loss_monitor.SKIPPED)
    assert not np.any(told_to.save[AT : AT + count] | told_to.keep[AT : AT + count])
    np.testing.assert_array_equal(np.diff(told_to.data_step[AT - 2 : AT + count + 3]), 1)
    np.testing.assert_array_equal(rows["incumbent"], calm["incumbent"])
    # What is known of the loss waits.
    for name, leaf in rows["health"].monitor._asdict().items():
        assert np.all(leaf[AT : AT + count] == leaf[AT - 1]), name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_run_of_them_is_rolled_back_and_its_data_is_not_shown_again(value):
    losses = losses_like_training()
    losses[AT - RUN + 1 : AT + 1] = value
    rows = trained(losses)
    np.testing.assert_array_equal(rolled_back(rows), [AT])
    told_to = rows["directive"]
    assert told_to.verdict[AT] == loss_monitor.NON_FINITE
    assert told_to.restore[AT] != told_to.adopt[AT]
    np.testing.assert_array_equal(np.diff(told_to.data_step[AT - 2 : AT + 5]), 1)
    # Bad luck with the data costs no rate, but the rate climbs back instead of jumping back.
    assert rows["incumbent"][-1] == rows["incumbent"][AT - 1]
    rates = rows["hp"]["learning_rate"]
    climb = rates[AT : AT + 22] / rates[AT - 1]
    np.testing.assert_allclose(climb, np.minimum(np.arange(1, 23) / 20, 1.0), rtol=1e-4)


def test_two_snapshots_are_taken_in_turn():
    rows = trained(losses_like_training())
    saves, keeps = (np.flatnonzero(flags) for flags in (rows["directive"].save, rows["directive"].keep))
    both = np.sort(np.concatenate([saves, keeps]))
    assert len(saves) > 5 and abs(len(saves) - len(keeps)) <= 1
    assert np.all(np.diff(both) >= int(tuner("rate", TOTAL, max_share=0.05).plan.save_every))


def newest_snapshot(rows):
    """The last step before ``AT`` after which one was taken, and whether it was the saved one."""
    taken = rows["directive"].save | rows["directive"].keep
    at = np.flatnonzero(taken[:AT])[-1]
    return at, bool(rows["directive"].save[at])


@pytest.mark.parametrize(("later", "is_trusted"), [(3, False), (12, True)])
def test_a_spike_goes_back_to_the_newest_snapshot_unless_it_is_too_young_to_be_sure_of(later, is_trusted):
    losses = losses_like_training()
    at, is_saved = newest_snapshot(trained(losses))
    losses[at + later : at + later + 17] += 4.0
    rows = trained(losses)
    first = rolled_back(rows)[0]
    taken = rows["directive"].save | rows["directive"].keep
    assert np.flatnonzero(taken[:first])[-1] == at
    assert rows["directive"].restore[first] == (is_saved == is_trusted)


@pytest.mark.parametrize(("length", "is_forgiven"), [(1, True), (3, True), (12, False)])
def test_a_short_spike_is_forgiven_and_a_long_one_is_not(length, is_forgiven):
    losses = losses_like_training()
    losses[AT : AT + length] += 5.0
    assert (len(rolled_back(trained(losses))) == 0) == is_forgiven


def test_a_shift_of_the_data_is_accepted_and_costs_no_rate():
    """The loss is as high on the restored snapshot, before any step from it."""
    losses = losses_like_training()
    losses[AT:] += 4.0
    rows = trained(losses)
    back, accepted = rolled_back(rows), np.flatnonzero(rows["directive"].outcome == state.OUTCOME_ACCEPTED)
    assert len(back) == len(accepted) == 1
    assert accepted[0] < AT + 20
    assert rows["incumbent"][-1] == rows["incumbent"][AT - 1]


def test_a_rate_that_is_too_hot_is_lowered():
    """Each time the loss is low on the restored snapshot and climbs from there."""
    losses = losses_like_training()
    for begin in range(AT, AT + 60, 12):
        losses[begin + 6 : begin + 12] += 4.0
    rows = trained(losses)
    assert len(rolled_back(rows)) >= 2
    assert state.OUTCOME_ACCEPTED not in rows["directive"].outcome
    rates = 10.0 ** (-5.0 + 5.0 * rows["incumbent"][rolled_back(rows), 0])
    falls = (rates[1:] / rates[:-1])[rates[1:] > 1.01e-5]
    assert len(falls) >= 1
    np.testing.assert_allclose(falls, 0.5, rtol=0.01)


def test_divergence_lowers_the_rate_the_first_time():
    losses = losses_like_training()
    losses[AT:] += 0.05 * 2.0 ** np.minimum(np.arange(TOTAL - AT), 40)
    rows = trained(losses)
    first = rolled_back(rows)[0]
    assert rows["directive"].verdict[first] == loss_monitor.DIVERGED
    assert rows["incumbent"][first] < rows["incumbent"][first - 1]


@pytest.mark.parametrize(("good", "lowers"), [(3, True), (50, False)])
def test_runs_of_bad_losses_lower_the_rate_where_they_come_again_soon_after_good_ones(good, lowers):
    losses, period = losses_like_training(), RUN + good
    for begin in range(AT, AT + 3 * period, period):
        losses[begin : begin + RUN] = np.nan
    rows = trained(losses)
    assert len(rolled_back(rows)) == 3
    fallen = 10.0 ** (5.0 * (rows["incumbent"][-1, 0] - rows["incumbent"][AT - 1, 0]))
    assert fallen == pytest.approx(0.25 if lowers else 1.0, rel=0.01)


def test_where_no_good_loss_comes_between_there_is_one_rollback_and_no_rate_falls():
    losses = losses_like_training()
    losses[AT : AT + 100] = np.nan
    losses[AT + 150 : AT + 150 + RUN] = np.nan
    rows = trained(losses)
    back = rolled_back(rows)
    np.testing.assert_array_equal(back, [AT + RUN - 1, AT + 150 + RUN - 1])
    assert np.all(rows["directive"].verdict[AT + 2 * RUN : AT + 100] == loss_monitor.NON_FINITE)
    assert rows["incumbent"][-1] == rows["incumbent"][AT - 1]


def test_when_the_rollbacks_are_used_up_the_loss_is_taken_as_it_is_and_rounds_are_over():
    guard = atn.Guard(max_rollbacks=1)
    tuned = atn.AutoTuneNet(SPACES["rate"], None, initial={"learning_rate": 1e-4}, guard=guard, max_share=0.3)
    losses = losses_like_training(count=1200)
    for begin in range(300, 480, 12):
        losses[begin + 6 : begin + 12] += 4.0
    rows, ts = run(tuned, told(losses))
    assert int(ts.rollbacks) == 1
    assert np.all(rows["phase"][310:] == state.TRAIN)  # the round of step 500 is not held
    assert np.all(rows["incumbent"][400:] == rows["incumbent"][-1])
    # What is not finite is rolled back all the same.
    losses[700 : 700 + RUN] = np.nan
    rows, ts = run(tuned, told(losses))
    assert rows["directive"].outcome[700 + RUN - 1] == state.OUTCOME_ROLLBACK


def test_regularisation_that_raises_the_training_loss_for_good_is_no_damage():
    """Validation asks for dropout, and under it the training loss stays far above what it was."""
    tuned, noise = tuner("both", 1000), np.random.default_rng(0).normal(size=1000)
    update, observe = jax.jit(tuned.update), jax.jit(tuned.observe_eval)
    ts, dropped = observe(tuned.init(jax.random.key(0)), 2.0), []
    for step in range(1000):
        values = {name: float(value) for name, value in tuned.hyperparams(ts).items()}
        fitted = 2.0 * np.exp(-int(ts.data_step) / 60)
        ts, directive = update(ts, np.float32(0.05 + fitted + 4.0 * values["dropout"] + 0.05 * noise[step]))
        dropped.append(values["dropout"])
        if directive.evaluate:
            ts = observe(ts, np.float32(1.0 + fitted - values["dropout"]))
        assert int(directive.outcome) != state.OUTCOME_ROLLBACK, step
    assert dropped[0] < 0.3 < dropped[-1], (dropped[0], dropped[-1])


def test_a_loss_that_contains_the_hyperparameter_is_no_damage_either():
    """As that of a variational autoencoder, whose weight multiplies a term which nothing makes small."""
    tuned = atn.AutoTuneNet({"learning_rate": (1e-5, 1.0), "weight": (1e-2, 1e2)}, 1000, initial={"weight": 1.0})
    update, observe = jax.jit(tuned.update), jax.jit(tuned.observe_eval)
    noise = 0.05 * np.random.default_rng(0).normal(size=1000)

    ts, weight = observe(tuned.init(jax.random.key(0)), 4.0), 1.0
    for step in range(1000):
        weight = float(tuned.hyperparams(ts)["weight"])
        fitted = 2.0 * np.exp(-int(ts.data_step) / 60)
        ts, directive = update(ts, np.float32(0.05 + fitted + weight + noise[step]))
        if directive.evaluate:
            # A large one is best.
            ts = observe(ts, np.float32(1.0 + fitted + 0.3 * (2.0 - np.log10(weight))))
        assert int(directive.outcome) != state.OUTCOME_ROLLBACK, (step, weight)
    assert weight > 10.0
    assert not bool(ts.knowledge.observations.failed.any())
