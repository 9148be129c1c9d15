"""A run from an absurd start, as a user sees it."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.loop import run
from tests import history_fields, problem


@pytest.fixture(scope="module")
def result():
    return atn.fit(
        problem.train_step,
        problem.new_state(),
        problem.batches,
        tuner=problem.tuner(),
        eval_step=problem.eval_step,
        progress=False,
    )


@pytest.fixture(scope="module")
def by_loss():
    """The same without validation, so that nothing of training is undone."""
    return atn.fit(problem.train_step, problem.new_state(), problem.batches, tuner=problem.tuner(), progress=False)


def plain(rate):
    state = problem.new_state()
    step = jax.jit(problem.train_step)
    for i in range(problem.TOTAL_STEPS):
        decayed = jnp.float32(rate * (1.0 - i / problem.TOTAL_STEPS))
        state, _ = step(state, problem.batch(i), {"learning_rate": decayed})
    return float(problem.eval_step(state))


def test_an_absurd_rate_is_repaired_within_the_budget(result):
    losses = {rate: plain(rate) for rate in (1e-5, 1e-2, 3e-2, 1e-1, 3e-1)}
    assert result.eval < 0.05 * losses[1e-5]
    assert result.eval < 1.5 * min(losses.values())
    assert result.hyperparams["learning_rate"] > 1e-3


def test_exactly_the_budget_is_spent(result):
    assert [row["step"] for row in result.history.records] == list(range(1, problem.TOTAL_STEPS + 1))
    assert int(result.tuner_state.step) == problem.TOTAL_STEPS


def test_the_share_spent_on_forks_is_capped_and_reported(by_loss):
    summary = by_loss.history.summary
    lost = sum(not row["is_kept"] for row in by_loss.history.records)
    assert summary["discarded_steps"] == lost and summary["undone_steps"] == 0
    assert 0 < summary["share_discarded"] <= 0.4


def test_steps_gone_back_over_are_no_forks(result):
    """The run went back to its best state at the end, and says what that undid."""
    _, undone = history_fields.check_price(result.history)
    assert (undone > 0) == any(event["kind"] == "retreat" for event in result.history.events)


def test_the_final_state_saw_every_batch_once_and_in_order(by_loss):
    """Forks replay the same data, and the winner's state goes on where its fork ended."""
    kept = [row["data_step"] for row in by_loss.history.records if row["is_kept"]]
    assert kept == list(range(1, len(kept) + 1))
    assert int(by_loss.state["seen"]) == sum(range(len(kept)))


def test_forks_of_a_round_start_from_one_state_and_see_the_same_data(result):
    held = result.history.rounds[0]
    assert len(held["forks"]) >= 2
    by_step = {row["step"]: row for row in result.history.records}
    firsts = [by_step[fork["start"] + 1] for fork in held["forks"]]
    assert len({row["data_step"] for row in firsts}) == 1
    # Before its first update a fork's loss depends on the state, the batch and the state's key alone.
    assert len({row["loss"] for row in firsts}) == 1


def test_training_goes_on_from_the_best_fork_at_its_rate(result):
    held = result.history.rounds[0]
    statuses = [fork["status"] for fork in held["forks"]]
    best = held["forks"][held["best"]]
    assert statuses[held["best"]] == "kept" and set(statuses) <= {"kept", "lost", "failed"}
    scores = [fork["scores"][-1] for fork in held["forks"]]
    assert scores[held["best"]] <= np.median(scores)
    assert held["chosen"]["learning_rate"] == pytest.approx(best["hyperparams"]["learning_rate"], rel=1e-4)
    by_step = {row["step"]: row for row in result.history.records}
    first, last = by_step[held["end"] + 1], by_step[best["end"]]
    assert first["data_step"] == last["data_step"] + 1
    assert first["learning_rate"] == pytest.approx(held["chosen"]["learning_rate"])
    kept = [row["step"] for row in result.history.records if row["is_kept"] and row["step"] <= held["end"]]
    assert kept == list(range(best["start"] + 1, best["end"] + 1))


def test_rates_never_leave_the_bounds_upwards_and_decay_to_zero(result):
    lo, hi = problem.SPACE["learning_rate"]
    rates = np.array([row["learning_rate"] for row in result.history.records])
    assert np.all(rates <= hi) and np.all(rates > 0)
    assert lo <= result.hyperparams["learning_rate"] <= hi
    assert rates[-1] < 0.02 * result.hyperparams["learning_rate"]


def test_one_compilation_for_the_whole_run():
    traces = []

    def train_step(state, batch, hp):
        traces.append(None)
        return problem.train_step(state, batch, hp)

    def eval_step(state):
        traces.append("eval")
        return problem.eval_step(state)

    for _ in range(2):
        atn.fit(
            train_step,
            problem.new_state(),
            problem.batches,
            tuner=problem.tuner(),
            eval_step=eval_step,
            progress=False,
        )
    # The check before training traces them too; each is compiled once for both calls.
    assert traces.count(None) == 3
    assert traces.count("eval") == 2


def test_nothing_waits_for_the_device_between_decisions(monkeypatch):
    waits = []

    class Watched:
        def __init__(self, array, phase):
            self.array, self.phase = array, phase

        def __bool__(self):
            waits.append(self.phase)
            return bool(self.array)

    original, phases = run._step_jit, []

    def step(core, train_step, has_aux, copies, ts, hyperparams, batch):
        phase = phases[-1]
        *rest, due, wants, log = original(core, train_step, has_aux, copies, ts, hyperparams, batch)
        return *rest, Watched(due, phase), Watched(wants, phase), log

    train_one = run.Run.train_one

    def watched(self):
        phases.append(self.controller.phase)
        train_one(self)

    monkeypatch.setattr(run, "_step_jit", step)
    monkeypatch.setattr(run.Run, "train_one", watched)
    atn.fit(problem.train_step, problem.new_state(), problem.batches, tuner=problem.tuner(), progress=False)
    assert len(waits) > 0
    assert waits.count(0) <= 2  # TRAIN: none but at the end of a stretch


def test_without_validation_forks_are_compared_by_their_training_losses(by_loss):
    assert by_loss.history.rounds[0]["scored_by"] == "training loss"
    assert float(problem.eval_step(by_loss.state)) < 0.1
    assert by_loss.eval is None


def test_slow_hyperparameters_stay_put_without_validation_and_the_user_is_told():
    def train_step(state, batch, hp):
        state, loss = problem.train_step(state, batch, {"learning_rate": hp["learning_rate"]})
        return state, loss + 0.0 * hp["penalty"]

    tuner = atn.AutoTuneNet({**problem.SPACE, "penalty": (0.0, 1.0)}, 160, initial={"penalty": 0.25})
    with pytest.warns(UserWarning, match="penalty stays as it starts: only a validation metric"):
        result = atn.fit(train_step, problem.new_state(), problem.batches, tuner=tuner, progress=False)
    assert {row["penalty"] for row in result.history.records} == {0.25}


def test_an_iterable_of_batches_gives_the_same_run_as_a_callable(result):
    everything = [problem.batch(i) for i in range(problem.TOTAL_STEPS)]
    from_list = atn.fit(
        problem.train_step,
        problem.new_state(),
        everything,
        tuner=problem.tuner(),
        eval_step=problem.eval_step,
        progress=False,
    )
    assert problem.same(result.state, from_list.state)


def test_batches_that_run_out_leave_a_usable_result():
    few = (problem.batch(i) for i in range(60))
    result = atn.fit(problem.train_step, problem.new_state(), few, tuner=problem.tuner(), progress=False)
    assert result.is_interrupted
    assert any("ran out" in event["message"] for event in result.history.events)
    assert np.isfinite(float(problem.eval_step(result.state)))


def test_the_callers_state_stays_alive():
    state = problem.new_state()
    atn.fit(problem.train_step, state, problem.batches, tuner=problem.tuner(), progress=False)
    assert problem.same(state, problem.new_state())


def test_callbacks_hear_of_each_round(result):
    heard = []
    atn.fit(
        problem.train_step,
        problem.new_state(),
        problem.batches,
        tuner=problem.tuner(),
        progress=False,
        callbacks=[heard.append],
    )
    assert len(heard) == 1 and heard[0]["kind"] == "fast"


_SCRIPT = """
import hashlib, jax, numpy as np
import autotunenet_jax as atn
from tests import problem
result = atn.fit(problem.train_step, problem.new_state(), problem.batches, tuner=problem.tuner(),
                 eval_step=problem.eval_step, key=jax.random.key(7), progress=False)
leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result.state["params"])]
print(hashlib.sha256(b"".join(leaves)).hexdigest(), [row["loss"] for row in result.history.records[-5:]])
"""


def test_same_key_same_result_bit_for_bit_in_two_processes():
    def run():
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ},
            cwd=os.getcwd(),
        )
        return done.stdout

    first = run()
    assert len(first) > 64
    assert first == run()


def test_the_history_is_data_and_a_picture(result, tmp_path):
    import json

    history = result.history
    assert json.loads(json.dumps(history.to_dict()))["summary"]["steps"] == problem.TOTAL_STEPS
    pandas = pytest.importorskip("pandas")
    assert isinstance(history.to_pandas(), pandas.DataFrame)
    path = tmp_path / "run.png"
    history.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_schedules_replay_the_kept_steps(by_loss):
    """Plain training under the recorded schedule ends where the tuned run did, without tuner and without forks."""
    schedule = by_loss.history.schedule()["learning_rate"]
    kept = [row for row in by_loss.history.records if row["is_kept"]]
    for row in kept[:: len(kept) // 7]:
        assert float(schedule(row["data_step"] - 1)) == pytest.approx(row["learning_rate"], rel=1e-6)
