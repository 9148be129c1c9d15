"""Whatever breaks a run off, what is resumed ends bit for bit as if nothing had; the benchmark breaks off hundreds."""

import pytest

from benchmarks import injections


# The three break off by memory that runs out in a decision and in a step, and by two signals in a callback.
@pytest.mark.parametrize(("count", "seed", "least"), [(3, 8, 2), pytest.param(28, 2, 20, marks=pytest.mark.soak)])
@pytest.mark.filterwarnings("ignore")
def test_faults_of_several_kinds(count, seed, least):
    table = injections.campaign(count, seed=seed)
    assert sum(row[0] for row in table.values()) == count
    assert {name: row for name, row in table.items() if row[2]} == {}
    assert sum(row[1] for row in table.values()) >= least
