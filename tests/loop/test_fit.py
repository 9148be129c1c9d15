"""Runs in which something goes wrong, or is used in an unusual way."""

import functools
import os
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import faults
from autotunenet_jax.controller import loss_monitor
from autotunenet_jax.controller import state as states
from autotunenet_jax.loop import fit as fit_module
from autotunenet_jax.loop import run
from autotunenet_jax.loop.device_copies import Copies
from autotunenet_jax.session.progress import Progress
from autotunenet_jax.session.recorder import Recorder
from autotunenet_jax.session.session import Session
from tests import problem


def train_step(state, batch, hp):
    """As in the shared problem, with a constant added to the loss that travels with the batch."""
    *batch, shift = batch
    state, loss = problem.train_step(state, tuple(batch), hp)
    return state, loss + shift


# So do the faults: one compiled step serves every test.
STEP, _ = faults.inject(train_step, problem.batches, {})


@functools.cache
def large_batch(step):
    """Large enough for the loss to be about the rate rather than about the batch."""
    rng = np.random.default_rng(step + 1)
    x = rng.normal(size=(512, 8)).astype(np.float32)
    return x, (x @ problem._TRUTH + 0.5).astype(np.float32), np.int32(step)


def batches_with(plan, shift=0.0):
    """Batches that carry the faults of a plan, each once: a batch asked for again is sound."""
    left = dict(plan)

    def batches(step, hp):
        fault = left.pop(step, None)
        x, y, number = large_batch(step)
        x = np.full_like(x, np.nan) if fault == "nan_batch" else x
        is_in_step = fault not in (None, "nan_batch")
        return (x, y, number, np.float32(shift)), np.int32(faults.STEP_FAULTS.index(fault) if is_in_step else -1)

    return batches


def fit(plan=None, **options):
    options = {"tuner": problem.tuner(), "progress": False, **options}
    batches = options.pop("batches", None) or batches_with(plan or {})
    return atn.fit(STEP, problem.new_state(), batches, **options)


def loss_of(result):
    return float(problem.eval_step(result.state))


@pytest.fixture(scope="module")
def clean():
    return fit()


def steps_in(result, phase):
    return [row["step"] for row in result.history.records if row["phase"] == phase]


# Faults.


@pytest.mark.parametrize("fault", ["nan", "inf", "huge", "poison", "nan_batch"])
@pytest.mark.parametrize("positions", [(0,), (4,), (1, 12, 40, 90, 120)])
def test_no_fault_at_any_step_reaches_the_result(clean, fault, positions):
    """At the first step, in the middle of the sweep, and in sweep, forks and training of one run."""
    result = fit(dict.fromkeys(positions, fault))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(result.state["params"]))
    # One fault costs next to nothing; five in so short a run cost rate and steps, never the run.
    untrained = float(problem.eval_step(problem.new_state()))
    assert loss_of(result) < (5 * loss_of(clean) + 0.1 if len(positions) == 1 else 0.5 * untrained)
    assert int(result.tuner_state.step) == problem.TOTAL_STEPS


@pytest.mark.parametrize("fault", ["nan", "poison", "nan_batch"])
def test_a_fault_in_the_last_steps(clean, fault):
    """Not even where no later loss could tell."""
    last = clean.history.records[-1]["data_step"] - 1
    for position in (last, last - 1):
        assert np.isfinite(loss_of(fit({position: fault}))), position


def test_a_run_that_only_ever_sees_nan_gives_its_first_state_back():
    with pytest.warns(UserWarning, match=r"of \d+ steps \(100 %\) were skipped"):
        result = fit(batches=lambda step, hp: batches_with({step: "nan_batch"})(step, hp))
    assert problem.same(result.state["params"], problem.new_state()["params"])
    assert all(0 <= row["learning_rate"] <= 1 for row in result.history.records)


def test_a_rollback_does_not_replay_the_data_that_led_to_it():
    result = fit(dict.fromkeys(range(88, 96), "nan_batch"))
    events = [event["step"] for event in result.history.events if event["kind"] == "rollback"]
    assert len(events) == 1
    records = [row for row in result.history.records if row["phase"] == "train" and row["step"] > events[0]]
    first = next(row for row in result.history.records if row["step"] == events[0])
    assert [row["data_step"] for row in records] == list(
        range(first["data_step"] + 1, first["data_step"] + 1 + len(records))
    )
    kept = [row["data_step"] - 1 for row in result.history.records if row["is_kept"]]
    assert int(result.state["seen"]) == sum(kept)
    assert not set(range(88, 96)) & set(kept)


def test_after_the_last_rollback_of_the_budget_hyperparameters_are_held_and_the_user_is_told():
    """Losses that jump again and again, with no fault of the state's."""
    guard = atn.Guard(max_rollbacks=2, warmup=4, patience=2)
    tuner = problem.tuner(1e-2, guard=guard)
    ts = tuner.init(jax.random.key(0))
    update = jax.jit(tuner.update)
    held, rng, spikes, trained = [], np.random.default_rng(0), 0, 0
    while int(ts.step) < problem.TOTAL_STEPS - 10:
        in_train = int(ts.phase) == states.TRAIN
        trained += in_train
        is_jump = in_train and trained % 12 >= 8
        loss = (2.0 + 2.0 * spikes if is_jump else 1.0) + 0.01 * rng.normal()
        are_used_up = int(ts.rollbacks) == 2
        ts, directive = update(ts, jnp.float32(loss))
        if in_train and int(directive.verdict) in (loss_monitor.SPIKE, loss_monitor.DIVERGED):
            spikes += 1
            if are_used_up:
                assert not bool(directive.restore | directive.adopt)
                held.append(np.asarray(ts.incumbent))
    assert int(ts.rollbacks) == 2 and len(held) >= 1
    assert int(ts.phase) == states.TRAIN and int(ts.segment_left) > problem.TOTAL_STEPS
    assert all(np.array_equal(held[0], other) for other in [*held, np.asarray(ts.incumbent)])


def test_the_users_history_says_why_and_when_no_rollback_is_left():
    recorder = Recorder(atn.History(("r",)), atn.SearchSpace({"r": (1e-3, 1.0)}), Progress(1, is_on=False), ())
    none, rollback, accepted = states.OUTCOME_NONE, states.OUTCOME_ROLLBACK, states.OUTCOME_ACCEPTED
    for step, (verdict, outcome, rewound) in enumerate(
        [
            (loss_monitor.SPIKE, rollback, 0),
            (loss_monitor.NON_FINITE, rollback, 1),
            (loss_monitor.SPIKE, accepted, -1),
            (loss_monitor.STALLED, none, -1),
            (loss_monitor.STALLED, none, -1),
            (loss_monitor.DIVERGED, none, -1),
        ]
    ):
        entry = {"step": step, "data_step": step, "loss": 1.0, "hyperparams": {"r": 0.1}}
        recorder.log({**entry, "verdict": verdict, "outcome": outcome, "rewound": rewound}, states.TRAIN)
    recorder.flush()
    said = [(event["kind"], event["message"]) for event in recorder.history.events]
    assert [kind for kind, _ in said] == ["rollback", "rollback", "shift", "stall", "budget"]
    assert said[0][1] == loss_monitor.MESSAGES[loss_monitor.SPIKE]
    assert said[1][1] == loss_monitor.MESSAGES[loss_monitor.NON_FINITE]
    assert "held from here on" in said[-1][1]


def test_every_copy_is_bit_for_bit(monkeypatch):
    """What is restored is what was saved, what is adopted is what was kept, and all forks start from one state."""
    seen = {"restored": 0, "adopted": 0, "rolled back": 0}
    starts = []
    train_one, decide = run.Run.train_one, Session.decide

    def host(copies):
        return jax.tree.map(
            lambda leaf: (
                np.array(jax.random.key_data(leaf))
                if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else np.array(leaf)
            ),
            copies,
        )

    def watched_train_one(run):
        before, rollbacks = host(run.copies), int(run.controller.state.rollbacks)
        if run.controller.phase == states.FORK and int(run.controller.state.segment_left) == int(
            run.controller.state.segment_length
        ):
            starts.append(before.state)
        out = train_one(run)
        after = host(run.copies)
        if int(run.controller.state.rollbacks) > rollbacks:
            seen["rolled back"] += 1
            key = after.state.pop("key")
            sources = [{**copy} for copy in (before.saved, before.kept)]
            # The key alone differs: the same masks and noise must not come again.
            assert not any(np.array_equal(key, source.pop("key")) for source in sources)
            assert any(problem.same(after.state, source) for source in sources)
            assert problem.same(after[1:], before[1:])
        return out

    def watched_decide(session):
        controller, copies = session.controller, lambda: Copies(session.host.state, session.saved, session.kept)
        before, kept, phase = host(copies()), int(controller.state.round.kept), controller.phase
        decision = decide(session)
        after = host(copies())
        if phase != states.TRAIN and controller.phase == states.FORK and int(controller.state.segment_left):
            seen["restored"] += 1
            assert problem.same(after.state, before.saved)
        adopts = phase == states.FORK and controller.phase == states.TRAIN and kept >= 0
        if adopts and problem.same(before.kept, after.kept):
            seen["adopted"] += 1
            assert problem.same(after.state, before.kept)
        return decision

    monkeypatch.setattr(run.Run, "train_one", watched_train_one)
    monkeypatch.setattr(Session, "decide", watched_decide)
    fit(dict.fromkeys(range(88, 96), "poison"), key=jax.random.key(3))
    fit(dict.fromkeys(range(88, 96), "nan"), tuner=problem.tuner(1e-1))
    assert seen["restored"] >= 4 and seen["rolled back"] == 2
    assert len(starts) >= 4
    first = starts[0]
    assert all(problem.same(first, other) for other in starts if other["seen"] == first["seen"])


# Interruption.


@pytest.mark.parametrize("number", [34, 35, 36, 55, 75])
def test_the_metric_of_a_run_that_ends_in_a_round_is_of_what_is_returned(number):
    """Forks end at 35, 55 and 75, and are measured there; another one is returned."""
    result = fit(eval_step=problem.eval_step, steps=number)
    assert result.eval == pytest.approx(loss_of(result), rel=1e-5)
    assert result.best_eval == pytest.approx(float(problem.eval_step(result.best_state)), rel=1e-5)


def test_what_every_fork_ruins_is_gone_back_to():
    """By the metric alone: the losses of poisoned batches are as low as others."""

    def poisoned(step, hp):
        x, y, _ = problem.batch(step)
        return x, y, np.int32(step < 5)

    def metric(state):
        return problem.eval_step(state) + 30.0 * (state["seen"] > 0)

    result = atn.fit(
        problem.train_step,
        problem.new_state(),
        poisoned,
        tuner=problem.tuner(),
        eval_step=metric,
        progress=False,
    )
    (first, *_), start = result.history.rounds, result.history.evals[0]["value"]
    assert first["best"] == -1 and all(fork["scores"][0] > 30.0 > start for fork in first["forks"])
    assert int(result.state["seen"]) == 0 and result.eval < 0.5 * start
    assert result.history.summary["discarded_steps"] == first["end"] - first["start"]


@pytest.mark.parametrize(("number", "phase"), [(3, "sweep"), (20, "fork"), (120, "train")])
def test_ctrl_c_leaves_a_usable_result(number, phase):
    before = signal.getsignal(signal.SIGINT)
    calls = 0
    plain = batches_with({})

    def batches(step, hp):
        nonlocal calls
        calls += 1
        if calls == number + 1:  # the first call is the check before training
            os.kill(os.getpid(), signal.SIGINT)
        return plain(step, hp)

    result = fit(batches=batches, eval_step=problem.eval_step)
    assert result.is_interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert len(result.history.records) == number == result.history.summary["steps"]
    assert result.history.records[-1]["phase"] == phase
    assert result.eval == pytest.approx(loss_of(result), rel=1e-5)
    assert result.eval is not None and result.eval <= float(problem.eval_step(problem.new_state())) * 1.001
    # The history says which steps the state has behind it.
    kept = [row["data_step"] - 1 for row in result.history.records if row["is_kept"]]
    assert int(result.state["seen"]) == sum(kept)
    assert result.history.summary["discarded_steps"] == number - len(kept)
    if phase == "sweep":
        assert problem.same(result.state, problem.new_state())
    else:
        assert float(result.history.schedule()["learning_rate"](0)) > 0


def test_a_second_ctrl_c_is_obeyed_at_once():
    before = signal.getsignal(signal.SIGINT)
    plain = batches_with({})

    def batches(step, hp):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(step, hp)

    with pytest.raises(KeyboardInterrupt):
        fit(batches=batches)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_generator_may_end_inside_a_round():
    plain = batches_with({})
    result = fit(batches=(plain(i, None) for i in range(5)))
    assert result.is_interrupted
    assert problem.same(result.state, problem.new_state())
    kept = [row for row in result.history.records if row["is_kept"]]
    assert not kept


def test_an_empty_generator_is_told_before_training():
    with pytest.raises(ValueError, match="empty or used-up generator"):
        fit(batches=(i for i in ()))


# Unusual uses.


def test_the_largest_metric_is_the_smallest_negated():
    lowest = fit(eval_step=problem.eval_step)
    highest = fit(eval_step=lambda state: -problem.eval_step(state), tuner=problem.tuner(mode="max"))
    assert problem.same(lowest.state, highest.state)
    assert lowest.eval is not None and highest.eval == -lowest.eval
    assert [row["value"] for row in highest.history.evals] == [-row["value"] for row in lowest.history.evals]


def test_negative_losses_are_as_good_as_any(clean):
    """A log-likelihood may be below zero."""
    below = fit(batches=batches_with({}, shift=-64.0))
    assert max(row["loss"] for row in below.history.records if row["is_kept"]) < 0
    assert loss_of(below) < 2 * loss_of(clean) + 0.01
    assert below.hyperparams["learning_rate"] == pytest.approx(clean.hyperparams["learning_rate"], rel=0.5)


def test_an_open_ended_run_holds_rounds_again_and_again():
    tuner = atn.AutoTuneNet(problem.SPACE, initial={"learning_rate": 1e-5})
    result = fit(tuner=tuner, steps=700)
    starts = [row["start"] for row in result.history.rounds]
    assert starts[0] == 0 and len(starts) == 2
    assert int(result.tuner_state.step) == 700
    trained = [row for row in result.history.records if row["phase"] == "train" and row["round"] == 1]
    assert len({row["learning_rate"] for row in trained[20:]}) == 1  # warmed up; no decay is planned


def test_steps_ends_a_planned_run_early():
    result = fit(steps=50)
    assert int(result.tuner_state.step) == 50
    assert not result.is_interrupted


def test_a_run_too_short_for_forks_takes_what_its_range_test_says(monkeypatch):
    sources = []

    class Watched(fit_module.BatchSource):
        def __init__(self, batches):
            super().__init__(batches)
            sources.append(self)

    monkeypatch.setattr(fit_module, "BatchSource", Watched)
    result = fit(batches=[batches_with({})(i, None) for i in range(96)], tuner=problem.tuner(total_steps=96))
    assert result.history.rounds == []
    assert [event["kind"] for event in result.history.events] == ["rate"]
    assert result.hyperparams["learning_rate"] > 1e-3  # from 1e-5
    assert {row["phase"] for row in result.history.records} == {"sweep", "train"}
    kept = [row["data_step"] for row in result.history.records if row["is_kept"]]
    assert kept == list(range(1, len(kept) + 1))
    # Batches are held for what may be asked for again, and no longer.
    assert len(sources[-1]._window) <= 1


def test_a_state_with_plain_numbers_is_traced_once():
    traces = []

    def train_step(state, batch, hp):
        traces.append(None)
        inner, loss = problem.train_step(
            state["inner"], batch, {"learning_rate": hp["learning_rate"] * state["factor"]}
        )
        return {"inner": inner, "factor": state["factor"], "epoch": state["epoch"]}, loss

    state = {"inner": problem.new_state(), "factor": 1.0, "epoch": 3}
    result = atn.fit(train_step, state, problem.batches, tuner=problem.tuner(), progress=False)
    assert len(traces) == 2  # the check before training, and the run
    assert float(problem.eval_step(result.state["inner"])) < 0.1


def test_the_progress_line(capsys, monkeypatch):
    monkeypatch.setattr(fit_module, "_SHOW_EVERY_SECONDS", 0.0)
    result = fit(progress=True, steps=90)
    shown = capsys.readouterr().out
    assert "round 1" in shown and "learning_rate" in shown
    assert problem.same(result.state, fit(steps=90).state)


def test_a_run_whose_last_metric_is_bad_ends_in_the_best_state():
    def step(state, batch, hp):
        count = state["count"] + 1.0
        return {"count": count}, jnp.exp(-count / 100.0) + 0.0 * hp["learning_rate"]

    def metric(state):
        # Falls with the loss, and is far above it at the very end only.
        return jnp.where(state["count"] > 300.0, 3.0, 2.0 * jnp.exp(-state["count"] / 100.0))

    tuner = atn.AutoTuneNet({"learning_rate": (1e-4, 1e-1)}, 400)
    state = {"count": jnp.zeros(())}
    result = atn.fit(step, state, lambda number, hp: (), tuner=tuner, eval_step=metric, eval_every=50, progress=False)
    best = float(result.best_state["count"])
    assert best < 300.0 and float(result.state["count"]) == pytest.approx(best, abs=1.0)
    assert result.eval == pytest.approx(float(metric(result.state)))
    assert result.history.events[-1]["kind"] == "retreat"
    assert "ends in the best state" in result.history.events[-1]["message"]


def test_a_metric_of_nothing_is_told_of():
    """Of a variable from outside, which is what it was when the validation was compiled."""
    first = problem.new_state()
    for eval_step, count in ((lambda state: problem.eval_step(first), 1), (problem.eval_step, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = atn.fit(
                problem.train_step, first, problem.batches, tuner=problem.tuner(), eval_step=eval_step, progress=False
            )
        said = [str(one.message) for one in caught if "reads nothing of the state" in str(one.message)]
        assert len(said) == sum(event["kind"] == "metric of nothing" for event in result.history.events) == count
