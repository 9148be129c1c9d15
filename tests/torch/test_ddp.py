"""Two real processes: one mean of the metrics, the same decisions, snapshots of each."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import distributed, serialization  # noqa: E402

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
    for mine, other in zip(a, b, strict=True):
        assert json.dumps(mine["rounds"]) == json.dumps(other["rounds"]) and len(mine["rounds"]) >= 2
        assert mine["values"] == other["values"] and mine["evals"] == other["evals"]
        assert mine["model"] == other["model"]
        assert mine["losses"] != other["losses"]  # each saw its own half of the data
        assert mine["accuracy"] > 0.8
    # The last snapshot was missing on one: both went back to the one before, and ended alike.
    assert a[0]["resumed"] == [] and a[1]["resumed"] == b[1]["resumed"] and 0 < a[1]["resumed"][0] < 256
    for first, second in ((a[0], a[1]), (b[0], b[1])):
        assert second["model"] == first["model"] and second["losses"] == first["losses"]
    for rank in range(2):
        assert (tmp_path / "run" / f"rank{rank}" / "index.json").exists()


@pytest.mark.parametrize(("steps", "expected"), [((20, 20), 20), ((20, 10), 10), ((20, 15), 10), ((20, -1), None)])
def test_resume_from_the_latest_step_that_all_have(tmp_path, monkeypatch, steps, expected):
    """``steps``: what this process has and what the other one has; the other has nothing between."""
    others = iter([steps[1], 10, 10])
    monkeypatch.setattr(distributed, "gather", lambda mine: [(mine,), (min(mine, next(others)),)])
    with atn.Snapshots(tmp_path / "run") as store:
        for step in (10, 20):
            serialization.save(store, step, {"step": step}, wait=True)
        found = serialization.restore_together(store)
    assert (found and found[1]["step"]) == expected


def test_what_is_a_number_and_what_is_none():
    tensors = (torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.bfloat16))
    for value in (0.5, *tensors, np.float64(0.5), np.array([[0.5]])):
        assert distributed.to_float(value, name="loss") == 0.5
    for value in ("0.5", None, np.ones(2), torch.ones(2), torch.tensor(1j)):
        with pytest.raises(TypeError, match="loss must be a"):
            distributed.to_float(value, name="loss")
