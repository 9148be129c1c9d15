"""Where the forks of a round go, and how long they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import fork_round, roles, state
from autotunenet_jax.controller.plan import FAST, SLOW
from tests.controller.light import SPACES

STEP = roles.LINE_STEP_DECADES / 5.0
MOMENTUM = {"momentum": (0.0, 0.99)}


@functools.cache
def compiled(space):
    tuned = atn.AutoTuneNet(SPACES.get(space, MOMENTUM), 1000)
    go = jax.jit(functools.partial(fork_round.candidates, tuned.space))
    return tuned, tuned.init(jax.random.key(0)), go


def candidates(space, forks, scores, *, kind=FAST, shift=0.3):
    """Candidates of a round whose forks, in the order of the names, have these scores; NaN where they failed."""
    tuned, ts, go = compiled(space)
    x, score = np.array(ts.round.x), np.full(ts.round.score.shape, np.nan, np.float32)
    steps, status = np.zeros(score.shape, np.int32), np.zeros(score.shape, np.int32)
    count = len(forks)
    x[:count], score[:count], steps[:count] = forks, scores, 30
    status[:count] = np.where(np.isfinite(scores), state.FORK_FINISHED, state.FORK_FAILED)
    row = int(np.flatnonzero((tuned.plan.kind == kind) & (tuned.plan.forks > 0))[0])
    held = ts.round._replace(
        index=jnp.int32(row), fork=jnp.int32(count - 1), x=x, score=score, steps=steps, status=status
    )
    found = go(ts._replace(round=held), jnp.full(tuned.space.dims, shift))
    return np.asarray(found.x), np.asarray(found.is_allowed)


def test_the_line_search_goes_outward_from_the_forks_that_have_run():
    x, allowed = candidates("rate", [[0.5]], [1.0])
    np.testing.assert_allclose(x[:, 0], [0.5 - STEP, 0.5 + STEP], atol=1e-6)
    assert allowed.all()
    x, _ = candidates("rate", [[0.5], [0.4], [0.6], [0.3]], [1.0, np.nan, 0.5, 0.7])
    np.testing.assert_allclose(x[:, 0], [0.3 - STEP, 0.6 + STEP], atol=1e-6)


def test_the_last_step_before_a_bound_is_taken_as_a_whole_and_none_beyond():
    x, allowed = candidates("rate", [[0.95], [0.06]], [1.0, 2.0])
    np.testing.assert_allclose(x[:, 0], [0.0, 1.0])
    assert allowed.all()
    _, allowed = candidates("rate", [[0.99], [0.0]], [1.0, 2.0])
    assert not allowed.any()


@pytest.mark.parametrize("options", [[1e-5, 1e-4, 1e-3, 1e-2, 1e-1], [3e-2, 1e-2, 3e-3, 1e-3], [1e-4, 2e-4, 1e-1]])
def test_the_next_fork_is_at_the_next_option(options):
    """However far apart the options are, and in whatever order they were given."""
    space = atn.SearchSpace({"learning_rate": options})
    line = functools.partial(fork_round.candidates, space)
    tuned = atn.AutoTuneNet(space, 1000)
    rising = sorted(options)

    def around(option):
        x = np.broadcast_to(space.encode({"learning_rate": option}), (state.MAX_FORKS, 1))
        steps = np.zeros(state.MAX_FORKS, np.int32)
        steps[0] = 30
        ts = tuned.init(jax.random.key(0))
        found = jax.jit(line)(ts._replace(round=ts.round._replace(x=x, steps=steps, fork=jnp.int32(0))), jnp.zeros(1))
        rates = space.decode(found.x)["learning_rate"]
        return [float(rate) if ok else None for rate, ok in zip(rates, found.is_allowed, strict=True)]

    for below, here, above in zip([None, *rising], rising, [*rising[1:], None], strict=False):
        assert around(here) == [option and pytest.approx(option) for option in (below, above)]


@pytest.mark.parametrize("decades", [-0.5, -1.0, 0.5])
def test_half_a_decade_changes_the_option(decades):
    space = atn.SearchSpace({"learning_rate": [1e-4, 1e-3, 1e-2, 1e-1]})
    moved = roles.roles_of(space).shifted(space.encode({"learning_rate": 1e-2}), decades)
    expected = 1e-3 if decades < 0 else 1e-1
    assert float(space.decode(moved)["learning_rate"]) == pytest.approx(expected)


def test_rates_move_together_by_the_same_decades():
    # bias_lr spans 4 decades, learning_rate 5.
    x, allowed = candidates("fast", [[0.5, 0.5, 0.7]], [1.0])
    np.testing.assert_allclose(x[0], [0.5 - 0.5 / 4, 0.5 - 0.5 / 5, 0.7], atol=1e-6)
    np.testing.assert_allclose(x[1], [0.5 + 0.5 / 4, 0.5 + 0.5 / 5, 0.7], atol=1e-6)
    assert allowed[:2].all() and not allowed[2:].any()


FORKS = np.array([[0.5, 0.5, 0.4], [0.375, 0.4, 0.4], [0.625, 0.6, 0.4]])


def test_what_else_is_searched_waits_until_the_rates_lie_between_worse_ones():
    assert candidates("fast", FORKS, [1.0, 2.0, 3.0])[1][2:].all()
    for scores in ([2.0, 1.0, 3.0], [2.0, 3.0, 1.0]):
        assert not candidates("fast", FORKS, scores)[1][2:].any()
    # A fork that failed is a worse one, and so is what lies beyond a bound.
    assert candidates("fast", FORKS, [1.0, 2.0, np.nan])[1][2:].all()
    assert candidates("fast", [[1.0, 1.0, 0.4], *FORKS], [1.0, 2.0, 3.0, 4.0])[1][2:].all()


@pytest.mark.parametrize("shift", [0.0, 0.37, 0.9])
@pytest.mark.parametrize("scores", [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
def test_proposals_stay_in_the_trust_region_about_the_best_fork(shift, scores):
    x, _ = candidates("fast", FORKS, scores, shift=shift)
    best, proposals = FORKS[int(np.argmin(scores))], x[2:]
    reach = np.array([0.75 / 4, 0.75 / 5, 0.3])
    assert len(proposals) == fork_round.PROPOSALS
    assert np.all(np.abs(proposals - best) <= reach + 1e-6)
    assert np.all((proposals >= 0.0) & (proposals <= 1.0))
    # They fill it.
    assert np.all(np.ptp(proposals, axis=0) > 0.8 * np.minimum(2 * reach, 1.0))


def test_slow_rounds_search_slow_dimensions_and_fast_rounds_the_others():
    forks = [[0.2, 0.5], [0.2, 0.4], [0.2, 0.6]]  # dropout, learning_rate
    x, allowed = candidates("both", forks[:1], [1.0], kind=SLOW)
    assert not allowed[:2].any() and allowed[2:].all()
    assert np.all(x[2:, 1] == np.float32(0.5)) and np.ptp(x[2:, 0]) > 0.9
    x, allowed = candidates("both", forks, [1.0, 2.0, 3.0])
    assert allowed.all()
    assert np.all(x[2:, 0] == np.float32(0.2)) and np.ptp(x[2:, 1]) > 0.2


def test_a_fast_hyperparameter_is_searched_where_there_is_no_rate():
    x, allowed = candidates("momentum", [[0.5]], [1.0])
    assert not allowed[:2].any() and allowed[2:].all()
    assert np.ptp(x[2:]) > 0.5


@pytest.mark.parametrize("options", [[8, 32, 128], [128, 8, 32]])
def test_batch_sizes_are_compared_at_equal_samples(options):
    tuned = atn.AutoTuneNet({"learning_rate": (1e-5, 1e-1), "batch_size": options}, total_steps=2000)
    ts = tuned.init(jax.random.key(0))

    def samples(size):
        x = tuned.space.encode({"learning_rate": 1e-3, "batch_size": size})
        return int(fork_round.length_at(tuned.space, ts, x)) * size

    found = [samples(size) for size in options]
    assert max(found) <= 1.05 * min(found)
    middle = tuned.space.encode({"learning_rate": 1e-3, "batch_size": 32})
    assert int(fork_round.length_at(tuned.space, ts, middle)) == int(tuned.plan.length[0])
