"""The decay waits where the rate in force is right and validation keeps falling, and makes up for it afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax import _packed, _plan, _state

TOTAL = 600
TUNER = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1)}, TOTAL)
UPDATE, OBSERVE = jax.jit(TUNER.update), jax.jit(TUNER.observe_eval)
FACTOR = jax.jit(TUNER.core.schedule)
RATE = jax.jit(lambda u: TUNER.space.decode(u)["learning_rate"])
ROW = int(np.argmax(TUNER.plan.kind == _plan.RAISE))
EVERY, AT = 30, 240


class Losses(dict):
    """A mapping that can be an argument of a cached function."""

    def __hash__(self):
        return hash(tuple(self.items()))


@functools.cache
def run(*, stops_at=None, has_eval=True, spoils=False, loss_at=None):
    """A run whose first round settles near log10 rate -3, and whose loss falls fastest there.

    From step ``stops_at`` on validation rises. With ``spoils``, forks of the round under way end far above where they
    began. ``loss_at`` maps steps to losses of another kind. Returns the state after each step, and the directives.
    """
    rng, ts, wants = np.random.default_rng(0), TUNER.init(jax.random.key(0)), False
    level = saved = kept = 2.0
    states, directives = [], []
    for i in range(TOTAL):
        rate = np.log10(float(RATE(ts.incumbent if int(ts.phase) == _state.TRAIN else ts.trial)))
        level *= 1.0 - 0.015 * np.exp(-0.5 * (rate + 3.0) ** 2)
        if spoils and int(ts.phase) == _state.FORK and int(ts.round.index) == ROW:
            level *= 1.06
        if has_eval and (wants or i % EVERY == 0):
            ts = OBSERVE(ts, jnp.float32(level if stops_at is None or i < stops_at else 2.0 + i / TOTAL))
        loss = (loss_at or {}).get(i, level + 0.002 * rng.normal())
        ts, directive = UPDATE(ts, jnp.float32(loss))
        wants = bool(directive.evaluate)
        saved = level if directive.save else saved
        kept = level if directive.keep else kept
        level = saved if directive.restore else kept if directive.adopt else level
        states.append(ts)
        directives.append(directive)
    return states, directives


def factors(states):
    """Step and factor of the schedule, warm-ups left out."""
    return [
        (int(ts.step), float(FACTOR(ts)))
        for ts in states
        if int(ts.phase) == _state.TRAIN and min(int(ts.since_restart), int(ts.since_rollback)) >= 20
    ]


def round_ended(states):
    return next(int(ts.step) for ts in states if int(ts.round.index) > ROW)


def test_the_decay_waits_and_then_falls_to_zero_at_the_end():
    states, _ = run()
    ended = round_ended(states)
    left = 1.0 - ended / TOTAL
    for step, factor in factors(states):
        waits = min(left, (1.0 - step / TOTAL) / (1.0 - TUNER.core.policy.held_share)) if step >= ended else 0.0
        assert factor == pytest.approx(max(1.0 - step / TOTAL, waits), abs=1e-5)
    assert factors(states)[-1][1] < 0.005


def test_it_goes_on_once_validation_has_stopped_falling():
    stops_at = AT + 10
    states, _ = run(stops_at=stops_at)
    seen = factors(states)
    assert any(round_ended(states) + 10 < step < stops_at for step, _ in seen)
    for step, factor in seen:
        plain = 1.0 - step / TOTAL
        if step > stops_at + TOTAL // 10:  # a metric is compared with one of that long ago
            assert factor == pytest.approx(plain, abs=1e-5)
        elif round_ended(states) + 10 < step < stops_at:
            assert factor > plain + 0.005


def test_without_validation_nothing_waits():
    states, _ = run(has_eval=False)
    assert round_ended(states)
    assert all(factor == pytest.approx(1.0 - step / TOTAL, abs=1e-5) for step, factor in factors(states))


def test_forks_that_spoil_what_was_gained_are_not_gone_on_from():
    states, directives = run(spoils=True)
    at = next(i for i, ts in enumerate(states) if int(ts.round.index) > ROW)
    assert int(directives[at].outcome) == _state.OUTCOME_ROUND_FAILED
    assert bool(directives[at].restore) and not bool(directives[at].adopt)
    assert float(states[at].hold) == 0.0
    # Half a decade of four.
    assert float(states[at - 1].incumbent[0] - states[at].incumbent[0]) == pytest.approx(0.125, abs=1e-5)


def test_a_loss_that_jumps_ends_it_and_a_bad_batch_does_not():
    jump = {i: 50.0 for i in range(AT, AT + 40)}
    states, _ = run(loss_at=Losses(jump))
    assert float(states[AT - 1].hold) > 0.5 and int(states[AT + 40].rollbacks) > 0
    assert float(states[AT + 40].hold) == 0.0
    states, _ = run(loss_at=Losses({AT: np.nan}))
    assert int(states[AT].rollbacks) == 1
    assert float(states[AT + 1].hold) == float(states[AT - 1].hold) > 0.5


def test_a_decay_that_is_asked_for_sets_in_at_once():
    ts = run()[0][AT - 1]
    assert float(ts.hold) > 0.5
    annealed = TUNER.anneal(ts, 100)
    assert float(FACTOR(annealed)) == pytest.approx(1.0, abs=1e-5)
    assert float(FACTOR(annealed._replace(step=annealed.step + 50))) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("memory", ["keep-winner", "rewind"])
def test_inside_an_optimizer_validation_ends_it_too(memory):
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3)
    state = atn.autotune(inner, {"learning_rate": (1e-5, 1e-1)}, TOTAL, memory=memory).init(jnp.ones(3))
    ts = state.tuner
    seen = ts.validation._replace(mark=jnp.float32(0.5), marked=jnp.int32(AT - 100))
    ts = ts._replace(step=jnp.int32(AT), phase=jnp.int32(_state.TRAIN), hold=jnp.float32(0.7), validation=seen)
    state = state._replace(packed=_packed.pack(state.course._replace(tuner=ts)))
    lower = atn.observe_eval(state, 0.4)
    assert float(lower.tuner.hold) == pytest.approx(0.7)
    assert float(atn.observe_eval(lower, 0.6).tuner.hold) == pytest.approx(0.7)  # too soon to say
    assert float(atn.observe_eval(state, 0.6).tuner.hold) == 0.0
