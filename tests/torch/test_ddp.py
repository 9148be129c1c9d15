"""Two real processes: one mean of the metrics, the same decisions, snapshots of each."""

import json
import pathlib
import runpy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import AutoTuneNet, distributed, serialization  # noqa: E402

launch = runpy.run_path(str(pathlib.Path(__file__).with_name("processes.py")))["launch"]
pytestmark = pytest.mark.timeout(300)
needs_processes = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


def results(folder, name="rank"):
    return [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(2)]


@needs_processes
def test_two_processes_decide_alike(tmp_path):
    codes, said = launch("ddp_worker.py", tmp_path)
    assert codes == [0, 0], said
    a, b = results(tmp_path)
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


@needs_processes
@pytest.mark.soak
def test_a_process_whose_data_end_early_follows_the_others(tmp_path):
    codes, said = launch("uneven_worker.py", tmp_path, "join")
    assert codes == [0, 0], said
    a, b = results(tmp_path)
    assert a == b and a["is_free"]
    assert a["steps"] == 160 and len(a["rounds"]) >= 1 and a["evals"][-1] == 160
    assert a["loss"] < 0.3


@needs_processes
@pytest.mark.soak
def test_processes_with_other_budgets_are_refused(tmp_path):
    codes, said = launch("uneven_worker.py", tmp_path, "other budgets")
    assert 0 not in codes and all("total_steps 160 on rank 0, 130 on rank 1" in text for text in said)


@needs_processes
@pytest.mark.parametrize("how", ["whole", "killed"])
@pytest.mark.soak
def test_a_sharded_training_is_killed_and_goes_on_to_the_same_end(tmp_path, how):
    """Each rank has its part of the model, of every copy and of every snapshot."""
    pytest.importorskip("torch.distributed.fsdp", reason="without fully_shard")
    codes, said = launch("sharded_worker.py", tmp_path, how)
    assert (codes == [0, 0]) if how == "whole" else (codes[1] == -9 and codes[0] > 0), said
    whole = results(tmp_path, "whole")
    for name in ("rounds", "evals", "rates", "model", "skipped"):
        assert whole[0][name] == whole[1][name]
    assert len(whole[0]["rounds"]) >= 2 and min(rank["accuracy"] for rank in whole) > 0.9
    # Neither has all of it, and a gradient that is not finite in the part of one is a step that none takes.
    assert [rank["held"]["0.weight"] for rank in whole] == [[9, 6], [8, 6]] and whole[0]["skipped"] == 1
    if how == "whole":
        return
    (tmp_path / "store").unlink()
    codes, said = launch("sharded_worker.py", tmp_path, "again")
    assert codes == [0, 0], said
    for first, again in zip(whole, results(tmp_path), strict=True):
        assert again["resumed"] and 100 < again["resumed"][0] <= 165
        assert {**again, "resumed": []} == first


def test_other_ways_of_sharding_are_refused_by_name():
    class FullyShardedDataParallel(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(FullyShardedDataParallel(2, 1))
    tuner = AutoTuneNet({"learning_rate": (1e-3, 1.0)}, total_steps=100)
    with pytest.raises(ValueError, match=r"0 is a FullyShardedDataParallel.*fully_shard"):
        tuner.attach(model, torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize(("steps", "expected"), [((20, 20), 20), ((20, 10), 10), ((20, 15), 10), ((20, -1), None)])
def test_resume_from_the_latest_step_that_all_have(tmp_path, monkeypatch, steps, expected):
    """``steps``: what this process has and what the other one has; the other has nothing between."""
    others = iter([steps[1], 10, 10])
    monkeypatch.setattr(distributed, "gather", lambda mine, failed: [(mine, failed), (min(mine, next(others)), False)])
    with atn.Snapshots(tmp_path / "run") as store:
        for step in (10, 20):
            serialization.save(store, step, {"step": step}, wait=True)
        found = serialization.restore_together(store)
    assert (found and found[1]["step"]) == expected


@pytest.mark.parametrize("is_mine", [True, False])
def test_snapshots_that_are_damaged_on_one_process_end_all(tmp_path, monkeypatch, is_mine):
    told = []

    def gather(mine, failed):
        told.append(failed)
        return [(mine, failed), (10, not is_mine)]

    monkeypatch.setattr(distributed, "gather", gather)
    with atn.Snapshots(tmp_path / "run") as store:
        serialization.save(store, 10, {"step": 10}, wait=True)
        if is_mine:
            for file in (tmp_path / "run").rglob("manifest*"):
                file.write_bytes(b"damage")
        says = "No sound snapshot" if is_mine else "Rank 1 has no sound snapshot"
        with pytest.raises(atn.SnapshotDamagedError, match=says), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            serialization.restore_together(store)
    # The others have been told before it ends here.
    assert told == [is_mine]


def test_what_is_a_number_and_what_is_none():
    tensors = (torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.bfloat16))
    for value in (0.5, *tensors, np.float64(0.5), np.array([[0.5]])):
        assert distributed.to_float(value, name="loss") == 0.5
    for value in ("0.5", None, np.ones(2), torch.ones(2), torch.tensor(1j)):
        with pytest.raises(TypeError, match="loss must be a"):
            distributed.to_float(value, name="loss")
