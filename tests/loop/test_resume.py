"""Stopping, dying and going on."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import autotunenet_jax as atn
from tests import problem


def run(batches=problem.batches, **options):
    options = {"tuner": problem.tuner(), "eval_step": problem.eval_step, "progress": False, **options}
    return atn.fit(problem.train_step, problem.new_state(), batches, **options)


def interrupted_at(call, number):
    """Batches that send a signal to this process when they are asked for the ``call``-th time."""
    calls = 0

    def batches(step, hp):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return problem.batch(step)

    return batches


@pytest.fixture(scope="module")
def unstopped():
    return run()


@pytest.mark.parametrize(("call", "number"), [(3, signal.SIGINT), (17, signal.SIGTERM), (90, signal.SIGINT)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, unstopped, call, number):
    """In the sweep, in a fork, and in training."""
    handler = signal.getsignal(number)
    stopped = run(interrupted_at(call, number), snapshots=tmp_path)
    assert signal.getsignal(number) == handler
    assert stopped.is_interrupted
    assert int(stopped.tuner_state.step) < problem.TOTAL_STEPS
    assert np.isfinite(float(problem.eval_step(stopped.state)))

    resumed = run(snapshots=tmp_path, resume=True)
    assert not resumed.is_interrupted
    assert problem.same(resumed.state, unstopped.state)
    assert problem.same(resumed.tuner_state, unstopped.tuner_state)
    assert resumed.history.records == unstopped.history.records
    assert resumed.history.rounds == unstopped.history.rounds
    assert resumed.best_eval == unstopped.best_eval
    assert problem.same(resumed.best_state, unstopped.best_state)


def test_the_best_state_outlives_the_process_that_reached_it(tmp_path):
    """Validation is worse after the interruption, right after a reading, so that nothing later is better."""
    stopped = run(interrupted_at(121, signal.SIGTERM), snapshots=tmp_path)
    resumed = run(snapshots=tmp_path, resume=True, eval_step=lambda state: problem.eval_step(state) + 1.0)
    assert resumed.eval > stopped.best_eval
    assert resumed.best_eval == stopped.best_eval
    assert problem.same(resumed.best_state, stopped.best_state)


def test_a_loop_of_your_own_resumes_bit_for_bit(tmp_path):
    """The copies, the tuner's state and, with the directive obeyed, the position in the data are all there is."""
    tuner = problem.tuner()

    @jax.jit
    def step(copies, ts, batch):
        state, loss = problem.train_step(copies["state"], batch, tuner.hyperparams(ts))
        ts, said = tuner.update(ts, loss)
        saved = jax.lax.cond(said.save, lambda a, b: a, lambda a, b: b, state, copies["saved"])
        kept = jax.lax.cond(said.keep, lambda a, b: a, lambda a, b: b, state, copies["kept"])
        state = jax.lax.cond(said.restore, lambda a, b: b, lambda a, b: a, state, saved)
        state = jax.lax.cond(said.adopt, lambda a, b: b, lambda a, b: a, state, kept)
        return {"state": state, "saved": saved, "kept": kept}, ts

    def train(store=None, until=problem.TOTAL_STEPS):
        copies = {name: atn.copy_tree(problem.new_state()) for name in ("state", "saved", "kept")}
        ts = tuner.init(jax.random.key(0))
        if store is not None and store.latest() is not None:
            _, (copies, ts) = store.restore((copies, ts))
        while int(ts.step) < until:
            copies, ts = step(copies, ts, problem.batch(int(ts.data_step)))
        if store is not None:
            store.save(int(ts.step), (copies, ts), wait=True)
        return copies, ts

    expected = train()
    for until in (33, 120, problem.TOTAL_STEPS):
        with atn.Snapshots(tmp_path, space=tuner.space) as store:
            reached = train(store, until)
    assert problem.same(reached, expected)


def test_an_iterable_is_read_up_to_where_the_run_stood(tmp_path, unstopped):
    everything = [problem.batch(i) for i in range(problem.TOTAL_STEPS)]

    def one_after_the_other():
        for number, batch in enumerate(everything):
            if number == 40:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    assert run(one_after_the_other(), snapshots=tmp_path).is_interrupted
    assert problem.same(run(list(everything), snapshots=tmp_path, resume=True).state, unstopped.state)


def test_resuming_a_finished_run_gives_its_result_again(tmp_path, unstopped):
    run(snapshots=tmp_path)
    again = run(snapshots=tmp_path, resume=True)
    assert problem.same(again.state, unstopped.state)
    assert again.eval == unstopped.eval


def test_resuming_from_an_empty_folder_starts_at_the_beginning(tmp_path, unstopped):
    assert problem.same(run(snapshots=tmp_path / "new", resume=True).state, unstopped.state)


def test_snapshots_of_another_search_space_are_refused(tmp_path):
    run(interrupted_at(17, signal.SIGTERM), snapshots=tmp_path)
    other = atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, problem.TOTAL_STEPS)
    with pytest.raises(ValueError, match="space"):
        run(snapshots=tmp_path, resume=True, tuner=other)


def test_another_budget_is_refused_by_name_or_gone_on_to(tmp_path):
    stopped = run(interrupted_at(17, signal.SIGTERM), snapshots=tmp_path)
    longer = {"tuner": problem.tuner().with_total_steps(2 * problem.TOTAL_STEPS), "snapshots": tmp_path}
    told = f"plan: total_steps was {problem.TOTAL_STEPS}, and is {2 * problem.TOTAL_STEPS} here.*resume=.extend."
    with pytest.raises(ValueError, match=told):
        run(resume=True, **longer)
    result = run(resume="extend", **longer)
    assert result.history.summary["steps"] == result.history.summary["total_steps"] == 2 * problem.TOTAL_STEPS
    assert [event["step"] for event in result.history.events if event["kind"] == "extended"] == [
        stopped.history.summary["steps"]
    ]
    assert result.best_eval <= stopped.best_eval
    # What is of this budget already is resumed as ever.
    again = run(resume="extend", **longer)
    assert problem.same(again.state, result.state)
    assert again.history.events == result.history.events


def test_an_error_in_a_callback_loses_nothing(tmp_path, unstopped):
    def fails(_):
        raise RuntimeError("the callback's own problem")

    with pytest.raises(RuntimeError, match="own problem"):
        run(snapshots=tmp_path, callbacks=[fails])
    with atn.Snapshots(tmp_path, space=problem.tuner().space) as store:
        assert store.latest() is not None
    assert problem.same(run(snapshots=tmp_path, resume=True).state, unstopped.state)


def test_the_best_state_is_kept(unstopped):
    settled = [row["value"] for row in unstopped.history.evals if row["is_settled"]]
    assert unstopped.best_eval == min(settled)
    assert float(jax.jit(problem.eval_step)(unstopped.best_state)) == pytest.approx(unstopped.best_eval, rel=1e-5)


_VICTIM = """
import sys, time
import orbax.checkpoint  # the first save would wait for it, and no kill meet a snapshot
import autotunenet_jax as atn
from tests import problem

def batches(step, hp):
    time.sleep(0.01)
    print(step, flush=True)
    return problem.batch(step)

store = atn.Snapshots(sys.argv[1], space=problem.tuner().space, interval_s=0.02, overhead=0.9)
print(store.latest() or 0, flush=True)
atn.fit(problem.train_step, problem.new_state(), batches, tuner=problem.tuner(), eval_step=problem.eval_step,
        snapshots=store, resume=True, progress=False)
store.close()
"""


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.soak)])
def test_a_killed_process_goes_on_bit_for_bit(tmp_path, unstopped, kills):
    """Killed in the sweep, in forks and in training, and while it saves; the benchmark kills more often."""
    rng = np.random.default_rng(0)
    resumed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        # Counted in steps: the time until all is compiled says nothing of where the process stands.
        said = [process.stdout.readline() for _ in range(int(rng.integers(25, 60)))]
        resumed += int(said[0] or 0) > 0
        time.sleep(float(rng.uniform(0.0, 0.05)))
        process.kill()
        process.wait()
        process.stdout.close()
    assert resumed >= kills // 2
    assert problem.same(run(snapshots=tmp_path, resume=True).state, unstopped.state)


# What is said, and what is saved.


def test_a_run_that_is_stopped_says_so_without_a_progress_line(caplog):
    result = run(interrupted_at(57, signal.SIGTERM))
    messages = [event["message"] for event in result.history.events if event["kind"] == "stop"]
    assert len(messages) == 1 and "SIGTERM" in messages[0] and f"of {problem.TOTAL_STEPS} steps" in messages[0]
    said = [record.getMessage() for record in caplog.records if record.name == "autotunenet"]
    assert len(said) == 1 and said[0].endswith(messages[0])


def test_a_snapshots_metric_is_that_of_its_state(tmp_path):
    """Readings come every eighth step, the signal in between, or right at one."""
    for number, step in enumerate((121, 125)):
        folder = tmp_path / str(number)
        result = run(interrupted_at(step, signal.SIGTERM), snapshots=folder)
        with atn.Snapshots(folder, read_only=True) as store:
            record = store.records()[-1]
        here = float(jax.jit(problem.eval_step)(result.state))
        measured = [row["value"] for row in result.history.evals if row["step"] == record.step and row["is_settled"]]
        assert record.metric is None or record.metric == pytest.approx(here, rel=1e-5)
        assert (record.metric is None) == (record.step % 8 != 0) and measured
        assert record.status == "healthy"


def test_an_eval_step_that_comes_or_goes_is_named(tmp_path):
    for number, first in enumerate((problem.eval_step, None)):
        folder = tmp_path / str(number)
        run(interrupted_at(57, signal.SIGTERM), snapshots=folder, eval_step=first)
        with pytest.raises(atn.SnapshotMismatchError, match="eval_step"):
            run(snapshots=folder, resume=True, eval_step=None if first else problem.eval_step)


def test_a_result_can_be_looked_at(unstopped):
    text = repr(unstopped)
    assert len(text.splitlines()) <= 10 and len(text) < 1500
    assert "learning_rate" in text and "complete after 160 steps" in text


def test_the_end_is_the_best_reading_of_the_run(unstopped):
    settled = [row["value"] for row in unstopped.history.evals if row["is_settled"]]
    assert unstopped.eval == min(settled) == unstopped.best_eval
    assert problem.same(unstopped.state, unstopped.best_state)
