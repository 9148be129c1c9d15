"""Two real processes: one mean of the metrics, the same decisions, snapshots of each."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

WORKER = pathlib.Path(__file__).with_name("ddp_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_decide_alike(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store"), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        said, _ = worker.communicate(timeout=110)
        assert worker.returncode == 0, said
    a, b = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert json.dumps(a["rounds"]) == json.dumps(b["rounds"]) and len(a["rounds"]) >= 2
    assert a["values"] == b["values"] and a["evals"] == b["evals"]
    assert a["model"] == b["model"]
    assert a["losses"] != b["losses"]  # each saw its own half of the data
    assert a["accuracy"] > 0.8
    for rank in range(2):
        assert (tmp_path / "run" / f"rank{rank}" / "index.json").exists()
