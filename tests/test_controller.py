"""The phase machine: against a plain twin, under JAX's transformations, and under losses nobody should report."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import autotunenet_jax as atn
from autotunenet_jax import _acquisition, _guard, _observations, _policy, _state, _stored_program, _surrogate, _tick
from autotunenet_jax._plan import Recipe
from tests.reference.phase_machine import PhaseMachine
from tests.test_validation import overfitting

SPACES = {
    "both": {"learning_rate": (1e-5, 1.0), "dropout": (0.0, 0.5)},
    "rate": {"learning_rate": (1e-5, 1.0)},
}
TOTAL = 200
VARIANCE = 0.01
OUTCOMES = ("none", "round started", "fork started", "fork continues", "moved", "stayed", "failed", "skipped")
OUTCOMES += ("rollback", "retried", "accepted")
STATUSES = ("unused", "running", "dropped", "failed", "finished")


# Besides when the tuner asks for it, as loops do.
EVAL_EVERY = 10


def where_next(lower, upper, runs):
    return lower + (upper - lower) * ((runs * np.float32(0.381966) + np.float32(0.1)) % 1)


@pytest.fixture(scope="module", autouse=True)
def light_surrogate():
    """Replaces the Gaussian process, tested elsewhere, by a local average that has a twin of three lines."""

    def fit(config, observations, *, start, key, prior_mean):
        return _Average(start, observations)

    def predict(config, posterior, x, *, time):
        obs = posterior.observations
        usable = _observations.mask(obs) & ~obs.failed
        near = jnp.exp(-jnp.sum((x[:, None] - obs.x[None]) ** 2, -1) / 0.01) * usable
        mean = (near @ obs.y + 0.5e-3) / (jnp.sum(near, -1) + 1e-3)
        return mean, VARIANCE * jnp.eye(len(x))

    def propose(config, posterior, key, *, lower, upper, snap, reference, reference_mask, time):
        return snap(where_next(lower, upper, jnp.sum(reference_mask)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_surrogate, "fit", fit)
        patch.setattr(_surrogate, "predict", predict)
        patch.setattr(_acquisition, "propose", propose)
        # Programs of these must not be taken for those of the engine.
        patch.setattr(_stored_program, "_folder", lambda: None)
        yield


class _Average:
    def __init__(self, hyper, observations):
        self.hyper, self.observations = hyper, observations


def twin_surrogate(kinds, observations, runs, lower, upper):
    groups = {}
    for _, y, group in observations:
        if y is not None:
            groups.setdefault(group, []).append(np.clip(y, -1e15, 1e15))
    known = []
    for x, y, group in observations:
        if y is not None:
            column = np.array(groups[group])
            scale = max(-column.min(), 2 * np.mean(column - column.min()), 1e-12)
            share = np.clip((np.clip(y, -1e15, 1e15) - column.min()) / scale, 0, 4)
            resolution = 1.0 if kinds[group // 2] == 1 else 0.05
            known.append((x, np.log1p(share / resolution) / np.log1p(1 / resolution)))
    proposal = where_next(lower, upper, sum(runs)).astype(np.float32)

    def mean(x):
        near = [float(np.exp(-np.sum((x - other) ** 2) / 0.01)) for other, _ in known]
        return (sum(n * y for n, (_, y) in zip(near, known, strict=True)) + 0.5e-3) / (sum(near) + 1e-3)

    return mean, VARIANCE, proposal


@functools.cache
def tuner(total_steps: int | None = TOTAL, start=1e-4, space="both"):
    # Forks that may be dropped at an early score: the plan's own have one score only.
    # Those of one space are long enough to promise something of the training that begins again after them.
    late = 0.06 if space == "rate" else 0.045
    recipe = Recipe(early=0.025, late=late, fast_forks=3, first_share=0.25, fast_share=0.35, raised=0.05)
    initial = {name: value for name, value in (("learning_rate", start), ("dropout", 0.1)) if name in SPACES[space]}
    return atn.AutoTuneNet(SPACES[space], total_steps, initial=initial, recipe=recipe)


def view(ts, directive, core):
    return {
        "directive": directive,
        "hp": core.hyperparams(ts),
        **{name: getattr(ts, name) for name in ("step", "data_step", "phase", "segment_left", "incumbent", "trial")},
        **{name: getattr(ts, name) for name in ("discarded", "rollbacks", "rounds_held", "retries", "initial_loss")},
        **{name: getattr(ts, name) for name in ("probation", "hold")},
        "slots": ts.slots,
        "round": ts.round,
        "guard": ts.guard,
    }


def step(core, carry, inputs):
    ts, wants_eval = carry
    loss, metric = inputs
    seen = core.observe_eval(ts, metric)
    wants_eval = wants_eval | (ts.step % EVAL_EVERY == 0)
    ts = jax.tree.map(lambda a, b: jnp.where(wants_eval, a, b), seen, ts)
    ts, directive = core.update(ts, loss)
    return (ts, directive.evaluate), view(ts, directive, core)


@functools.cache
def scanned(space):
    one = functools.partial(step, tuner(space=space).core)
    return jax.jit(lambda ts, losses, metrics: jax.lax.scan(one, (ts, jnp.bool_(True)), (losses, metrics)))


def run(losses, metrics=None, *, total_steps: int | None = TOTAL, key=0, space="both"):
    """The whole run, as a list of NumPy views, one a step; and the state at its end."""
    losses = jnp.asarray(losses, jnp.float32)
    metrics = losses if metrics is None else jnp.asarray(metrics, jnp.float32)
    (ts, _), rows = scanned(space)(tuner(total_steps, space=space).init(jax.random.key(key)), losses, metrics)
    rows = jax.device_get(rows)
    return [jax.tree.map(lambda leaf: leaf[i], rows) for i in range(len(losses))], ts  # noqa: B023


def losses_like_training(seed, *, faults=(), count=TOTAL):
    rng = np.random.default_rng(seed)
    losses = 2.0 * np.exp(-np.arange(count) / 60) + 0.05 * rng.normal(size=count)
    for position in rng.integers(0, count, size=6) if faults else ():
        fault = faults[rng.integers(len(faults))]
        if fault == "rise":
            losses[position:] += 0.3 * np.arange(count - position)
        elif fault == "jump":
            losses[position : position + 12] += 5.0
        elif fault == "shift":  # for good, each time to the same level
            begin = round(0.8 * count) + position // 10
            losses[begin:] = 4.0 + 0.05 * rng.normal(size=count - begin)
        elif fault == "behind":  # of what the forks reached, for as long as it matters
            losses[54:140] = 1.8 + 0.05 * rng.normal(size=86)
        else:
            losses[position] = fault
    return losses.astype(np.float32), (losses + 0.1 * rng.normal(size=count)).astype(np.float32)


FAULTS = {
    "healthy": (),
    "not finite": (np.nan, np.inf, -np.inf),
    "huge": (1e30,),
    "jumps": ("jump",),
    "rise": ("rise",),
    "shifts": ("shift",),
    "behind": ("behind",),
    "everything": (np.nan, np.inf, 1e30, "jump", "rise"),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize(
    ("total_steps", "count", "seed", "space"),
    [(TOTAL, TOTAL, 0, "both"), (TOTAL, TOTAL, 1, "both"), (None, 600, 2, "both"), (TOTAL, TOTAL, 0, "rate")],
)
def test_every_step_is_that_of_the_plain_twin(kind, total_steps, count, seed, space):
    losses, metrics = losses_like_training(seed, faults=FAULTS[kind], count=count)
    tuned = tuner(total_steps, space=space)
    space_of = _policy.directions(tuned.space)
    twin = PhaseMachine(
        tuned.plan,
        guard=tuned.core.guard,
        policy=tuned.core.policy,
        start=np.asarray(tuned.init(jax.random.key(0)).incumbent),
        is_rate=space_of.is_rate,
        is_slow=space_of.is_slow,
        decades=space_of.decades,
        surrogate=functools.partial(twin_surrogate, tuned.plan.kind),
    )
    rows, _ = run(losses, metrics, total_steps=total_steps, space=space)
    wants_eval = True
    with np.errstate(all="ignore"):
        for i, row in enumerate(rows):
            if wants_eval or i % EVAL_EVERY == 0:
                twin.observe_eval(metrics[i])
            expected = twin.update(losses[i])
            directive, where = row["directive"], f"step {i}"
            for name in ("save", "restore", "keep", "adopt", "evaluate"):
                assert bool(getattr(directive, name)) == getattr(expected, name), (where, name)
            assert OUTCOMES[int(directive.outcome)] == expected.outcome, where
            assert int(directive.data_step) == expected.data_step == int(row["data_step"]), where
            assert _state.PHASES[int(row["phase"])] == twin.phase, where
            actual = [int(row[name]) for name in ("step", "segment_left", "discarded", "rollbacks", "retries")]
            assert actual == [twin.step, twin.left, twin.discarded, twin.rollbacks, twin.retries], where
            assert int(row["probation"]) == twin.probation, where
            np.testing.assert_allclose(row["hold"], twin.hold, rtol=1e-6, err_msg=where)
            slots = tuple(int(value) for value in row["slots"])
            assert slots == (*twin.saved, *twin.kept_copy), where
            assert int(row["round"].kept) == (-1 if twin.winner is None else twin.winner), where
            ended = [fork.status for fork in twin.forks if fork.status != "running"]
            assert [STATUSES[int(s)] for s in row["round"].status[: len(ended)]] == ended, where
            np.testing.assert_allclose(row["incumbent"], twin.incumbent, atol=2e-6, err_msg=where)
            if twin.phase == "fork":
                np.testing.assert_allclose(row["trial"], twin.trial, atol=2e-6, err_msg=where)
            np.testing.assert_allclose(row["guard"].level, twin.watch.level, rtol=1e-4, atol=1e-5, err_msg=where)
            wants_eval = expected.evaluate
    assert twin.rounds_held >= 1


def test_the_sequences_of_the_twin_reach_every_outcome():
    """Otherwise the comparison above would say little."""
    seen = set()
    for kind in FAULTS.values():
        for seed in range(3):
            rows, _ = run(*losses_like_training(seed, faults=kind))
            seen |= {OUTCOMES[int(row["directive"].outcome)] for row in rows}
    assert seen >= set(OUTCOMES) - {"skipped", "failed"}
    rows, _ = run(*losses_like_training(0, faults=FAULTS["behind"]), space="rate")
    assert _guard.BEHIND in [int(row["directive"].verdict) for row in rows]
    holds = [float(row["hold"]) for row in run(*losses_like_training(0), space="rate")[0]]
    assert max(holds) > 0.3 and holds[-1] == 0.0


def discrete(row):
    names = ("phase", "segment_left", "data_step", "discarded", "rollbacks", "rounds_held")
    return [int(row[name]) for name in names] + [int(value) for value in row["directive"]]


def quantised(seed, **options):
    """Losses and metrics on a grid of binary fractions, so that adding a small whole number loses no bit."""
    return [np.round(column * 2**10) / 2**10 for column in losses_like_training(seed, **options)]


@pytest.mark.parametrize("shift", [4.0, -4.0, -16.0])
@pytest.mark.parametrize("kind", ["healthy", "jumps"])
def test_adding_a_constant_to_the_loss_changes_no_decision(kind, shift):
    """Not even one that makes every loss negative."""
    losses, metrics = quantised(3, faults=FAULTS[kind])
    rows, _ = run(losses, metrics)
    shifted, _ = run(losses + shift, metrics + shift)
    for i, (a, b) in enumerate(zip(rows, shifted, strict=True)):
        assert discrete(a) == discrete(b), f"step {i}"
        np.testing.assert_allclose(a["incumbent"], b["incumbent"], atol=1e-3)


def test_a_constant_loss_is_healthy():
    for value in (0.0, 2.5, -3.0, 1e-20, 1e12):
        rows, ts = run(np.full(TOTAL, value))
        assert int(ts.rollbacks) == 0
        assert _state.FORK_FAILED not in np.stack([row["round"].status for row in rows])
        assert np.all(np.isfinite(ts.incumbent))


def many_runs():
    for kind in FAULTS.values():
        for seed in range(4):
            yield kind, *run(*losses_like_training(seed, faults=kind))


def test_hyperparameters_never_leave_their_bounds():
    """Except that schedule, warm-up and cool-down take a rate below its lower bound."""
    for _, rows, _ in many_runs():
        rates = np.array([row["hp"]["learning_rate"] for row in rows])
        dropout = np.array([row["hp"]["dropout"] for row in rows])
        assert np.all((rates >= 0) & (rates <= 1.0))
        assert np.all((dropout >= 0) & (dropout <= 0.5))
        for row in rows:
            for name in ("incumbent", "trial"):
                assert np.all((row[name] >= 0) & (row[name] <= 1))
        assert rates[-2] < 0.011  # the last step that is taken, and the rate after the budget is spent
        assert rates[-1] == 0


WEIRD = (0.0, 1.0, -1.0, 2.0, 1e-30, 5.0, 1e6, -1e6, 1e14, 1e30, -1e30, 3e38, np.nan, np.inf, -np.inf)


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(WEIRD), st.integers(1, 40), st.booleans()), min_size=1, max_size=30),
    st.sampled_from(WEIRD),
)
def test_whatever_is_reported_the_state_stays_sound(pieces, metric):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=TOTAL)
    parts = [np.full(length, value) + 0.1 * is_noisy * noise[:length] for value, length, is_noisy in pieces]
    losses = np.resize(np.concatenate(parts), TOTAL)
    rows, ts = run(losses, np.full(TOTAL, metric))
    for before, row in zip([None, *rows], rows, strict=False):
        directive = row["directive"]
        assert not (directive.restore and directive.adopt)
        for name in ("incumbent", "trial"):
            assert np.all((row[name] >= 0) & (row[name] <= 1)), name
        assert 0 <= row["hp"]["learning_rate"] <= 1
        assert 0 <= row["hp"]["dropout"] <= 0.5
        assert row["segment_left"] >= 1
        if before is not None:
            assert row["step"] == before["step"] + 1
            assert row["discarded"] >= before["discarded"]
            # Data goes back at the forks of a round only, never to before where the round began.
            assert row["data_step"] >= min(before["slots"].saved_data, before["data_step"] + 1)
            if directive.outcome == _state.OUTCOME_ROLLBACK:
                assert row["data_step"] == before["data_step"] + 1
    for leaf in (ts.guard, ts.observations.y, ts.observations.x, ts.hyper):
        assert all(bool(jnp.all(jnp.isfinite(part))) for part in jax.tree.leaves(leaf))
    assert int(ts.discarded) <= TOTAL


def test_the_steps_spent_on_forks_stay_below_the_cap():
    cap = round(float(tuner().plan.share) * TOTAL)
    for kind, rows, ts in many_runs():
        if not any(isinstance(fault, float) for fault in kind):
            assert int(ts.discarded) <= cap
        kept = [row["directive"] for row in rows]
        assert not any(d.restore and d.adopt for d in kept)
        assert int(ts.step) == TOTAL


def test_bad_data_may_exceed_the_cap_by_what_is_begun_again():
    """Sweeps and forks that met a batch of NaN or 1e30 start over, a few times in a round at most."""
    plan = tuner().plan
    longest = int(max(plan.sweep[0], plan.late[plan.start < TOTAL].max()))
    held = int(np.sum(plan.start < TOTAL))
    for _, _, ts in many_runs():
        assert int(ts.discarded) <= float(plan.share) * TOTAL + _tick._MAX_RETRIES * held * longest


def test_a_short_spike_is_forgiven_and_a_long_one_is_not():
    losses, _ = losses_like_training(0, count=600)
    rows, _ = run(losses, total_steps=None)
    at = next(i for i, row in enumerate(rows) if row["phase"] == _state.TRAIN and row["guard"].count >= 60)
    assert all(rows[i]["phase"] == _state.TRAIN for i in range(at, at + 20))
    for length, is_forgiven in ((1, True), (3, True), (12, False)):
        spiked = losses.copy()
        spiked[at : at + length] += 50.0
        after, _ = run(spiked, total_steps=None)
        assert (after[at + 19]["rollbacks"] == 0) == is_forgiven, length


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_rolled_back_at_once_and_its_data_is_not_shown_again(value):
    losses, _ = losses_like_training(0)
    rows, _ = run(losses)
    at = next(i for i, row in enumerate(rows) if row["phase"] == _state.TRAIN and row["guard"].count >= 20)
    losses[at] = value
    rows, _ = run(losses)
    directive = rows[at]["directive"]
    assert int(directive.verdict) == _guard.NON_FINITE
    assert bool(directive.restore) != bool(directive.adopt)
    data = [int(row["data_step"]) for row in rows]
    assert data[at] == data[at - 1] + 1
    assert data[at + 1] == data[at] + 1
    # The rate climbs back instead of jumping back.
    assert rows[at]["hp"]["learning_rate"] < 0.1 * rows[at - 1]["hp"]["learning_rate"]


def test_a_snapshot_that_may_hold_the_damage_is_not_used_twice():
    """State broken right before a snapshot was taken: the loss shows it one step after."""
    losses, _ = losses_like_training(0)
    rows, _ = run(losses)
    taken = [i for i, row in enumerate(rows) if row["directive"].save and row["phase"] == _state.TRAIN]
    taken += [i for i, row in enumerate(rows) if row["directive"].keep and row["phase"] == _state.TRAIN]
    at = next(i for i in sorted(taken) if discrete(rows[i])[0] == discrete(rows[i + 1])[0] == _state.TRAIN)
    suspect = "saved_step" if rows[at]["directive"].save else "kept_step"
    losses[at + 1] = np.nan
    losses[at + 15] = np.nan
    rows, _ = run(losses)
    first, second = rows[at + 1], rows[at + 15]
    assert bool(first["directive"].adopt if suspect == "saved_step" else first["directive"].restore)
    if getattr(second["slots"], suspect) < at:  # not overwritten in between
        assert bool(second["directive"].adopt if suspect == "saved_step" else second["directive"].restore)


@functools.cache
def updated():
    traces = []

    def update(ts, loss):
        traces.append(None)
        ts, directive = tuner().update(ts, loss)
        return ts, directive, tuner().hyperparams(ts)

    return jax.jit(update, donate_argnums=0), traces


def loop(losses, total_steps: int | None = TOTAL):
    update, _ = updated()
    ts, rows = tuner(total_steps).init(jax.random.key(0)), []
    for loss in losses:
        ts, directive, hp = update(ts, loss)
        rows.append((directive, hp))
    return ts, jax.device_get(rows)


def same_layout(a, b):
    return jax.tree.map(jax.typeof, a) == jax.tree.map(jax.typeof, b)


def test_one_trace_donated_whatever_happens_and_a_state_of_fixed_size():
    start = tuner().init(jax.random.key(0))
    ts, _ = loop(losses_like_training(5, faults=FAULTS["everything"])[0])
    loop(losses_like_training(6)[0], None)
    assert len(updated()[1]) == 1
    assert same_layout(start, ts)


def test_slow_hyperparameters_stay_put_when_no_metric_is_ever_reported():
    ts, rows = loop(losses_like_training(0)[0])
    assert int(ts.rounds_held) == 2  # the first one, and one that asks whether to raise the rate
    np.testing.assert_allclose([hp["dropout"] for _, hp in rows], 0.1, rtol=1e-6)
    assert len({float(hp["learning_rate"]) for _, hp in rows}) > 50


def test_scan_is_the_loop_and_three_at_once_are_three():
    columns = [losses_like_training(seed, faults=FAULTS["jumps"])[0] for seed in range(3)]
    start = tuner().init(jax.random.key(0))

    def scan(losses):
        return jax.lax.scan(lambda ts, loss: tuner().update(ts, loss), start, losses)

    together, directives = jax.jit(jax.vmap(scan))(jnp.stack(columns))
    for i, losses in enumerate(columns):
        ts, rows = loop(losses)
        for name in _state.Directive._fields:
            expected = [getattr(directive, name) for directive, _ in rows]
            np.testing.assert_array_equal(getattr(directives, name)[i], expected, err_msg=name)
        np.testing.assert_allclose(together.incumbent[i], ts.incumbent, atol=1e-5)


def test_a_mode_is_the_sign_of_the_metric():
    highest = atn.AutoTuneNet(SPACES["both"], TOTAL, mode="max")
    lowest = atn.AutoTuneNet(SPACES["both"], TOTAL, mode="min")
    key = jax.random.key(0)
    a = highest.observe_eval(highest.init(key), 0.75)
    b = lowest.observe_eval(lowest.init(key), -0.75)
    for x, y in zip(jax.tree.leaves(a._replace(key=0)), jax.tree.leaves(b._replace(key=0)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_rates_decay_to_zero_over_the_budget():
    rows, _ = run(*losses_like_training(0))
    shown = {row["step"]: float(row["hp"]["learning_rate"]) for row in rows if row["phase"] == _state.TRAIN}
    value = tuner(TOTAL).space.decode(rows[-1]["incumbent"])["learning_rate"]
    falling = {step: rate for step, rate in shown.items() if step > TOTAL / 2}
    assert falling
    expected = [value * (1 - step / TOTAL) for step in falling]
    np.testing.assert_allclose(list(falling.values()), expected, rtol=1e-4, atol=1e-9)


def test_an_open_ended_run_anneals_when_asked():
    rows, ts = run(*losses_like_training(0, count=600), total_steps=None)
    tuned = tuner(None)
    trained = [row for row in rows if row["phase"] == _state.TRAIN and row["rounds_held"] == 1]
    rates = [float(row["hp"]["learning_rate"]) for row in trained]
    assert np.all(np.diff(rates[: _tick.REWARM_STEPS]) > 0)
    assert len(set(rates[_tick.REWARM_STEPS :])) == 1  # no decay is planned
    while int(ts.phase) != _state.TRAIN:
        ts, *_ = updated()[0](ts, jnp.float32(0.1))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        tuned.anneal(ts, 0)
    ts = tuned.anneal(ts, 50)
    rates = []
    for _ in range(52):
        rates.append(float(tuned.hyperparams(ts)["learning_rate"]))
        ts, *_ = updated()[0](ts, jnp.float32(0.1))
    np.testing.assert_allclose(rates[:50], rates[0] * (1 - np.arange(50) / 50), rtol=1e-4)
    assert rates[50:] == [0.0, 0.0]
    assert int(ts.phase) == _state.TRAIN


def test_twenty_thousand_steps():
    """A long run of pure noise: nothing overflows, the state keeps its size, and noise is no failure."""
    tuned = tuner(20_000)
    rng = np.random.default_rng(0)
    start = tuned.init(jax.random.key(0))
    ts, failed, rates = start, 0, []
    for _ in range(20_000 // TOTAL):
        losses = jnp.asarray(1.0 + 0.1 * rng.normal(size=TOTAL), jnp.float32)
        (ts, _), rows = scanned("both")(ts, losses, losses)
        failed += int(np.sum(np.diff(np.any(rows["round"].status == _state.FORK_FAILED, axis=1).astype(int)) > 0))
        rates.append(rows["hp"]["learning_rate"])
    rates = np.concatenate(rates)
    assert int(ts.step) == 20_000
    assert int(ts.rollbacks) + failed <= 2
    assert int(ts.round.index) == int(np.sum(tuned.plan.start < 20_000))
    assert same_layout(start, ts)
    assert np.all(np.isfinite(rates)) and rates[-2] < 1e-4


def test_validation_that_is_noisy_or_rises_with_the_training_loss_changes_no_rate():
    losses, _ = losses_like_training(0)
    noisy = losses + 0.03 * np.random.default_rng(1).normal(size=len(losses)).astype(np.float32)
    for metrics, seen in ((noisy, losses), [overfitting()[1]] * 2):
        _, ts = run(seen, metrics)
        assert int(ts.validation.retreats) == 0


def test_a_shift_of_the_data_is_accepted_and_costs_no_rate():
    """The loss is as high on both snapshots: after two rollbacks training goes on, at the rate that was in force."""
    losses, metrics = losses_like_training(0)
    losses[160:] += 4.0
    rows, _ = run(losses, metrics)
    outcomes = [int(row["directive"].outcome) for row in rows]
    assert outcomes.count(_state.OUTCOME_ROLLBACK) == 2
    assert outcomes.count(_state.OUTCOME_ACCEPTED) == 1
    at = outcomes.index(_state.OUTCOME_ACCEPTED)
    assert at < 160 + 3 * 5
    np.testing.assert_array_equal(rows[at]["incumbent"], rows[159]["incumbent"])
    # Both snapshots were tried.
    rollbacks = [row["directive"] for row, outcome in zip(rows, outcomes, strict=True) if outcome == 8]
    assert {bool(directive.restore) for directive in rollbacks} == {True, False}


def test_a_rate_that_is_too_hot_is_still_lowered():
    """Each time the loss is low on the restored snapshot and climbs from there."""
    losses, metrics = losses_like_training(0)
    for begin in range(160, 200, 12):
        losses[begin + 6 : begin + 12] += 4.0
    rows, _ = run(losses, metrics)
    outcomes = [int(row["directive"].outcome) for row in rows]
    assert outcomes.count(_state.OUTCOME_ROLLBACK) >= 2
    assert _state.OUTCOME_ACCEPTED not in outcomes
    assert rows[-1]["incumbent"][0] < rows[159]["incumbent"][0]
