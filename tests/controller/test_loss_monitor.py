"""Verdicts over losses: what is noise, what is a spike, what is a catastrophe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import loss_monitor
from tests.reference.algorithm import Monitor

GUARD = atn.Guard()
LONG = 200


@jax.jit
def watched(losses, ceiling, state, limit=np.inf, known=-np.inf):
    """States and verdicts of a run of losses."""

    def step(state, loss):
        state, verdict = loss_monitor.watch(GUARD, state, loss, ceiling=ceiling, limit=limit, known=known)
        return state, (state, verdict)

    return jax.lax.scan(step, state, losses)


def verdicts(losses, *, ceiling=np.inf, state=None, limit=np.inf, known=-np.inf):
    state = loss_monitor.init() if state is None else state
    levels = [jnp.float32(level) for level in (ceiling, limit, known)]
    state, (states, codes) = watched(jnp.asarray(losses, jnp.float32), levels[0], state, *levels[1:])
    return np.asarray(codes), state, states


def noise(seed=0, count=LONG, level=1.0, scale=0.1):
    return (level + scale * np.random.default_rng(seed).normal(size=count)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sigmas": 0.5}, ValueError, "sigmas must be finite and at least 1; got 0.5"),
        ({"patience": 0}, ValueError, "patience must be finite and at least 1; got 0"),
        ({"window": float("inf")}, ValueError, "window must be finite"),
        ({"max_rollbacks": -1}, ValueError, "max_rollbacks must be finite and at least 0; got -1"),
        ({"warmup": "48"}, TypeError, "warmup must be a number; got '48'"),
        ({"patience": True}, TypeError, "patience must be a number; got True"),
    ],
)
def test_bad_thresholds(options, error, says):
    with pytest.raises(error, match=says):
        atn.Guard(**options)


def test_no_rollback_is_a_valid_wish():
    assert atn.Guard(max_rollbacks=0).max_rollbacks == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 3, 100])
def test_non_finite_losses_are_skipped_and_leave_no_trace(value, position):
    losses = noise()
    codes, state, _ = verdicts(np.insert(losses, position, value)[:-1])
    assert codes[position] == loss_monitor.SKIPPED
    assert np.all(np.delete(codes, position) == loss_monitor.HEALTHY)
    _, expected, _ = verdicts(np.append(losses[:-1], np.nan))
    for name, leaf in state._asdict().items():
        assert leaf == getattr(expected, name), name


@pytest.mark.parametrize("position", [4, 20, 60, 199])
def test_a_single_huge_value_is_forgotten(position):
    losses = noise(count=400)
    losses[position] = 1e30
    codes, state, _ = verdicts(losses, ceiling=2.5)
    assert np.all(codes <= loss_monitor.WATCHING)
    assert abs(float(state.level) - 1.0) < 0.1
    assert float(state.spread) < 0.2
    # The watch is awake again: a jump that stays is found.
    later, _, _ = verdicts(np.full(20, 5.0), state=state)
    assert np.any(later >= loss_monitor.SPIKE)


@pytest.mark.parametrize("position", [4, 20, 60, 199])
def test_a_single_wildly_low_value_is_forgotten_too(position):
    losses = noise(count=400)
    losses[position] = -1e4
    codes, state, _ = verdicts(losses, ceiling=2.5)
    assert np.all(codes <= loss_monitor.WATCHING)
    assert abs(float(state.level) - 1.0) < 0.1 and float(state.spread) < 0.2
    assert np.any(verdicts(np.full(20, 5.0), state=state)[0] >= loss_monitor.SPIKE)


def test_a_loss_above_the_limit_is_unusual_however_few_are_known():
    losses = noise(count=20)
    losses[10:] = 3.0
    assert np.all(verdicts(losses)[0] == loss_monitor.HEALTHY)
    codes, state, _ = verdicts(losses, limit=2.0)
    assert np.all(codes[10:14] <= loss_monitor.WATCHING) and np.all(codes[10:12] == loss_monitor.WATCHING)
    assert np.any(codes[10:] == loss_monitor.SPIKE)
    assert float(state.level) < 1.2


def test_what_the_data_was_seen_to_cost_is_not_unusual_again():
    losses = noise()
    losses[100:120] = 3.0
    assert loss_monitor.SPIKE in verdicts(losses)[0]
    assert np.all(verdicts(losses, known=3.0)[0] == loss_monitor.HEALTHY)
    # What is far above that is.
    losses[100:120] = 9.0
    assert loss_monitor.SPIKE in verdicts(losses, known=3.0)[0]


def test_huge_values_that_stay_are_found_before_and_after_warm_up():
    for position in (10, 100):
        losses = noise()
        losses[position:] = 1e30
        codes, *_ = verdicts(losses, ceiling=3.0)
        assert np.any(codes[position : position + 10] >= loss_monitor.SPIKE)


def test_a_spike_needs_patience_and_healthy_values_take_it_back():
    losses = noise()
    losses[100 : 100 + GUARD.patience - 1] = 3.0
    assert np.all(verdicts(losses)[0] <= loss_monitor.WATCHING)
    losses[100 : 100 + GUARD.patience] = 3.0
    codes, *_ = verdicts(losses)
    assert codes[100 + GUARD.patience - 1] == loss_monitor.SPIKE
    apart = noise()
    apart[60:160:2] = 3.0
    assert np.all(verdicts(apart)[0] <= loss_monitor.WATCHING)


def test_unusual_values_do_not_enter_the_statistics():
    losses = noise()
    calm = verdicts(losses)[1]
    losses[150:153] = 4.0
    assert abs(float(verdicts(losses)[1].level) - float(calm.level)) < 0.01


def test_falling_losses_and_small_plateaus_are_healthy():
    steps = np.arange(LONG)
    for losses in (np.exp(-steps / 20), 5.0 - 0.02 * steps, np.where(steps < 100, 2.0, 1.0), 2.0 + 0 * steps):
        assert np.all(verdicts(losses)[0] == loss_monitor.HEALTHY)


def test_a_slow_climb_over_the_ceiling_is_divergence():
    losses = noise(scale=0.02) + np.linspace(0, 3, LONG)
    codes, *_ = verdicts(losses, ceiling=2.0)
    first = int(np.argmax(codes == loss_monitor.DIVERGED))
    assert 60 < first < 100


def test_a_loss_that_has_stopped_falling_is_told_of_and_forgiven_when_it_falls_again():
    steps = GUARD.stall_steps
    falling = np.linspace(2.0, 1.0, 500)
    flat = falling[-1] + 0.0 * np.arange(2 * steps)
    again = np.linspace(1.0, 0.5, 300)
    clean = np.concatenate([falling, flat, again])
    for losses in (clean, clean + noise(level=0.0, scale=0.02, count=len(clean))):
        codes, *_ = verdicts(losses)
        assert set(codes) == {loss_monitor.HEALTHY, loss_monitor.STALLED}
        first, last = np.flatnonzero(codes == loss_monitor.STALLED)[[0, -1]]
        # The running mean follows the fall for hundreds of steps.
        assert len(falling) + steps <= first < len(falling) + 2 * steps
        assert len(falling) + len(flat) <= last < len(clean) - 100


def test_a_slow_fall_under_noise_is_no_stall():
    count = 10 * GUARD.stall_steps
    codes, *_ = verdicts(noise(scale=0.1, count=count) - 0.1 * np.arange(count) / GUARD.stall_steps)
    assert loss_monitor.STALLED not in codes


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_a_stall_is_seen_through_values_that_do_not_count(bad):
    losses = np.full(3 * GUARD.stall_steps, 1.0)
    losses[25::50] = bad
    codes, *_ = verdicts(losses)
    assert np.count_nonzero(codes == loss_monitor.STALLED) > GUARD.stall_steps


@pytest.mark.usefixtures("light_surrogate")
def test_a_stall_asks_for_no_rollback_and_stops_no_snapshot():
    """Snapshots go on being taken: the one that a later spike goes back to must not be from before the stall."""
    tuner = atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=1500, guard=atn.Guard(stall_steps=50))

    @jax.jit
    def run(ts, losses):
        def step(ts, loss):
            ts, directive = tuner.update(ts, loss)
            return ts, (directive.verdict, directive.save | directive.keep, ts.phase, ts.rollbacks)

        return jax.lax.scan(step, ts, losses)[1]

    codes, saves, phases, rollbacks = map(np.asarray, run(tuner.init(jax.random.key(0)), jnp.ones(1500)))
    stalled = (codes == loss_monitor.STALLED) & (phases == 0)
    assert stalled[800:].mean() > 0.9 and rollbacks[-1] == 0
    assert np.count_nonzero(saves & stalled) > 5


def test_the_plain_twin_sees_the_same():
    guard = atn.Guard(stall_steps=60)
    losses = np.concatenate([noise(1, 120) + np.linspace(1, 0, 120, dtype=np.float32), noise(2, 400)])
    losses[[30, 200, 260]] = np.nan, np.inf, 1e30
    losses[300:310] += 4.0
    limit, known = 5.5, 0.5
    see = functools.partial(loss_monitor.watch, guard, ceiling=6.0, limit=limit, known=known)
    codes = jax.jit(lambda losses: jax.lax.scan(see, loss_monitor.init(), losses)[1])(jnp.asarray(losses))
    twin = Monitor()
    expected = [twin.see(guard, *np.float32([loss, 6.0, limit, known])) for loss in losses]
    assert np.asarray(codes).tolist() == expected
    assert set(expected) == set(loss_monitor.MESSAGES) - {loss_monitor.DIVERGED, loss_monitor.NON_FINITE}


@pytest.mark.parametrize("shift", [-64.0, 64.0])
def test_only_differences_count(shift):
    losses = np.round(noise(3) * 2**8) / 2**8
    losses[100:110] += 2.0
    codes, *_ = verdicts(losses, ceiling=4.0)
    moved, *_ = verdicts(losses + shift, ceiling=4.0 + shift)
    np.testing.assert_array_equal(codes, moved)
    assert np.any(codes == loss_monitor.SPIKE)


@pytest.mark.parametrize("heavy", [False, True])
def test_noise_is_no_failure(heavy):
    """Fewer than one false alarm in a hundred windows of a hundred steps, from a fresh start without any progress."""
    windows = 2000
    rng = np.random.default_rng(0)
    draw = rng.standard_t(df=5, size=(windows, 104)) if heavy else rng.normal(size=(windows, 104))
    losses = jnp.asarray(1.0 + 0.1 * draw, jnp.float32)
    spread = jnp.float32(0.1 * np.mean(np.abs(draw)))
    # As the tuner sets it: where the run began, from four losses, and six spreads above.
    ceilings = jnp.mean(losses[:, :4], axis=1) + 6.0 * spread
    states = loss_monitor.init()._replace(level=jnp.float32(1.0), spread=spread)
    _, (_, codes) = jax.jit(jax.vmap(watched, in_axes=(0, 0, None)))(losses[:, 4:], ceilings, states)
    assert np.mean(np.any(loss_monitor.is_failure(codes), axis=1)) < 0.01


def test_every_verdict_has_a_message_for_the_user():
    assert set(loss_monitor.MESSAGES) == set(range(7))
    assert all(message.endswith(".") and len(message.split()) >= 4 for message in loss_monitor.MESSAGES.values())
    failures = [bool(loss_monitor.is_failure(jnp.int32(code))) for code in range(7)]
    assert failures == [False, False, True, True, True, False, False]


def heard(loss, *, before=(), in_train=True, bad_run=0):
    """What the handlers are told of a loss after some others."""
    state = verdicts(noise())[1]
    for value in before:
        state, _ = loss_monitor.watch(GUARD, state, jnp.float32(value))
    return loss_monitor.hear(
        GUARD,
        state,
        jnp.float32(loss),
        bad_run=jnp.int32(bad_run),
        in_train=jnp.bool_(in_train),
        initial_loss=jnp.float32(1.0),
        ceiling=jnp.inf,
        limit=jnp.inf,
        known=-jnp.inf,
    )


LAST = loss_monitor.BAD_RUN - 1


@pytest.mark.parametrize("bad_run", [0, 1, LAST - 1, LAST, 100])
def test_only_a_run_of_bad_losses_is_a_failure(bad_run):
    told = heard(np.nan, bad_run=bad_run)
    assert int(told.bad_run) == bad_run + 1 and not told.is_finite
    is_run = bad_run >= LAST
    assert bool(told.unhealthy) == is_run
    assert int(told.verdict) == (loss_monitor.NON_FINITE if is_run else loss_monitor.SKIPPED)
    before = verdicts(noise())[1]
    assert all(np.array_equal(a, b) for a, b in zip(before, told.after, strict=True))
    # A finite one ends it.
    after = heard(1.0, bad_run=bad_run)
    assert int(after.bad_run) == 0 and int(after.verdict) == loss_monitor.HEALTHY


def test_a_run_of_bad_losses_is_out_of_the_blue_unless_the_loss_climbed_before():
    assert heard(np.nan, bad_run=LAST).is_blue
    assert not heard(np.nan, before=[1.5, 2.5, 4.0, 8.0], bad_run=LAST).is_blue
    assert not heard(np.nan).is_blue and not heard(1.0).is_blue


def test_where_a_few_losses_decide_one_beyond_all_measure_counts_as_not_finite():
    assert heard(1e20).is_finite and int(heard(1e20).verdict) == loss_monitor.WATCHING
    in_fork = heard(1e20, in_train=False, bad_run=LAST)
    assert not in_fork.is_finite and in_fork.unhealthy and not heard(1e20, in_train=False).unhealthy
    assert np.isfinite(in_fork.value)
