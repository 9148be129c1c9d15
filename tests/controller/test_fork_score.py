"""What the forks of a round are scored by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import fork_score, loss_monitor, state, window
from tests.controller.light import SPACES


def fork_of(losses, *, length=40, has_eval=False):
    """A round's first fork after some losses."""
    ts = atn.AutoTuneNet(SPACES["rate"], 1000).init(jax.random.key(0))
    ts = ts._replace(phase=jnp.int32(state.FORK), segment_length=jnp.int32(length), segment_left=jnp.int32(length))
    ts = ts._replace(round=ts.round._replace(has_eval=jnp.bool_(has_eval)))
    ts = ts._replace(health=ts.health._replace(scale=jnp.float32(1.0)))
    ends = []
    for loss in losses:
        ts = ts._replace(segment_left=ts.segment_left - 1)
        ts, directive, ended = heard(ts, jnp.float32(loss))
        ends.append((bool(directive.evaluate), bool(ended)))
    return ts, ends


@jax.jit
def heard(ts, loss):
    told = loss_monitor.hear(
        atn.Guard(),
        loss_monitor.init(),
        loss,
        bad_run=ts.health.bad_run,
        in_train=jnp.bool_(False),
        initial_loss=jnp.float32(2.0),
        ceiling=jnp.inf,
        limit=jnp.inf,
        known=-jnp.inf,
    )
    return fork_score.step(ts._replace(health=ts.health._replace(bad_run=told.bad_run)), told)


def test_a_fork_is_scored_by_the_losses_of_its_last_part():
    ts, ends = fork_of(np.arange(40.0))
    assert float(window.robust_mean(ts.window)) == np.mean(np.arange(30.0, 40.0))
    # Before its last step the loop is asked for a metric.
    assert [at for at, (evaluate, _) in enumerate(ends) if evaluate] == [38]
    assert [at for at, (_, ended) in enumerate(ends) if ended] == [39]
    # However short, two losses count.
    ts, _ = fork_of(np.arange(5.0), length=5)
    assert float(ts.window.loss_count) == 2


@pytest.mark.parametrize("at", [30, 33, 39])
@pytest.mark.parametrize("height", [3.0, 1e8])
def test_one_bad_batch_counts_for_little_in_a_score(at, height):
    losses = 0.5 + 0.02 * np.random.default_rng(at).normal(size=40)
    losses[at] += height
    assert float(window.robust_mean(fork_of(losses)[0].window)) == pytest.approx(0.5, abs=0.03)


def test_the_first_losses_of_a_round_say_where_all_forks_start():
    assert float(fork_of([3.0, 2.0, 0.5, 0.1])[0].round.reference) == 2.5


def test_a_fork_is_scored_by_its_finite_losses():
    losses = np.arange(40.0)
    losses[[5, 31, 39]] = np.nan
    ts, ends = fork_of(losses)
    assert float(window.robust_mean(ts.window)) == pytest.approx(np.nanmean(losses[30:]))
    assert [at for at, (_, ended) in enumerate(ends) if ended] == [39]
    assert not ts.health.has_failed and not ts.health.has_faulted


def test_a_run_of_losses_that_are_not_finite_ends_the_fork_as_a_failure():
    ts, ends = fork_of([2.0, 2.0, *[np.nan] * loss_monitor.BAD_RUN])
    assert [ended for _, ended in ends] == [False] * (len(ends) - 1) + [True]
    # Nothing led up to it: it may begin again.
    assert ts.health.has_failed and ts.health.has_faulted
