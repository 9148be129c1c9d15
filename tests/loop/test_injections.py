"""Whatever breaks a run off, what is resumed ends bit for bit as if nothing had; the benchmark breaks off hundreds."""

import pytest

from benchmarks import injections


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_faults_of_several_kinds():
    table = injections.campaign(28, seed=2)
    assert sum(row[0] for row in table.values()) == 28
    assert {name: row for name, row in table.items() if row[2]} == {}
    assert sum(row[1] for row in table.values()) >= 20
