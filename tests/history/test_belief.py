"""What is told of the surrogate's belief is in the unit of the scores, and is what decisions were taken by."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.bayesopt import surrogate, trials
from autotunenet_jax.controller import fork_surrogate
from autotunenet_jax.controller.plan import MAX_FORKS
from autotunenet_jax.history.belief import DEVIATIONS, believed, rival_of
from autotunenet_jax.history.posterior import posterior_of
from tests import problem

REFERENCE = 2.5


def fork(score, *, p_better=0.1, lead=None, deviation=None):
    scores = [] if score is None else [score]
    return {
        "scores": scores, "status": "lost" if scores else "failed", "p_better": p_better, "lead": lead,
        "deviation": deviation, "hyperparams": {"learning_rate": 0.1}, "steps": 20,
    }  # fmt: skip


def row(*forks, kind="fast", reference=REFERENCE):
    return {"forks": list(forks), "kind": kind, "reference": reference}


@jax.jit
def _shortfalls(y, count, is_slow):
    obs = trials.empty(y.size, 1)._replace(y=jnp.nan_to_num(y), failed=jnp.isnan(y), count=count)
    return fork_surrogate.shortfalls(obs, resolution=fork_surrogate.resolution_of(is_slow)).y


def shortfalls(scores, kind):
    """In the unit of decisions, by the function that they are taken with."""
    y = np.full(MAX_FORKS, np.nan, np.float32)
    y[: len(scores)] = [math.nan if score is None else score - REFERENCE for score in scores]
    return np.asarray(_shortfalls(y, len(scores), kind == "slow"), np.float64)


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("scores", [(1.0, 1.3), (1.3, 1.0), (1.0, None, 1.1), (None, 1.2, 0.7, 0.9), (2.6, 2.9, 2.7)])
def test_a_lead_that_was_seen_is_the_score_itself(scores, kind):
    told = row(*map(fork, scores), kind=kind)
    kept = None
    for place, score in enumerate(scores):
        held, seen = told["forks"][place], shortfalls(scores[: place + 1], kind)
        assert rival_of(told, place) == (-1 if kept is None else kept)
        if kept is None or score is None:
            assert believed(told, place) is None
            kept = place if score is not None else kept
            continue
        held["lead"] = seen[kept] - seen[place]
        held["deviation"], held["p_better"] = 1e-4, 0.9 if held["lead"] > 0 else 0.1
        np.testing.assert_allclose(believed(told, place), score, rtol=1e-3)
        held["deviation"] = 0.1
        low, high = believed(told, place)
        assert low < score < high
        held["lead"] += DEVIATIONS * 0.1  # as much better as its lower end was
        np.testing.assert_allclose(believed(told, place)[1], score, rtol=1e-4)
        kept = place if held["p_better"] > 0.5 else kept


def test_nothing_is_told_where_nothing_is_known():
    known = {"lead": -0.5, "deviation": 0.1}
    assert believed(row(fork(1.0), fork(1.5, **known)), 1) is not None
    assert believed(row(fork(1.0), fork(1.5, **known), reference=None), 1) is None
    assert believed(row(fork(1.0), fork(99.0, **known)), 1) is None  # lost by more than is told apart
    before = row(fork(1.0), fork(1.5))
    for held in before["forks"]:
        del held["lead"], held["deviation"]
    assert believed(before, 1) is None


@pytest.fixture(scope="module")
def history():
    tuner = problem.tuner()
    return atn.fit(
        problem.train_step, problem.new_state(), problem.batches, tuner=tuner, eval_step=problem.eval_step,
        progress=False,
    ).history  # fmt: skip


def test_a_run_records_what_it_decided_by(history):
    compared = 0
    for told in history.rounds:
        for place, held in enumerate(told["forks"]):
            if rival_of(told, place) < 0:
                assert held["lead"] is None and held["deviation"] is None
            elif held["scores"]:
                compared += 1
                chance = 0.5 * math.erfc(-held["lead"] / held["deviation"] / math.sqrt(2.0))
                assert held["p_better"] == pytest.approx(chance, abs=1e-5)
                low, high = believed(told, place)
                assert low < high and f"believed {low:.4g} to {high:.4g}" in history.explain()
    assert compared >= 2


def test_what_decided_can_be_computed_again_from_the_history(history):
    for number, told in enumerate(history.rounds, 1):
        last = len(told["forks"]) - 1
        rival = rival_of(told, last)
        again = posterior_of(history, number)
        mean, covariance = surrogate.predict(again.config, again.posterior, jnp.asarray(again.x), time=again.time)
        variance = covariance[last, last] + covariance[rival, rival] - 2.0 * covariance[last, rival]
        assert mean[rival] - mean[last] == pytest.approx(told["forks"][last]["lead"], rel=1e-3, abs=1e-4)
        assert variance**0.5 == pytest.approx(told["forks"][last]["deviation"], rel=1e-3)


def test_it_goes_through_json(history):
    again = atn.History.from_dict(history.to_dict())
    np.testing.assert_equal(again.rounds, history.rounds)
    for told in again.rounds:
        for held in told["forks"]:
            del held["lead"], held["deviation"]
    old = atn.History.from_dict(again.to_dict())
    assert all(believed(told, place) is None for told in old.rounds for place in range(len(told["forks"])))
