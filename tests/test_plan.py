"""Plans: rounds within the budget, for every budget and every space."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import autotunenet_jax as atn
from autotunenet_jax import _plan

RECIPE = _plan.Recipe()
SPACES = {
    "rate": {"learning_rate": (1e-5, 1.0)},
    "rate and momentum": {"learning_rate": (1e-5, 1.0), "momentum": (0.0, 0.99), "b2": (0.9, 0.999)},
    "fast": {"momentum": (0.0, 0.99)},
    "slow": {"dropout": (0.0, 0.5)},
    "both": {"learning_rate": (1e-5, 1.0), "dropout": (0.0, 0.5)},
    "many": {f"fast_{i}": atn.Float(0.0, 1.0, role="fast") for i in range(12)},
}


def plan_of(space, total_steps, share=None):
    return _plan.make(atn.SearchSpace(space), total_steps, recipe=RECIPE, share=share)


def rows(plan):
    return [
        {name: int(getattr(plan, name)[i]) for name in _plan.Plan._fields[:6]}
        for i in range(len(plan.start))
        if plan.start[i] < _plan.NEVER
    ]


@hypothesis.given(
    space=st.sampled_from(list(SPACES.values())),
    total_steps=st.one_of(st.integers(64, 3000), st.integers(3000, 10**7)),
    share=st.one_of(st.none(), st.floats(0.1, 0.9)),
)
def test_rounds_fit_into_the_run_and_the_cap(space, total_steps, share):
    plan = plan_of(space, total_steps, share)
    held = rows(plan)
    assert held
    assert [row["start"] for row in held] == sorted(row["start"] for row in held)
    for row in held:
        assert 2 <= row["forks"] <= _plan.MAX_FORKS
        assert 2 <= row["early"] <= row["late"]
        assert 0 <= row["start"] < total_steps
        assert row["start"] + row["sweep"] + row["late"] < total_steps
        if row["kind"] == _plan.FAST:
            worst = row["sweep"] + (row["forks"] - 1) * row["late"]
            assert worst <= float(plan.share) * total_steps * (1 + 1e-6)
    assert 0 < float(plan.share) < 1
    assert 0 < int(plan.save_every) < total_steps


@pytest.mark.parametrize("share", [0.02, 0.05])
@pytest.mark.parametrize("total_steps", [200, 1000, 10_000, 100_000])
def test_a_small_share_is_kept_to(total_steps, share):
    for space in SPACES.values():
        for row in rows(plan_of(space, total_steps, share)):
            if row["kind"] == _plan.FAST:
                assert row["sweep"] + (row["forks"] - 1) * row["late"] <= share * total_steps * (1 + 1e-6)


def test_a_share_without_room_for_a_fork_is_refused():
    with pytest.raises(ValueError, match=r"may take 1\.0 of 100 steps.*Raise max_share or total_steps"):
        atn.AutoTuneNet(SPACES["rate"], 100, max_share=0.01)


def test_a_run_too_short_for_a_round_is_refused():
    with pytest.raises(ValueError, match=r"at least 64 to hold one round of forks; got 63.*Train longer"):
        plan_of(SPACES["rate"], 63)
    assert rows(plan_of(SPACES["rate"], 64))


@pytest.mark.parametrize("name", ["rate", "fast", "slow", "both"])
def test_open_ended_rounds_come_at_doubling_intervals(name):
    plan = plan_of(SPACES[name], None)
    starts = sorted({row["start"] for row in rows(plan)} - {0})
    assert len(starts) >= 10
    assert [b / a for a, b in itertools.pairwise(starts)] == [2.0] * (len(starts) - 1)
    for row in rows(plan):
        # A round's forks, all together, are a fraction of what was trained before it.
        assert row["start"] == 0 or row["forks"] * row["late"] < 0.5 * row["start"]
    assert plan.start[-1] == _plan.NEVER  # a run that has held every round waits there


def test_an_open_ended_first_round_keeps_to_its_share():
    first = rows(plan_of(SPACES["rate"], None, 0.05))[0]
    generous = rows(plan_of(SPACES["rate"], None, 0.5))[0]
    assert first["late"] < generous["late"]


def test_only_what_is_tuned_has_rounds():
    kinds = {name: {row["kind"] for row in rows(plan_of(space, 1000))} for name, space in SPACES.items()}
    assert kinds["fast"] == kinds["many"] == {_plan.FAST}
    assert kinds["rate"] == {_plan.FAST, _plan.RAISE}
    assert kinds["slow"] == {_plan.SLOW}
    assert kinds["both"] == {_plan.FAST, _plan.RAISE, _plan.SLOW}
    for name in ("slow", "fast", "many"):  # only rates are swept
        assert not np.any(plan_of(SPACES[name], 1000).sweep)
    assert np.any(plan_of(SPACES["rate"], 1000).sweep)


def test_slow_rounds_come_later_and_run_longer():
    held = rows(plan_of(SPACES["both"], 1000))
    fast = [row for row in held if row["kind"] == _plan.FAST]
    slow = [row for row in held if row["kind"] == _plan.SLOW]
    assert max(row["start"] for row in fast) < min(row["start"] for row in slow)
    assert max(row["late"] for row in fast) < min(row["late"] for row in slow)


def test_rates_are_raised_between_the_first_round_and_the_slow_ones():
    kinds = [row["kind"] for row in rows(plan_of(SPACES["both"], 1000))]
    assert kinds[:2] == [_plan.FAST, _plan.RAISE] and set(kinds[2:]) == {_plan.SLOW}
    # However often raising pays, steps are left for the slow rounds.
    plan = plan_of(SPACES["both"], 1000)
    first, raises, slow = rows(plan)[:3]
    worst = first["sweep"] + first["forks"] * first["late"] + (raises["forks"] - 1) * raises["late"]
    assert worst + slow["late"] <= float(plan.share) * 1000
    # Forks of a few steps tell nothing: a run so short holds no such round, nor does one without an end.
    for total_steps in (200, None):
        assert _plan.RAISE not in {row["kind"] for row in rows(plan_of(SPACES["rate"], total_steps))}


def test_a_fast_round_costs_less_than_proportionally_more_in_a_longer_run():
    def cost(total_steps):
        row = rows(plan_of(SPACES["rate"], total_steps))[0]
        return (row["sweep"] + row["forks"] * row["late"]) / total_steps

    assert cost(100_000) < 0.6 * cost(1000)


def test_plans_of_all_budgets_share_one_layout():
    layouts = {
        tuple((leaf.shape, leaf.dtype) for leaf in plan_of(SPACES["both"], total)) for total in (64, 10**6, None)
    }
    assert len(layouts) == 1


def test_a_short_run_compares_one_proposal_for_what_shows_slowly():
    def slow_forks(space, total_steps):
        return [row["forks"] for row in rows(plan_of(SPACES[space], total_steps)) if row["kind"] == _plan.SLOW]

    assert [slow_forks("both", total) for total in (100, 400, 700)] == [[2]] * 3
    assert [slow_forks("both", total) for total in (750, 10_000)] == [[4, 4]] * 2
    # Where nothing else is tuned the budget is all theirs.
    assert slow_forks("slow", 400) == [4, 4]
