import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax import faults


def train_step(state, batch, hp):
    x, _labels = batch
    return {"w": state["w"] - hp["rate"] * x.mean(), "n": state["n"] + 1}, x.sum()


def batch_at(step, hp):
    return np.full(4, step + 1, np.float32), np.arange(3)


HP = {"rate": np.float32(0.1)}


def run(plan, steps=6, **options):
    step, batches = faults.inject(train_step, batch_at, plan, **options)
    traces = []

    @jax.jit
    def counted(*args):
        traces.append(None)
        return step(*args)

    state, losses = {"w": jnp.zeros(2), "n": jnp.asarray(0, jnp.int32)}, []
    for i in range(steps):
        state, loss = counted(state, batches(i, HP), HP)
        losses.append(float(loss))
    assert len(traces) == 1
    return state, losses


SOUND = [4.0 * (i + 1) for i in range(6)]


@pytest.mark.parametrize(("fault", "loss"), [("nan", np.nan), ("inf", np.inf), ("huge", 1e30), ("spike", 12e3)])
def test_a_loss_goes_wrong_at_its_step_only(fault, loss):
    state, losses = run({2: fault})
    np.testing.assert_allclose(losses, [*SOUND[:2], loss, *SOUND[3:]], rtol=1e-6)
    assert np.isfinite(state["w"]).all()
    assert state["n"] == 6


def test_an_empty_plan_changes_nothing():
    assert run({})[1] == SOUND


@pytest.mark.parametrize("fault", ["poison", "nan_batch"])
def test_a_state_is_lost(fault):
    state, losses = run({2: fault})
    assert np.isnan(state["w"]).all()
    assert state["n"] == 6
    assert np.isnan(losses[2]) == (fault == "nan_batch")


def test_a_state_is_wrecked_but_finite():
    state, losses = run({2: "wreck"}, steps=3)
    sound, _ = run({}, steps=3)
    assert losses == SOUND[:3]
    np.testing.assert_allclose(state["w"], 30.0 * sound["w"], rtol=1e-6)
    assert state["n"] == 3


def test_labels_are_reversed_and_inputs_left_alone():
    _, batches = faults.inject(train_step, iter([batch_at(0, HP), batch_at(1, HP)]), {1: "flip_labels"})
    (first, _), (second, _) = batches
    assert first[1].tolist() == [0, 1, 2]
    assert second[1].tolist() == [2, 1, 0]
    np.testing.assert_array_equal(second[0], np.full(4, 2.0))


@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_step_asked_for_again(is_repeated):
    _, batches = faults.inject(train_step, batch_at, {0: "nan_batch"}, is_repeated=is_repeated)
    assert np.isnan(batches(0, HP)[0][0]).all()
    assert np.isnan(batches(0, HP)[0][0]).all() == is_repeated


def test_a_step_that_runs_out_of_memory_fails_and_the_next_does_not():
    step, batches = faults.inject(train_step, batch_at, {1: "oom"})
    step = jax.jit(step)
    state = {"w": jnp.zeros(2), "n": jnp.asarray(0, jnp.int32)}
    jax.block_until_ready(step(state, batches(0, HP), HP))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        jax.block_until_ready(step(state, batches(1, HP), HP))
    assert float(step(state, batches(2, HP), HP)[1]) == SOUND[2]


def test_unknown_faults_are_refused():
    with pytest.raises(ValueError, match="'gremlin'"):
        faults.inject(train_step, batch_at, {1: "gremlin"})


@pytest.mark.parametrize("how", faults.CORRUPTIONS)
def test_corrupt(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    faults.corrupt(path, how, seed=3)
    if how == "delete":
        assert not path.exists()
        return
    data = path.read_bytes()
    assert len(data) == {"truncate": 5, "empty": 0, "flip": 10}[how]
    if how == "flip":
        changed = int.from_bytes(data, "big") ^ int.from_bytes(b"0123456789", "big")
        assert changed.bit_count() == 1


def test_corrupt_needs_something_to_corrupt(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="0 bytes"):
        faults.corrupt(tmp_path / "empty", "flip")


def test_failing_writes_fail_and_then_work_again(tmp_path):
    path = tmp_path / "file"
    with faults.failing_writes(limit_bytes=4), pytest.raises(OSError, match="File too large"), path.open("wb") as file:
        file.write(b"12345")
    path.write_bytes(b"12345")


def test_a_read_only_folder_is_writable_afterwards(tmp_path):
    try:
        with faults.read_only_folder(tmp_path), pytest.raises(OSError, match=r"Read-only|Permission"):
            (tmp_path / "file").touch()
    except OSError as error:
        pytest.skip(str(error))
    (tmp_path / "file").touch()


def test_slow_disk_and_clock_jump(tmp_path):
    start = time.monotonic()
    with faults.slow_disk(delay_s=0.05), (tmp_path / "file").open("wb") as file:
        os.fsync(file.fileno())
    assert time.monotonic() - start >= 0.05
    now = time.time()
    with faults.clock_jump(seconds=-1e6):
        assert time.time() < now - 9e5
    assert time.time() >= now


def test_kill_after_kills():
    code = "import time; from autotunenet_jax import faults; faults.kill_after(0.0); time.sleep(30)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=25).returncode == -signal.SIGKILL


def test_a_kill_called_off():
    timer = faults.kill_after(0.1)
    timer.cancel()
    timer.join()
    time.sleep(0.15)
