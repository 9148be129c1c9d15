"""What exists because of XLA changes how long things take, and nothing else."""

import json
import os
import subprocess
import sys

import pytest

from autotunenet_jax.compiler import switches

PROGRAM = """
from tests import conftest
import json
from tests.golden import runs
print(json.dumps([runs.fit_several(), runs.autotune_several()]))
"""


def outcome(off):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "AUTOTUNENET_COMPILER_OFF": off},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_run_without_any_of_it_decides_alike():
    (fitted, wrapped), (plain_fitted, plain_wrapped) = outcome(""), outcome("all")
    assert [row["kind"] for row in fitted["rounds"]] == ["fast", "fast", "slow"]
    for row, plain in zip(fitted["rounds"], plain_fitted["rounds"], strict=True):
        assert row.pop("chosen") == pytest.approx(plain.pop("chosen"), rel=1e-3)
        assert row == plain
    assert fitted["hyperparams"] == pytest.approx(plain_fitted["hyperparams"], rel=1e-3)
    assert wrapped["every_tenth"] == pytest.approx(plain_wrapped["every_tenth"], rel=1e-3)


def test_names_switch_one_thing_off_and_all_everything(monkeypatch):
    monkeypatch.setenv("AUTOTUNENET_COMPILER_OFF", "packing,blas_threads")
    assert [name for name in switches.SWITCHES if not switches.is_on(name)] == ["blas_threads", "packing"]
    monkeypatch.setenv("AUTOTUNENET_COMPILER_OFF", "all")
    assert not any(map(switches.is_on, switches.SWITCHES))
