"""Plans: rounds within the budget, for every budget and every space."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import autotunenet_jax as atn
from autotunenet_jax.controller import plan as planning

RECIPE = planning.Recipe()
RATE = {"learning_rate": (1e-5, 1.0)}
SPACES = {
    "rate": RATE,
    "rate and momentum": {**RATE, "momentum": (0.0, 0.99), "b2": (0.9, 0.999)},
    "fast": {"momentum": (0.0, 0.99)},
    "slow": {"dropout": (0.0, 0.5)},
    "both": {**RATE, "dropout": (0.0, 0.5)},
    "many": {f"fast_{i}": atn.Float(0.0, 1.0, role="fast") for i in range(12)},
}


def plan_of(space, total_steps, share=None):
    return planning.make(atn.SearchSpace(SPACES[space]), total_steps, recipe=RECIPE, share=share)


def rows(plan):
    names = ("start", "kind", "forks", "length", "range_test")
    held = [{name: int(getattr(plan, name)[i]) for name in names} for i in range(len(plan.start))]
    return [row for row in held if row["start"] < planning.NEVER]


@hypothesis.given(
    space=st.sampled_from(list(SPACES)),
    total_steps=st.one_of(st.integers(160, 3000), st.integers(3000, 10**7)),
    share=st.one_of(st.none(), st.floats(0.3, 0.9)),
)
def test_rounds_come_in_order_and_fit_into_the_run(space, total_steps, share):
    plan = plan_of(space, total_steps, share)
    held = rows(plan)
    assert held
    assert [row["start"] for row in held] == sorted(row["start"] for row in held)
    for row in held:
        assert row["forks"] <= planning.MAX_FORKS
        assert row["range_test"] <= planning.MAX_RANGE_TEST
        assert row["start"] + row["range_test"] + row["length"] < total_steps
    # Whatever the first round says, it may compare three forks.
    first = held[0]
    if first["range_test"] and first["forks"]:
        assert first["range_test"] + 2 * first["length"] <= float(plan.share) * total_steps * (1 + 1e-6)
    assert plan.start[-1] == planning.NEVER and plan.forks[-1] == 0
    assert 0 < int(plan.save_every) < total_steps
    assert 0 < int(plan.check_every) < total_steps


def test_a_run_of_a_thousand_steps_is_the_one_that_shares_are_of():
    first, second, *slow = rows(plan_of("both", 1000))
    assert first == {"start": 0, "kind": planning.FAST, "forks": 6, "length": 30, "range_test": 30}
    assert second == {"start": 120, "kind": planning.FAST, "forks": 4, "length": 40, "range_test": 0}
    assert slow == [
        {"start": start, "kind": planning.SLOW, "forks": 4, "length": 80, "range_test": 0} for start in (400, 650)
    ]
    assert int(plan_of("both", 1000).check_every) == 50


def test_a_run_without_room_for_three_forks_only_reads_the_rate():
    for total_steps in (40, 64, 100):
        (row,) = rows(plan_of("rate", total_steps))
        assert row["start"] == 0 and row["forks"] == 0
        assert 16 <= row["range_test"] <= float(plan_of("rate", total_steps).share) * total_steps + 1e-4
    assert [len(rows(plan_of("rate", total, 0.25))) for total in (220, 230)] == [1, 2]
    assert rows(plan_of("rate", 300))[0]["forks"] >= 3


def test_forks_have_steps_enough_to_tell_anything():
    for total_steps in (250, 400, 1000, 10_000):
        assert all(row["length"] >= 20 for row in rows(plan_of("both", total_steps)))


def test_the_share_that_may_be_discarded_falls_with_the_length_of_the_run():
    shares = [float(plan_of("rate", total).share) for total in (1000, 10_000, 100_000)]
    assert shares[0] == pytest.approx(0.25)
    assert np.all(np.diff(shares) < 0) and shares[-1] < 0.07

    def cost(total_steps):
        first, second = rows(plan_of("rate", total_steps))
        steps = [row["range_test"] + row["forks"] * row["length"] for row in (first, second)]
        return sum(steps) / total_steps

    costs = [cost(total) for total in (1000, 10_000, 100_000)]
    assert np.all(np.diff(costs) < 0) and costs[-1] < 0.3 * costs[0]
    assert float(plan_of("rate", 1000, 0.6).share) == pytest.approx(0.6)
    assert float(plan_of("both", 1000).share) == pytest.approx(0.45)


def test_only_what_is_tuned_has_rounds():
    kinds = {name: {row["kind"] for row in rows(plan_of(name, 1000))} for name in SPACES}
    assert kinds["rate"] == kinds["rate and momentum"] == kinds["fast"] == kinds["many"] == {planning.FAST}
    assert kinds["slow"] == {planning.SLOW}
    assert kinds["both"] == {planning.FAST, planning.SLOW}
    for name in SPACES:
        assert np.any(plan_of(name, 1000).range_test) == ("rate" in atn.SearchSpace(SPACES[name]).roles)


def test_more_fast_hyperparameters_may_take_more_forks():
    forks = [rows(plan_of(name, 1000))[0]["forks"] for name in ("rate", "rate and momentum", "many")]
    # The second round is left room for a fork.
    assert forks == [6, 7, planning.MAX_FORKS]


def test_a_short_run_compares_one_proposal_for_what_shows_slowly():
    def slow_forks(space, total_steps):
        return [row["forks"] for row in rows(plan_of(space, total_steps)) if row["kind"] == planning.SLOW]

    assert [slow_forks("both", total) for total in (100, 400, 740)] == [[2]] * 3
    assert [slow_forks("both", total) for total in (750, 10_000)] == [[4, 4]] * 2
    # Where nothing else is tuned the budget is all theirs.
    assert slow_forks("slow", 400) == [4, 4]


@pytest.mark.parametrize("name", ["rate", "fast", "slow", "both"])
def test_open_ended_rounds_come_at_doubling_intervals(name):
    plan = plan_of(name, None)
    starts = sorted({row["start"] for row in rows(plan)} - {0})
    assert len(starts) >= 10
    assert [b / a for a, b in itertools.pairwise(starts)] == [2.0] * (len(starts) - 1)
    for row in rows(plan):
        # A round's forks, all together, are a fraction of what was trained before it.
        assert row["start"] == 0 or row["forks"] * row["length"] < 0.5 * row["start"]
    assert plan.start[-1] == planning.NEVER


def test_plans_of_all_budgets_share_one_layout():
    layouts = {tuple((leaf.shape, leaf.dtype) for leaf in plan_of("both", total)) for total in (64, 10**6, None)}
    assert len(layouts) == 1


def test_a_run_too_short_is_refused():
    with pytest.raises(ValueError, match=r"at least 40 to tune anything; got 39.*Train longer"):
        plan_of("rate", 39)


def test_a_share_without_room_for_a_range_test_is_refused():
    with pytest.raises(
        ValueError, match=r"may take 1\.0 of 100 steps.*range test needs 16.*Raise max_share or total_steps"
    ):
        atn.AutoTuneNet(RATE, 100, max_share=0.01)
