"""What a user hangs on a whole run: hooks, metrics, loggers, and the wish to end it."""

import json
import os
import signal

import jax.numpy as jnp
import pytest

import autotunenet_jax as atn
from autotunenet_jax.session.recorder import Recorder
from tests import problem
from tests.session.test_feed import Heard


def train_step(state, batch, hp):
    """As in the shared problem, with metrics of its own."""
    state, loss = problem.train_step(state, batch, hp)
    return state, loss, {"double": 2 * loss, "number": batch[2]}


def nested(state, batch, hp):
    state, loss, metrics = train_step(state, batch, hp)
    return state, (loss, metrics)


def eval_step(state):
    loss = problem.eval_step(state)
    return {"loss": loss, "root": jnp.sqrt(loss)}


def fit(**options):
    given = {"tuner": problem.tuner(), "eval_step": eval_step, "has_aux": True, "progress": False, **options}
    return atn.fit(given.pop("step", train_step), problem.new_state(), given.pop("batches", problem.batches), **given)


@pytest.fixture(scope="module")
def told():
    """A whole run, with what was heard and logged of it."""
    heard, rows = Heard(), []
    result = fit(callbacks=[heard], loggers=[lambda row, step: rows.append({"step": step, **row})], log_every=10)
    return result, heard, rows


def of_kind(heard, kind):
    return [event for event in heard.events if isinstance(event, kind)]


def test_whoever_listens_changes_nothing(told):
    plain = atn.fit(
        problem.train_step,
        problem.new_state(),
        problem.batches,
        tuner=problem.tuner(),
        eval_step=problem.eval_step,
        progress=False,
    )
    result, _, _ = told
    assert problem.same(plain.state, result.state)
    assert [row["loss"] for row in plain.history.records] == [row["loss"] for row in result.history.records]
    assert plain.eval == result.eval


def test_steps_are_those_that_are_kept_with_all_that_is_known_of_them(told):
    result, heard, _ = told
    records = {row["step"]: row for row in result.history.records}
    undone = [range(rewind.back_to + 1, rewind.step + 1) for rewind in of_kind(heard, atn.Rewind)]
    steps = of_kind(heard, atn.Step)
    numbers = [step.step for step in steps]
    assert numbers == sorted(set(numbers))
    # What was heard and is not kept is what a rewind told of.
    lost = [step for step in numbers if not records[step]["is_kept"]]
    assert lost and all(any(step in span for span in undone) for step in lost)
    assert {step for step in records if records[step]["is_kept"]} <= set(numbers)
    assert not any(records[step]["phase"] == "sweep" for step in numbers)
    forks = {(records[step]["round"], records[step]["fork"]) for step in numbers if records[step]["phase"] == "fork"}
    assert forks == {(number, row["best"]) for number, row in enumerate(result.history.rounds)}
    for step in steps:
        row = records[step.step]
        assert step.loss == row["loss"] and step.hyperparams == {"learning_rate": row["learning_rate"]}
        assert step.metrics == {"double": row["double"], "number": row["number"]}
        assert step.metrics["double"] == pytest.approx(2 * step.loss)
        assert step.metrics["number"] == row["data_step"] - 1


def test_steps_number_the_training_that_lives_on(told):
    result, heard, _ = told
    at = 0
    for event in heard.events:
        if isinstance(event, atn.Step):
            at += 1
            assert event.kept_step == at
        elif isinstance(event, atn.Rewind):
            assert event.kept_step < at
            at = event.kept_step
        elif isinstance(event, atn.Reading):
            assert event.kept_step == at
    assert at == len(result.history.kept())


def test_readings_are_of_the_training_that_lives_on_and_have_all_metrics(told):
    result, heard, _ = told
    settled = [row for row in result.history.evals if row["is_settled"]]
    readings = of_kind(heard, atn.Reading)
    assert [(reading.step, reading.value) for reading in readings] == [(row["step"], row["value"]) for row in settled]
    for reading, row in zip(readings, settled, strict=True):
        assert reading.metrics == row["metrics"] and reading.value == reading.metrics["loss"]
        assert reading.metrics["root"] == pytest.approx(reading.value**0.5, rel=1e-4)


def test_every_decision_is_heard_between_begin_and_end(told):
    result, heard, _ = told
    assert [event for event in heard.events if isinstance(event, dict)] == result.history.rounds
    assert heard.events[0] == "begin" and heard.events[-1] == "end"
    assert heard.events.count("begin") == heard.events.count("end") == 1


def test_rows_are_means_of_the_kept_steps(told):
    _, heard, rows = told
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    kept = {step.step: step for step in of_kind(heard, atn.Step)}
    whole = [row for row in rows if "train/loss" in row and row["step"] % 10 == 0 and row["step"] > 80]
    assert len(whole) >= 6
    for row in whole:
        block = [kept[step] for step in range(row["step"] - 9, row["step"] + 1) if step in kept]
        if not any(rewind.step in range(row["step"] - 9, row["step"] + 1) for rewind in of_kind(heard, atn.Rewind)):
            assert row["train/loss"] == pytest.approx(sum(step.loss for step in block) / len(block))
            assert row["train/double"] == pytest.approx(2 * row["train/loss"])
        assert row["hyperparams/learning_rate"] == block[-1].hyperparams["learning_rate"]
    assert [row["tuner/round"] for row in rows if "tuner/round" in row] == [1]
    assert sum("eval/loss" in row for row in rows) == len(of_kind(heard, atn.Reading))


def test_both_shapes_of_metrics_are_one(told):
    assert problem.same(fit(step=nested).state, told[0].state)


# Ending a run.


class EndsAt(atn.Callback):
    """Asks for the end at the first event of a kind from some step on."""

    def __init__(self, hook, step=0):
        setattr(self, hook, self.ask)
        self.step, self.is_done = step, False

    def ask(self, told):
        at = told["end"] if isinstance(told, dict) else told.step
        if at >= self.step:
            raise atn.StopTraining("had enough")


@pytest.mark.parametrize(("hook", "step"), [("on_step", 90), ("on_validation", 120), ("on_decision", 0)])
def test_a_callback_ends_a_run_in_its_best_state(hook, step):
    heard = Heard()
    result = fit(callbacks=[EndsAt(hook, step), heard], log_every=10)
    ended = int(result.tuner_state.step)
    assert step <= ended <= step + 80 and ended < problem.TOTAL_STEPS
    assert result.stop_reason == "had enough" and not result.is_interrupted
    assert "stopped after" in repr(result) and "had enough" in repr(result)
    messages = [event["message"] for event in result.history.events if event["kind"] == "stop"]
    assert messages == [f"Stopped after {ended} of {problem.TOTAL_STEPS} steps: had enough."]
    settled = [row["value"] for row in result.history.evals if row["is_settled"]]
    assert result.eval == min(settled) == pytest.approx(float(problem.eval_step(result.state)), rel=1e-5)
    assert heard.events[-1] == "end" and result.history.summary["steps"] == ended


def stuck(state):
    """A validation that never improves."""
    return {"loss": problem.eval_step(state) * 0 + 1.0}


def test_an_early_stop_ends_the_run_after_its_patience():
    result = fit(eval_step=stuck, callbacks=[atn.EarlyStopping(patience=4)])
    settled = [row["step"] for row in result.history.evals if row["is_settled"]]
    # The first reading is the best; forks' do not count.
    assert len(settled) == 5 and len(result.history.evals) > len(settled)
    assert "did not improve in 4 readings since 1 at step 0" in result.stop_reason
    assert int(result.tuner_state.step) == settled[-1] < problem.TOTAL_STEPS


def test_a_run_that_improves_is_not_ended():
    result = fit(callbacks=[atn.EarlyStopping(patience=15)])
    assert result.stop_reason is None and int(result.tuner_state.step) == problem.TOTAL_STEPS
    assert "stop" not in {event["kind"] for event in result.history.events}


def test_a_wish_to_end_with_the_last_step_is_none():
    result = fit(callbacks=[EndsAt("on_step", problem.TOTAL_STEPS)])
    assert result.stop_reason is None and not result.is_interrupted


@pytest.mark.parametrize("hook", ["on_step", "on_validation", "on_decision"])
def test_an_error_in_any_hook_loses_nothing(tmp_path, told, hook):
    class Fails(EndsAt):
        def ask(self, told):
            if not self.is_done and (isinstance(told, dict) or told.step >= self.step):
                self.is_done = True
                raise RuntimeError("its own problem")

    with pytest.raises(RuntimeError, match="its own problem"):
        fit(snapshots=tmp_path, callbacks=[Fails(hook, 90)])
    resumed = fit(snapshots=tmp_path, resume=True)
    assert problem.same(resumed.state, told[0].state)
    assert resumed.history.records == told[0].history.records


@pytest.mark.parametrize("call", [25, 60, 115])
def test_a_resumed_run_tells_and_logs_what_is_left(tmp_path, told, call):
    """Stopped in a fork, in another one, and in training."""
    _, expected, rows = told
    calls = 0

    def batches(step, hp):
        nonlocal calls
        calls += 1
        if calls == call + 1:  # the first call is the check before training
            os.kill(os.getpid(), signal.SIGTERM)
        return problem.batch(step)

    log, first, second = atn.JSONLLogger(tmp_path / "log.jsonl"), Heard(), Heard()
    options = {"snapshots": tmp_path / "run", "loggers": [log], "log_every": 10}
    assert fit(batches=batches, callbacks=[first], **options).is_interrupted
    done = max((step for step, _ in first.steps()), default=0)
    fit(callbacks=[second], resume=True, **options)
    assert second.events[0] == "begin"
    # A run that is cut short tells of the fork that it ends in; one that goes on leaves that open.
    before = [step for step in first.steps() if step[0] < min(dict(second.steps()))]
    assert before + second.steps() == expected.steps()
    assert done <= call
    assert log.read() == rows


def test_an_early_stop_counts_on_after_an_interruption(tmp_path):
    whole = fit(eval_step=stuck, callbacks=[atn.EarlyStopping(patience=6)])
    ended = int(whole.tuner_state.step)
    calls = 0

    def batches(step, hp):
        nonlocal calls
        calls += 1
        if calls == ended - 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return problem.batch(step)

    options = {"eval_step": stuck, "snapshots": tmp_path}
    assert fit(batches=batches, callbacks=[atn.EarlyStopping(patience=6)], **options).is_interrupted
    for _ in range(2):  # once it has ended, it has ended
        again = fit(callbacks=[atn.EarlyStopping(patience=6)], resume=True, **options)
        assert int(again.tuner_state.step) == ended and again.stop_reason == whole.stop_reason


def test_bad_steps_are_not_told_of():
    def step(state, batch, hp):
        new, loss, metrics = train_step(state, batch, hp)
        return new, jnp.where(batch[2] % 7 == 3, jnp.nan, loss), metrics

    heard, rows = Heard(), []
    with pytest.warns(UserWarning, match="were skipped"):
        fit(step=step, callbacks=[heard], loggers=[lambda row, step: rows.append(row)], log_every=5)
    steps = of_kind(heard, atn.Step)
    assert len(steps) > 50 and all(step.metrics["number"] % 7 != 3 for step in steps)
    values = [row["train/loss"] for row in rows if "train/loss" in row]
    assert all(value == value for value in values)


def test_the_host_reads_in_blocks(monkeypatch):
    """However much is asked for of each step, the device is read a few times in a run."""
    reads, flush = [], Recorder.flush

    def counted(self):
        reads.append(len(self._pending))
        return flush(self)

    monkeypatch.setattr(Recorder, "flush", counted)
    fit(tuner=problem.tuner(total_steps=1000), eval_step=None, callbacks=[Heard()], log_every=100)
    rounds = 30  # decisions of a plan of this length, and then some
    assert sum(reads) >= 1000 and len([count for count in reads if count]) < 1000 / 100 + rounds


# What is refused, before a step is made.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"has_aux": False}, TypeError, "has_aux=True"),
        ({"has_aux": False, "step": nested}, ValueError, "has_aux=True"),
        ({"step": problem.train_step}, TypeError, "since has_aux=True"),
        ({"step": lambda s, b, hp: (*problem.train_step(s, b, hp), 3.0)}, TypeError, "as a dict by name"),
        ({"step": lambda s, b, hp: (*problem.train_step(s, b, hp), {"loss": 1.0})}, ValueError, "name that is taken"),
        (
            {"step": lambda s, b, hp: (*problem.train_step(s, b, hp), {"learning_rate": 1.0})},
            ValueError,
            "name that is taken",
        ),
        (
            {"step": lambda s, b, hp: (*problem.train_step(s, b, hp), {"x": jnp.ones(3)})},
            ValueError,
            r"'x' is float32\[3\]",
        ),
        ({"monitor": "los"}, ValueError, r"monitor='los' is none .* loss, root"),
        ({"tuner": problem.tuner(mode="max")}, ValueError, "several metrics, loss, root"),
        ({"eval_step": lambda s: {"a": 1.0, "b": 2.0}}, ValueError, "say by which one"),
        ({"eval_step": problem.eval_step, "monitor": "loss"}, ValueError, "returns no dict"),
        ({"eval_step": lambda s: {"loss": jnp.ones(2)}}, ValueError, "'loss' is"),
        ({"eval_step": lambda s: {"loss": 3}}, ValueError, "must be a real number"),
        ({"loggers": [3]}, TypeError, "must have add_scalar"),
        ({"callbacks": [atn.EarlyStopping]}, TypeError, "the class EarlyStopping"),
        ({"log_every": 0}, ValueError, "log_every"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        fit(**options)


def test_a_metric_is_chosen_by_name():
    by_root = fit(monitor="root")
    assert by_root.eval == pytest.approx(float(problem.eval_step(by_root.state)) ** 0.5, rel=1e-4)
    assert json.loads(json.dumps(by_root.history.to_dict()))["evals"][0]["metrics"].keys() == {"loss", "root"}
    alone = fit(eval_step=lambda state: {"root": eval_step(state)["root"]})
    assert problem.same(alone.state, by_root.state)


def test_a_run_that_is_cut_short_is_measured_where_the_whole_run_is():
    whole, cut = ([row["step"] for row in fit(steps=steps).history.evals] for steps in (None, 60))
    *regular, last = cut
    assert len(regular) >= 2 and last == 60
    assert regular == whole[: len(regular)]


def test_a_metric_that_seems_to_be_better_the_other_way_is_told_of():
    with pytest.warns(UserWarning, match="accuracy reads as a metric of which more is better, and mode='min'"):
        result = fit(eval_step=lambda state: {"accuracy": eval_step(state)["root"]})
    assert [event["kind"] for event in result.history.events].count("direction") == 1
