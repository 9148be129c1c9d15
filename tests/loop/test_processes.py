"""Two real processes that train one state: the same decisions, one stop for both, and snapshots for any number."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.loop import process_worker as worker

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def launch(folder, world, how):
    """Starts processes, waits until one has ended, and returns how they ended and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "process_worker.py"), str(rank), str(world), port, str(folder), how],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        # One that fails leaves the others waiting: whoever ends first is heard first.
        while all(process.poll() is None for process in processes):
            time.sleep(0.1)
        heard = {}
        for process in sorted(processes, key=lambda process: process.poll() is None):
            said, _ = process.communicate(timeout=60)
            heard[process.args[2]] = process.returncode, said[-3000:]
        return [heard[str(rank)] for rank in range(world)]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_decide_alike_stop_together_and_go_on_as_one(tmp_path, monkeypatch):
    for code, said in launch(tmp_path, 2, "stopped"):
        assert code == 0, said
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for mine, other in zip(first, second, strict=True):
        assert {**mine, "parts": ()} == {**other, "parts": ()}
        assert mine["parts"] != other["parts"]
    whole, stopped, resumed = first
    assert sum(len(row["forks"]) for row in whole["rounds"]) >= 3
    assert stopped["is_interrupted"] and 50 < stopped["steps"] < 160
    # Whoever was asked: both stopped at one step, and went on as if nothing had been.
    assert {**resumed, "parts": ()} == {**whole, "parts": ()} and resumed["parts"] == whole["parts"]
    assert second[2]["parts"] == second[0]["parts"]
    alone = _gone_on_alone(tmp_path / "copy", monkeypatch)
    assert alone["steps"] == 160
    assert [row["chosen"] for row in alone["rounds"]] == [row["chosen"] for row in whole["rounds"]]
    np.testing.assert_allclose(alone["losses"], whole["losses"], rtol=1e-3, atol=1e-5)
    assert alone["eval"] == pytest.approx(whole["eval"], rel=1e-2)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_one_of_three_processes_is_killed_and_all_go_on_to_the_same_end(tmp_path):
    codes = [code for code, _ in launch(tmp_path, 3, "killed")]
    # None of the others waits for ever, or thinks that it has finished.
    assert codes[1] == -9 and 0 not in codes
    for code, said in launch(tmp_path, 3, "again"):
        assert code == 0, said
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for resumed, whole in told:
        assert resumed == whole and resumed["steps"] == 160
        assert {**resumed, "parts": ()} == {**told[0][0], "parts": ()}


def _gone_on_alone(folder, monkeypatch):
    """This process goes on from what the two have saved."""
    worker.toy.lighten(monkeypatch.setattr)
    return worker.told(
        worker.fit(worker.new_state(), lambda step, hp: worker.rows(step), snapshots=folder, resume=True)
    )
