"""Rounds as a training loop lives them: whose state a round ends in, and when there is none."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import decision, loss_monitor, state
from tests.controller.light import tuner

pytestmark = pytest.mark.usefixtures("light_surrogate")


class Trained(NamedTuple):
    """A training state that remembers how it came about: the rate and the batch of each of its steps."""

    steps: tuple = ()

    def after(self, rate, batch):
        return Trained((*self.steps, (round(float(rate), 9), batch)))

    def loss(self):
        """Falls with each step, fastest at a rate of 1e-2; what a rate of 1 does is never undone."""
        gains = [np.exp(-0.5 * (np.log10(max(rate, 1e-9)) + 2.0) ** 2) for rate, _ in self.steps]
        return 0.1 + 2.0 * np.exp(-0.03 * sum(gains))


class Event(NamedTuple):
    """A directive that was carried out, with the state before and after that, and what the tuner knew then."""

    step: int
    directive: state.Directive
    before: Trained
    after: Trained
    saved: Trained
    kept: Trained
    phase: int
    incumbent: np.ndarray


@functools.cache
def compiled(core):
    return jax.jit(lambda ts, loss: (*core.update(ts, loss), core.hyperparams(ts))), jax.jit(core.observe_eval)


def lived(tuned, count, *, with_metric=True, loss_of=None, metric_of=Trained.loss, is_measured_first=False):
    """A loop that does what it is told, and nothing else; the events at which it was told something."""
    update, observe = compiled(tuned.core)
    hyperparams = jax.jit(tuned.hyperparams)
    ts, trained = tuned.init(jax.random.key(0)), Trained()
    if is_measured_first:
        ts = observe(ts, jnp.float32(metric_of(trained)))
    saved = kept = trained
    batch, asked, events = 0, False, []
    for step in range(count):
        phase = int(ts.phase)
        if asked and with_metric:
            ts = observe(ts, jnp.float32(metric_of(trained)))
        rate = hyperparams(ts)["learning_rate"]
        loss = trained.loss() if loss_of is None else loss_of(trained, phase)
        trained = trained.after(rate, batch)
        ts, directive, _ = update(ts, jnp.float32(loss))
        told, before = jax.device_get(directive), trained
        if told.save:
            saved = trained
        if told.keep:
            kept = trained
        if told.restore:
            trained = saved
        if told.adopt:
            trained = kept
        asked, batch = bool(told.evaluate), int(told.data_step)
        if told.save or told.keep or told.restore or told.adopt or told.outcome:
            incumbent = np.asarray(ts.incumbent)
            events.append(Event(step + 1, told, before, trained, saved, kept, phase, incumbent))
    return ts, trained, events


@functools.cache
def tuned_run(with_metric=True):
    return lived(tuner("rate", 400), 400, with_metric=with_metric)


def outcomes(events):
    return [int(event.directive.outcome) for event in events if event.directive.outcome]


def forks_of(events):
    """The rounds, each as its forks' last events."""
    rounds, ended = [], (state.OUTCOME_ROUND_MOVED, state.OUTCOME_ROUND_STAYED, state.OUTCOME_ROUND_FAILED)
    forks = []
    for event in events:
        if event.phase == state.FORK:
            forks.append(event)
            if event.directive.outcome in ended:
                rounds.append(forks)
                forks = []
    return rounds


def test_while_no_fork_has_gained_the_first_round_goes_on_to_lower_rates():
    def metric(trained):
        """Rates above 2e-3 are past recovery, each as bad as the other, which training losses do not show."""
        return 3.0 if any(rate > 2e-3 for rate, _ in trained.steps) else trained.loss()

    def tried(events):
        first = forks_of(events)[0]
        return [fork.before.steps[len(fork.saved.steps)][0] for fork in first], first[-1].after

    tuned = tuner("rate", 400)
    rates, after = tried(lived(tuned, 400, metric_of=metric, is_measured_first=True)[2])
    assert len(rates) >= 3 and rates == sorted(rates, reverse=True)
    assert rates[-1] < 2e-3 and metric(after) < metric(Trained())
    # Where nothing was measured before, there is nothing that a fork could be held against.
    assert min(tried(lived(tuned, 400, metric_of=metric)[2])[0]) > 2e-3


def test_all_forks_of_a_round_start_from_one_state_on_the_same_batches():
    _, _, events = tuned_run()
    rounds = forks_of(events)
    assert len(rounds) == 2 and all(len(forks) >= 2 for forks in rounds)
    for forks in rounds:
        begun = len(forks[0].saved.steps)
        assert len({fork.before.steps[:begun] for fork in forks}) == 1
        tried = [fork.before.steps[begun:] for fork in forks]
        assert len({tuple(batch for _, batch in steps) for steps in tried}) == 1
        # Each claims another rate, and all of them cool down.
        claimed = [max(rate for rate, _ in steps) for steps in tried]
        assert len(set(claimed)) == len(claimed)
        assert all(steps[-1][0] < 0.3 * claim for steps, claim in zip(tried, claimed, strict=True))


def test_a_round_ends_in_the_state_of_its_best_fork():
    _, _, events = tuned_run()
    for forks in forks_of(events):
        end = forks[-1]
        winner = [fork for fork in forks if fork.directive.keep][-1]
        assert end.after == winner.before
        assert end.directive.adopt == (winner is not end)
        assert not end.directive.restore
        # The light surrogate blurs neighbours on the line of rates, but not beyond them.
        begun = len(forks[0].saved.steps)
        by_rate = sorted(forks, key=lambda fork: max(rate for rate, _ in fork.before.steps[begun:]))
        losses = [fork.before.loss() for fork in by_rate]
        assert abs(by_rate.index(winner) - losses.index(min(losses))) <= 1


@pytest.mark.parametrize("with_metric", [True, False])
def test_the_incumbent_is_that_of_the_best_fork_and_a_little_lower_where_no_metric_judged_the_first_round(with_metric):
    _, _, events = tuned_run(with_metric)
    for number, forks in enumerate(forks_of(events)):
        winner = [fork for fork in forks if fork.directive.keep][-1]
        claimed = np.log10(claimed_rate(winner))
        in_force = -5.0 + 5.0 * forks[-1].incumbent[0]
        lower = 0.25 if number == 0 and not with_metric else 0.0
        assert claimed - in_force == pytest.approx(lower, abs=0.01)


def test_metrics_that_are_not_finite_are_no_more_than_none():
    _, trained, events = tuned_run(with_metric=False)
    _, other, others = lived(tuner("rate", 400), 400, metric_of=lambda trained: np.nan)
    assert other == trained and outcomes(others) == outcomes(events)


def claimed_rate(fork):
    return max(rate for rate, _ in fork.before.steps[len(fork.saved.steps) :])


def test_a_first_fork_that_breaks_leaves_the_round_to_its_metric():
    broken = 0.9 * claimed_rate(forks_of(tuned_run()[2])[0][0])

    def breaks(trained, phase):
        is_hot = phase == state.FORK and trained.steps and trained.steps[-1][0] > broken
        return 1e4 if is_hot else trained.loss()

    forks, *_ = forks_of(lived(tuner("rate", 400), 400, loss_of=breaks)[2])
    winner = [fork for fork in forks if fork.directive.keep][-1]
    assert not forks[0].directive.keep and winner is not forks[0]
    # By the metric: without one the rate would be a little below the winner's.
    assert np.log10(claimed_rate(winner)) == pytest.approx(-5.0 + 5.0 * forks[-1].incumbent[0], abs=0.01)


def test_the_range_test_leaves_no_trace():
    _, trained, events = tuned_run()
    first = events[0]
    assert first.phase == state.SWEEP and first.directive.restore
    assert first.after == Trained()
    assert int(first.directive.data_step) == 0
    assert trained.steps[0][1] == 0


def test_what_survives_is_one_branch_as_long_as_was_not_discarded():
    ts, trained, _ = tuned_run()
    assert len(trained.steps) == 400 - int(ts.discarded)
    batches = [batch for _, batch in trained.steps]
    assert batches == sorted(batches) and len(set(batches)) == len(batches)


def test_where_all_forks_fail_training_goes_on_from_where_they_began_at_a_lower_rate():
    def breaks(trained, phase):
        return np.nan if phase == state.FORK and len(trained.steps) > 3 else trained.loss()

    _, _, events = lived(tuner("rate", 400), 120, loss_of=breaks)
    (first, *_) = forks_of(events)
    failed = [fork for fork in first if fork.directive.outcome != state.OUTCOME_RETRIED]
    end = failed[-1]
    assert len(failed) > 1 and end.directive.outcome == state.OUTCOME_ROUND_FAILED
    assert end.directive.restore and end.after == end.saved
    assert not any(fork.directive.keep for fork in failed)
    # Lower and lower rates were tried, and what is in force is half a decade lower still.
    claimed = [max(rate for rate, _ in fork.before.steps) for fork in failed]
    assert claimed == sorted(claimed, reverse=True)
    lowest = np.log10(claimed[-1])
    assert -5.0 + 5.0 * end.incumbent[0] == pytest.approx(max(lowest - 0.5, -5.0), abs=0.02)
    # What every fork failed on is not shown again.
    assert int(end.directive.data_step) == end.before.steps[-1][1] + 1


def test_where_all_forks_spoil_a_state_training_goes_on_from_it_at_a_lower_rate():
    first = forks_of(tuned_run()[2])[1][0].saved.steps[-1][1] + 1

    def metric(trained):
        """What the second round is shown is poison to any rate, a little less to lower ones."""
        poison = [rate for rate, batch in trained.steps if batch in range(first, first + 5)]
        return trained.loss() + (3.0 + 0.01 * np.log10(max(poison)) if poison else 0.0)

    ts, trained, events = lived(tuner("rate", 400), 400, metric_of=metric)
    forks = forks_of(events)[1]
    end = forks[-1]
    assert len(forks) > 1 and end.directive.outcome == state.OUTCOME_ROUND_FAILED
    assert end.directive.restore and end.after == end.saved
    begun = len(end.saved.steps)
    claimed = [max(rate for rate, _ in fork.before.steps[begun:]) for fork in forks]
    best = claimed[int(np.argmin([metric(fork.before) for fork in forks]))]
    assert -5.0 + 5.0 * end.incumbent[0] == pytest.approx(np.log10(best) - 0.5, abs=0.05)
    # It is the best state from there on, is not shown the poison again, and all that went into the forks is lost.
    (kept,) = [event for event in events if event.step == end.step + 1]
    assert kept.directive.keep and kept.kept.steps[:begun] == end.saved.steps
    assert metric(trained) < metric(end.saved)
    assert len(trained.steps) == 400 - int(ts.discarded)


def test_a_run_of_bad_batches_in_a_fork_begins_it_again_on_the_data_after_it():
    bad = []

    def breaks_once(trained, phase):
        if phase == state.FORK and len(trained.steps) >= 10 and len(bad) < loss_monitor.BAD_RUN:
            bad.append(len(trained.steps))
            return np.nan
        return trained.loss()

    _, _, events = lived(tuner("rate", 400), 120, loss_of=breaks_once)
    assert outcomes(events).count(state.OUTCOME_RETRIED) == 1
    again = next(event for event in events if event.directive.outcome == state.OUTCOME_RETRIED)
    assert again.directive.restore and again.after == again.saved
    assert int(again.directive.data_step) == again.before.steps[-1][1] + 1


def test_slow_hyperparameters_are_never_judged_by_the_training_loss():
    _, _, events = lived(tuner("both", 400), 400, with_metric=False)
    assert state.OUTCOME_ROUND_SKIPPED in outcomes(events)
    assert {event.incumbent[0] for event in events} == {np.float32(0.2)}


def test_a_slow_round_whose_metric_stays_away_fails_and_changes_nothing():
    tuned = tuner("both", 400, max_share=0.8)
    (update, observe), ts = compiled(tuned.core), tuned.init(jax.random.key(0))
    told = []
    for step in range(300):
        if int(ts.phase) == state.TRAIN:
            ts = observe(ts, jnp.float32(1.0))
        before = np.asarray(ts.incumbent)
        ts, directive, _ = update(ts, jnp.float32(2.0 * np.exp(-step / 100)))
        if int(directive.outcome) == state.OUTCOME_ROUND_FAILED:
            told.append((before, np.asarray(ts.incumbent), bool(directive.restore)))
    ((before, after, restored),) = told
    np.testing.assert_array_equal(before, after)
    assert restored


def test_a_short_run_only_reads_the_rate():
    _, trained, events = lived(tuner("rate", 100), 100)
    assert outcomes(events) == [state.OUTCOME_RATE_READ]
    assert events[0].directive.restore and events[0].after == Trained()
    length = int(tuner("rate", 100).plan.range_test[0])
    assert len(trained.steps) == 100 - length


@pytest.mark.parametrize("has_winner", [False, True])
def test_the_best_state_is_forgotten_only_when_a_fork_takes_its_place(has_winner):
    tuned = atn.AutoTuneNet({"learning_rate": (1e-5, 1.0)}, 800)
    ts = tuned.init(jax.random.key(0))
    seen = ts.validation._replace(best=jnp.float32(0.25), is_kept=jnp.ones((), bool))
    held = ts.round._replace(
        kept=jnp.int32(0 if has_winner else -1), has_eval=jnp.bool_(has_winner), score=ts.round.score.at[0].set(0.5)
    )
    yes, ts = jnp.ones((), bool), ts._replace(validation=seen, round=held)
    ts, directive = decision._end_round(tuned.space, ts, yes, ~yes)
    assert bool(ts.validation.is_kept) and bool(directive.restore) is not has_winner
    assert float(ts.validation.best) == (0.5 if has_winner else 0.25)
