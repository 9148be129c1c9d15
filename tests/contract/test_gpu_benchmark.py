"""The benchmark of a device runs unattended wherever there is one, a CPU included."""

import pytest

from benchmarks import gpu


@pytest.mark.soak
def test_the_short_form_measures_all_there_is():
    rows = gpu.table(gpu.SHORT, minutes=5.0)
    assert not any("left out" in value for _, value in rows)
    text = gpu.markdown(rows, 1.0)
    for what in (
        "step aimed at 0.2 ms",
        "its compilation",
        "a decision on",
        "in host memory",
        "`fit` of as many, with",
    ):
        assert what in text
    assert "with 0 rounds" not in text
    assert all(line.count("|") == 3 for line in text.splitlines()[2:])


def test_what_does_not_fit_into_the_time_is_named():
    assert {value for _, value in gpu.table(gpu.SHORT, minutes=-1.0)} == {"left out: the time is up"}
