"""The same run, the same bits: decisions, hyperparameters and final states as they were recorded."""

import json
import pathlib

import pytest

from tests.golden import runs

RECORDED = json.loads(pathlib.Path(__file__).with_name("recorded.json").read_text())


@pytest.mark.skipif(RECORDED["machine"] != runs.machine(), reason="recorded with another processor or software")
@pytest.mark.parametrize("name", runs.RUNS)
def test_the_run_is_the_recorded_one(name):
    if name.startswith("torch"):
        pytest.importorskip("torch")
    found = json.loads(json.dumps(runs.RUNS[name]()))
    # Piece by piece, so that a failure says where the run went another way.
    for part, value in RECORDED["runs"][name].items():
        assert found[part] == value, part
