"""Forks that run together: what is decided, which of them are of use, and what they may not share."""

import functools
import logging
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller.fork_round import foreseen
from autotunenet_jax.controller.state import FORK
from autotunenet_jax.hosting import ForkExecutor, pack, train_fork, unpack
from autotunenet_jax.loop import device_forks, parallel_forks, run
from tests import devices, problem

TOTAL = 600
FORK_FIELDS = ("hyperparams", "status", "steps", "start", "end")


@pytest.fixture
def trained(monkeypatch):
    """How many forks were trained together each time, how many of them were of use, and for how many steps."""
    counts, train = [], parallel_forks.ParallelForks._run

    def counted(self, ts, state, points, batch):
        found = train(self, ts, state, points, batch)
        counts.append((len(points), len(found), int(ts.segment_length) - 1))
        return found

    monkeypatch.setattr(parallel_forks.ParallelForks, "_run", counted)
    return counts


@pytest.fixture
def heard(monkeypatch):
    """How many steps of each fork were heard rather than trained."""
    counts, hear = [], run.Run._hear

    def counted(self, fork):
        counts.append(fork.steps)
        return hear(self, fork)

    monkeypatch.setattr(run.Run, "_hear", counted)
    return counts


def fit(
    parallel_forks, *, batches=problem.batches, eval_step=problem.eval_step, train_step=problem.train_step, **options
):
    return atn.fit(
        problem.train_step, problem.new_state(), batches, tuner=problem.tuner(total_steps=TOTAL, **options),
        eval_step=eval_step, progress=False, parallel_forks=parallel_forks,
    )  # fmt: skip


@functools.cache
def alone(eval_step=problem.eval_step):
    return fit(None, eval_step=eval_step)


def told(result):
    return [[{name: fork[name] for name in FORK_FIELDS} for fork in row["forks"]] for row in result.history.rounds]


def assert_alike(result, reference):
    assert told(result) == told(reference)
    assert result.history.summary["steps"] == reference.history.summary["steps"] == TOTAL
    assert result.history.summary["discarded_steps"] == reference.history.summary["discarded_steps"]
    np.testing.assert_allclose(
        [row["loss"] for row in result.history.records], [row["loss"] for row in reference.history.records], rtol=1e-4,
        atol=1e-6,
    )  # fmt: skip
    assert int(result.state["seen"]) == int(reference.state["seen"])
    assert (jax.random.key_data(result.state["key"]) == jax.random.key_data(reference.state["key"])).all()


@pytest.mark.parametrize("eval_step", [problem.eval_step, None], ids=["validated", "by loss"])
def test_forks_together_decide_as_forks_one_after_the_other(eval_step, trained, heard):
    reference = alone(eval_step)
    assert not trained and "unused_steps" not in reference.history.summary
    result = fit(3, eval_step=eval_step)
    assert_alike(result, reference)
    # In the last round by loss one neighbour is left that has not run.
    least = 2 if eval_step is None else 3
    assert trained[0][:2] == (3, 3) and all(count == found >= least for count, found, _ in trained)
    forks = sum(len(row["forks"]) for row in reference.history.rounds)
    assert len(trained) < forks
    # What was trained and never asked for is told, and is no part of the budget.
    paid = sum(3 * steps for *_, steps in trained)
    assert result.history.summary["unused_steps"] == paid - sum(heard)


def test_a_batch_that_breaks_forks_is_met_as_if_they_ran_alone(trained):
    def batches(step, hp):
        x, y, number = problem.batch(step)
        return x, y * np.float32(np.nan if step == 45 else 1), number

    reference = fit(None, batches=batches)
    result = fit(3, batches=batches)
    assert_alike(result, reference)
    assert trained


def test_rates_that_depend_on_the_order_of_forks_are_not_foreseen():
    tuner = problem.tuner(total_steps=TOTAL, decay="linear")
    steps = jnp.int32(20)
    ts = tuner.init(jax.random.key(0))._replace(phase=jnp.int32(FORK), segment_left=steps, segment_length=steps)
    state = jax.device_put(problem.new_state(), jax.devices()[0])
    made = parallel_forks.ParallelForks(problem.train_step, tuner, has_aux=False, wanted=3, state=state)
    # There is no host that could give a batch.
    assert made.find(ts, types.SimpleNamespace(state=state, batch=None)) is None
    assert made.unused_steps == 0


def test_what_is_foreseen_lies_on_both_sides_and_inside_the_bounds():
    tuner = atn.AutoTuneNet({"learning_rate": (1e-4, 1e-2)}, total_steps=TOTAL)
    ts = tuner.init(jax.random.key(0))
    found = foreseen(tuner.space, ts._replace(trial=jnp.array([0.5])), 4)
    np.testing.assert_allclose(found.x[:, 0], [0.5, 0.25, 0.75, 0.0], atol=1e-6)
    assert found.is_allowed.tolist() == [True, True, True, True]
    at_bound = foreseen(tuner.space, ts._replace(trial=jnp.array([0.0])), 3)
    assert at_bound.is_allowed.tolist() == [True, False, True]
    slow = atn.AutoTuneNet({"weight_decay": (1e-5, 1e-1)}, total_steps=TOTAL)
    assert foreseen(slow.space, slow.init(jax.random.key(0)), 3).is_allowed.tolist() == [True, False, False]


@pytest.mark.parametrize("wanted", [0, 9, 2.0, True, "many"])
def test_a_number_of_forks_that_is_none_is_refused(wanted):
    with pytest.raises(
        ValueError,
        match=r'parallel_forks must be "auto", None, an integer from 1 to 8, or a ForkExecutor as a Population is; got',
    ):
        fit(wanted)


def test_batches_that_depend_on_the_fork_are_refused():
    def batches(step, hp):
        return problem.batch(step + 0 * int(hp["learning_rate"] > 1))

    with pytest.raises(ValueError, match="the same batches, and here those depend on learning_rate"):
        fit(2, batches=batches)


def test_as_many_as_fit_into_memory_run_together(monkeypatch, caplog):
    state = jax.device_put({"w": jnp.ones(2**18)}, jax.devices()[0])
    for free, count in ((2**20 * 100, 3), (2**20 * 11, 2), (2**20, 1), (None, 3)):
        monkeypatch.setattr(device_forks, "_free_bytes", lambda device, free=free: free)
        with caplog.at_level(logging.INFO, logger="autotunenet"):
            made = parallel_forks.ParallelForks(None, problem.tuner(), has_aux=False, wanted="auto", state=state)
        assert made.executor.count == count and made.is_on == (count > 1)
        assert f"up to {count} forks of a round run together" in caplog.records[-1].message
    assert parallel_forks.ParallelForks(None, problem.tuner(), has_aux=False, wanted=5, state=state).executor.count == 5


class Elsewhere(ForkExecutor):
    """Trains forks as another process would, and loses some of them."""

    count = 3

    def __init__(self, loses=lambda number: False):
        self._loses, self.trained = loses, 0

    def start(self, train_step, state, *, has_aux):
        self._train_step, self._structure = train_step, jax.tree.map(lambda _: 0, state)

    def train(self, state, hyperparams, batch, *, steps, count):
        sent, forks = pickle.dumps(pack(state)), []
        for number in range(count):
            values = {name: np.asarray(rows)[:steps, number] for name, rows in hyperparams.items()}
            begun = unpack(pickle.loads(sent), self._structure)
            fork = train_fork(self._train_step, begun, values, map(batch, range(steps)), has_aux=False)
            self.trained += 1
            forks.append(None if self._loses(self.trained) else fork._replace(state=unpack(pack(fork.state), state)))
        return forks


@pytest.mark.parametrize("loses", [lambda number: False, lambda number: number % 2, lambda number: True])
def test_forks_trained_elsewhere_change_nothing_and_lost_ones_are_trained_again(loses):
    executor = Elsewhere(loses)
    result = fit(executor)
    assert executor.trained
    assert_alike(result, alone())
    # Another program rounds otherwise.
    for there, here in zip(*map(jax.tree.leaves, (result.state["params"], alone().state["params"])), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)
    lost = sum(bool(loses(number + 1)) for number in range(executor.trained))
    assert result.history.summary["unused_steps"] >= lost * 17


SPREAD = """
import json
import jax
from autotunenet_jax.loop import parallel_forks
from tests.loop import test_parallel_forks as here

train, places = parallel_forks.ParallelForks._run, []
def seen(self, ts, state, points, batch):
    found = train(self, ts, state, points, batch)
    assert all(leaf.devices() == {jax.devices()[0]} for fork in found for leaf in jax.tree.leaves(fork.state))
    places.append([len(self.executor._over.mesh.devices.flat), len(found)])
    return found
parallel_forks.ParallelForks._run = seen
result = here.fit("auto")
print(json.dumps([places, here.told(result), [row["loss"] for row in result.history.records]]))
"""


def test_forks_over_several_devices():
    places, forks, losses = devices.run(SPREAD, count=3)
    assert places and all(place == [3, 3] for place in places)
    reference = alone()
    assert forks == told(reference)
    np.testing.assert_allclose(losses, [row["loss"] for row in reference.history.records], rtol=1e-4, atol=1e-6)
