"""The whole controller: step by step against a plain twin, and what never changes it."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import autotunenet_jax as atn
from autotunenet_jax.controller import loss_monitor, state, validation_monitor
from autotunenet_jax.controller.plan import NEVER
from tests.controller.light import SPACES, bits, losses_like_training, run, told, tuner, twin_of

pytestmark = pytest.mark.usefixtures("light_surrogate")

KINDS = ("healthy", "noisy", "not finite", "bursts", "spikes", "divergence", "huge", "constant", "everything")


def settings():
    """Forty runs that between them meet every kind of loss, space, length and way of reporting."""
    for seed in range(40):
        yield (
            KINDS[seed % len(KINDS)],
            list(SPACES)[seed % 3],
            (400, None, 100, 800)[seed // 3 % 4],
            (None, "asked", "asked", "every step")[seed // 2 % 4],
            seed,
        )


@functools.cache
def random_run(kind, space, total_steps, reported, seed):
    tuned = tuner(space, total_steps)
    losses, metrics = losses_like_training(kind, seed, total_steps or 1200)
    metrics = None if reported is None else metrics
    bowl = 0.0 if kind == "constant" or seed % 4 == 0 else 0.1
    return tuned, run(tuned, told(losses, metrics, reports=reported == "every step", bowl=bowl), key=seed)


def rows_of_twin(tuned, rows, seed):
    """What the twin makes of the losses and metrics that a run heard."""
    twin, out = twin_of(tuned, key=seed), []
    for loss, metric, reports in zip(rows["loss"], rows["metric"], rows["reports"], strict=True):
        if reports:
            twin.observe_eval(metric)
        said = twin.update(loss)
        finished = [fork.x for fork in twin.forks if fork.status == state.FORK_FINISHED]
        counted = [
            twin.step,
            twin.phase,
            twin.left,
            twin.discarded,
            twin.rollbacks,
            twin.retries,
            twin.retreats,
            twin.has_fallen,
        ]
        copies = [twin.saved.data, twin.saved.step, twin.kept.data, twin.kept.step]
        status = [twin.row, -1 if twin.winner is None else twin.winner, len(finished), twin.readings.worse]
        told_to = [int(value) for value in vars(said).values()]
        out.append((told_to, counted + copies + status, twin.incumbent, twin.hyperparams()))
    return out


def counted(rows):
    """The whole numbers of a run in the order of the twin's."""
    held = rows["round"]
    finished = np.sum(held.status == state.FORK_FINISHED, axis=1)
    columns = [rows[name] for name in ("step", "phase", "segment_left", "discarded", "rollbacks")]
    columns += [rows["health"].retries, rows["validation"].retreats, rows["validation"].has_fallen, *rows["slots"]]
    return np.stack([*columns, held.index, held.kept, finished, rows["validation"].worse], axis=1)


@pytest.mark.parametrize(("kind", "space", "total_steps", "reported", "seed"), list(settings()))
def test_every_step_is_that_of_the_plain_twin(kind, space, total_steps, reported, seed):
    tuned, (rows, _) = random_run(kind, space, total_steps, reported, seed)
    with np.errstate(all="ignore"):
        said, numbers, incumbents, values = zip(*rows_of_twin(tuned, rows, seed), strict=True)
    directives = np.stack(rows["directive"], axis=1)
    for actual, expected in ((directives, said), (counted(rows), numbers)):
        differs = np.any(actual != np.array(expected), axis=1)
        first = int(np.argmax(differs))
        assert not differs.any(), f"step {first}: {actual[first]} is not {expected[first]}"
    np.testing.assert_allclose(rows["incumbent"], incumbents, atol=1e-5)
    for name in tuned.space.names:
        np.testing.assert_allclose(rows["hp"][name], [hp[name] for hp in values], rtol=1e-5, atol=3e-7, err_msg=name)


def all_runs():
    for each in settings():
        yield *each, *random_run(*each)


def test_the_runs_of_the_twin_reach_every_outcome():
    """Otherwise the comparison above would say little."""
    outcomes, verdicts, cooled, climbed, far, undone, returned, fell = set(), set(), 0, 0, 0, 0, 0, 0
    for *_, (rows, ts) in all_runs():
        outcomes |= set(rows["directive"].outcome.tolist())
        verdicts |= set(rows["directive"].verdict.tolist())
        cooled += bool(np.any(rows["validation"].cools_from < NEVER))
        climbed += int(ts.validation.climbed_at) >= 0
        far += bool(np.any(rows["validation"].climbed > validation_monitor.CLIMB_DECADES))
        undone += bool(np.any(rows["validation"].climbed < 0.0))
        returned += int(ts.validation.retreats)
        fell += int(ts.validation.has_fallen)
    assert outcomes == set(state.OUTCOMES)
    assert verdicts >= set(loss_monitor.MESSAGES) - {loss_monitor.STALLED}
    assert cooled >= 5 and climbed >= 2 and far >= 3 and undone >= 2 and returned >= 5 and fell >= 2


def test_values_never_leave_their_bounds():
    """Except that schedule, warm-ups and cool-downs take a rate below its lower bound."""
    for _, space, total_steps, *_, tuned, (rows, _) in all_runs():
        for name, role in zip(tuned.space.names, tuned.space.roles, strict=True):
            lo, hi = SPACES[space][name]
            values = rows["hp"][name]
            assert np.all((values >= (0.0 if role == "rate" else lo)) & (values <= hi)), name
            if total_steps and role == "rate":
                assert values[-1] == 0.0
        for name in ("incumbent", "trial"):
            assert np.all((rows[name] >= 0.0) & (rows[name] <= 1.0))


def test_directives_can_be_carried_out():
    for *_, (rows, _) in all_runs():
        told_to, step = rows["directive"], rows["step"]
        assert not np.any(told_to.restore & told_to.adopt)
        np.testing.assert_array_equal(step, 1 + np.arange(len(step)))
        assert np.all(rows["segment_left"] >= 1)
        # Data goes back within a round only, and never to before where it began.
        back = np.diff(told_to.data_step) != 1
        assert np.all(np.diff(rows["discarded"]) >= 0)
        assert np.all(told_to.data_step[1:][back] >= rows["slots"].saved_data[1:][back])
        assert not np.any(back & (told_to.outcome[1:] == state.OUTCOME_ROLLBACK))


def test_discarded_steps_stay_below_their_share():
    for kind, _, total_steps, _, _, tuned, (_, ts) in all_runs():
        if kind in ("healthy", "noisy", "spikes", "constant") and total_steps:
            last_fork = int(np.max(tuned.plan.length[tuned.plan.forks > 0], initial=0))
            assert int(ts.discarded) <= float(tuned.plan.share) * total_steps + last_fork


def test_bad_data_may_exceed_the_share_by_what_is_begun_again():
    for _, _, total_steps, _, _, tuned, (_, ts) in all_runs():
        if total_steps:
            plan = tuned.plan
            each = (1 + loss_monitor.MAX_RETRIES) * np.maximum(plan.length, plan.range_test)
            assert int(ts.discarded) <= float(plan.share) * total_steps + np.sum(each[plan.start < NEVER])


def quantised(seed, count=400):
    """Losses and metrics on a grid of binary fractions, so that adding a small whole number loses no bit."""
    return [np.round(column * 2**10) / 2**10 for column in losses_like_training("spikes", seed, count)]


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 4.0), (1.0, -16.0), (0.25, 0.0), (64.0, 0.0), (2.0**-100, 0.0), (2.0**40, 0.0)]
)
def test_neither_a_constant_in_the_loss_nor_its_unit_changes_a_decision(scale, shift):
    losses, metrics = quantised(3)
    rows, _ = run(tuner(), told(losses, metrics))
    others, _ = run(tuner(), told(scale * losses + shift, scale * metrics + shift))
    np.testing.assert_array_equal(np.stack(rows["directive"]), np.stack(others["directive"]))
    np.testing.assert_allclose(rows["incumbent"], others["incumbent"], atol=1e-3)


def test_the_order_of_the_names_makes_no_difference():
    one = atn.AutoTuneNet(SPACES["both"], 400)
    other = atn.AutoTuneNet(dict(reversed(SPACES["both"].items())), 400)
    assert one.core == other.core
    a, b = one.init(jax.random.key(0)), other.init(jax.random.key(0))
    one.check(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(*map(bits, (x, y)), equal_nan=True), a, b))


WEIRD = (0.0, 1.0, -1.0, 2.0, 1e-30, 5.0, 1e6, -1e6, 1e14, 1e30, -1e30, 3e38, np.nan, np.inf, -np.inf)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(WEIRD), st.integers(1, 40), st.booleans()), min_size=1, max_size=30),
    st.sampled_from(WEIRD),
)
def test_whatever_is_reported_the_state_stays_sound(pieces, metric):
    noise = 0.1 * np.random.default_rng(0).normal(size=40)
    parts = [np.full(length, value) + is_noisy * noise[:length] for value, length, is_noisy in pieces]
    rows, ts = run(tuner(), told(np.resize(np.concatenate(parts), 400), np.full(400, metric)))
    assert not np.any(rows["directive"].restore & rows["directive"].adopt)
    assert np.all((rows["incumbent"] >= 0.0) & (rows["incumbent"] <= 1.0))
    assert np.all((rows["hp"]["learning_rate"] >= 0.0) & (rows["hp"]["learning_rate"] <= 1.0))
    assert np.all(rows["segment_left"] >= 1)
    assert np.all(np.diff(rows["discarded"]) >= 0) and int(ts.discarded) <= 400
    for leaf in jax.tree.leaves((ts.health.monitor, ts.knowledge)):
        assert np.all(np.isfinite(leaf))
