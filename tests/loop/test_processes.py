"""Two real processes that train one state: the same decisions, one stop for both, and snapshots for any number."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
PATHS = (HERE.parent / "contract", HERE)


def test_two_processes_decide_alike_stop_together_and_go_on_as_one(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "process_worker.py"), str(rank), "2", port, str(tmp_path)],
            env=environment, cwd=HERE.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        # One that fails leaves the others waiting: whoever ends first is heard first.
        while all(process.poll() is None for process in processes):
            time.sleep(0.1)
        for process in sorted(processes, key=lambda process: process.poll() is None):
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in processes:
            process.kill()
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


def _gone_on_alone(folder, monkeypatch):
    """This process goes on from what the two have saved."""
    for path in PATHS:
        monkeypatch.syspath_prepend(path)
    monkeypatch.delitem(sys.modules, "conftest", raising=False)
    spec = importlib.util.spec_from_file_location("process_worker", HERE / "process_worker.py")
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.toy.lighten(monkeypatch.setattr)
    return worker.told(
        worker.fit(worker.new_state(), lambda step, hp: worker.rows(step), snapshots=folder, resume=True)
    )
