"""What is written down of a run: complete, bounded, and enough to repeat it."""

import json
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import autotunenet_jax as atn
from autotunenet_jax import faults
from autotunenet_jax.controller import loss_monitor
from autotunenet_jax.controller import state as states
from autotunenet_jax.history import history as history_module
from autotunenet_jax.session import recorder as recorder_module
from autotunenet_jax.session.progress import Progress
from tests import history_fields, problem

SPACE = atn.SearchSpace({"learning_rate": (1e-4, 1.0), "layers": atn.Int(1, 9)})


def recorder(callbacks=()):
    progress = Progress(10, is_on=False)
    return recorder_module.Recorder(atn.History(SPACE.names), SPACE, progress, callbacks)


def log(target, step, *, loss=1.0, rate=None, layers=1, rewound=-1, data_step=None, phase=states.TRAIN):
    values = {"learning_rate": np.float32(step if rate is None else rate), "layers": np.int32(layers)}
    verdict = loss_monitor.HEALTHY if rewound < 0 else loss_monitor.SPIKE
    entry = {"step": step, "data_step": step if data_step is None else data_step, "rewound": rewound}
    entry["verdict"], entry["outcome"] = verdict, states.OUTCOME_NONE if rewound < 0 else states.OUTCOME_ROLLBACK
    target.log({**entry, "loss": np.float32(loss), "hyperparams": values}, phase)


@pytest.fixture(scope="module")
def result():
    """A run with a round, a rollback, and losses that are not finite."""
    plan = {**dict.fromkeys(range(80, 88), "poison"), 95: "inf"}
    train_step, batches = faults.inject(problem.train_step, problem.batches, plan)
    return atn.fit(train_step, problem.new_state(), batches, tuner=problem.tuner(), progress=False)


def test_records_are_complete_and_in_order(result):
    history_fields.check(result.history)
    records = result.history.records
    assert [row["step"] for row in records] == list(range(1, problem.TOTAL_STEPS + 1))
    for row in records:
        assert {"step", "data_step", "loss", "phase", "round", "fork", "is_kept", "learning_rate"} <= set(row)
        assert row["phase"] in ("train", "sweep", "fork")
        assert (row["fork"] >= 0) == (row["phase"] == "fork")


def test_rollbacks_are_told(result):
    events = [event for event in result.history.events if event["kind"] == "rollback"]
    assert len(events) == result.history.summary["rollbacks"] == 1
    assert "restored" in events[0]["message"]


def test_what_was_undone_is_told_apart_from_what_forks_took(result):
    _, undone = history_fields.check_price(result.history)
    at = next(event["step"] for event in result.history.events if event["kind"] == "rollback")
    # What the rollback went back over, and the step whose loss was not finite.
    assert undone > 1 and not any(row["is_kept"] for row in result.history.records if at - 2 < row["step"] <= at)
    told = f"{100 * undone / problem.TOTAL_STEPS:.1f} % undone"
    assert told in repr(result) and told in repr(result.history) and 0 < result.history.summary["share_discarded"] < 0.5


def test_strict_json_holds_it(result):
    assert any(not math.isfinite(row["loss"]) for row in result.history.records)
    text = json.dumps(result.history.to_dict(), allow_nan=False)
    data = json.loads(text)
    assert set(data) >= {"names", "records", "rounds", "evals", "events", "summary"}
    assert [row["loss"] for row in data["records"]].count(None) == 1


def test_loaded_again_it_is_the_same(result):
    loaded = atn.History(result.history.names)
    loaded.load(json.loads(json.dumps(result.history.to_dict())))
    for a, b in zip(loaded.records, result.history.records, strict=True):
        assert {**a, "loss": 0} == {**b, "loss": 0}
    assert loaded.discarded == result.history.discarded
    before, after = (history.schedule()["learning_rate"] for history in (result.history, loaded))
    np.testing.assert_array_equal(before(jnp.arange(100)), after(jnp.arange(100)))


def test_a_data_frame(result):
    pandas = pytest.importorskip("pandas")
    frame = result.history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == problem.TOTAL_STEPS
    assert frame["learning_rate"].iloc[-1] == result.history.records[-1]["learning_rate"]


def test_a_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.png"
    figure = result.history.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 1 + len(result.history.names)


def test_replaying_the_schedule_gives_the_tuned_weights(result):
    """Plain training, on the batches that the kept steps saw, under the schedule: no tuner, no forks, no rollbacks."""
    schedule = result.history.schedule()["learning_rate"]
    kept = result.history.kept()
    step = jax.jit(problem.train_step)
    state = problem.new_state()
    rollbacks = [event["step"] for event in result.history.events if event["kind"] == "rollback"]
    folded = 0
    for count, row in enumerate(kept):
        # Each rollback changes the noise: its number is folded into the state's keys.
        if (number := sum(at < row["step"] for at in rollbacks)) > folded:
            state["key"], folded = jax.random.fold_in(state["key"], number), number
        assert float(schedule(count)) == pytest.approx(row["learning_rate"], rel=1e-6)
        state, loss = step(state, problem.batch(row["data_step"] - 1), {"learning_rate": schedule(count)})
        assert float(loss) == pytest.approx(row["loss"], rel=1e-3)
    for name, leaf in state["params"].items():
        np.testing.assert_allclose(leaf, result.state["params"][name], rtol=1e-4)
    assert int(state["seen"]) == int(result.state["seen"])


def test_nothing_recorded_is_said_so():
    empty = atn.History(("learning_rate",))
    with pytest.raises(ValueError, match="run fit first"):
        empty.schedule()
    with pytest.raises(ValueError, match="run fit first"):
        empty.plot()


def test_two_rollbacks_to_one_snapshot_and_one_over_a_round():
    """Positions are counted along the surviving branch, whatever was thrown away on the way."""
    target = recorder()
    for step in range(1, 9):
        log(target, step)
    log(target, 9, rewound=5)
    log(target, 10)
    log(target, 11, rewound=5)
    for step in range(12, 15):
        log(target, step)
    target.flush()
    target.history.discard(12, 13)  # a fork that lost
    kept = [row["step"] for row in target.history.kept()]
    assert kept == [1, 2, 3, 4, 5, 12, 14]
    assert target.history.discarded == [(5, 11), (12, 13)]
    schedule = target.history.schedule()["learning_rate"]
    np.testing.assert_array_equal(schedule(jnp.arange(7)), kept)
    assert float(schedule(100)) == 14.0


@hypothesis.settings(max_examples=5)  # each has arrays of its own lengths to compile for
@hypothesis.given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=8))
def test_schedules_are_the_kept_values_in_order(spans):
    history = atn.History(SPACE.names)
    for step in range(1, 101):
        history.add({"step": step, "data_step": step, "loss": 0.0, "learning_rate": float(step), "layers": step % 9})
    for start, length in spans:
        history.discard(start, start + length)
    lost = {step for start, length in spans for step in range(start + 1, start + length + 1)}
    kept = [step for step in range(1, 101) if step not in lost]
    assert [row["step"] for row in history.kept()] == kept
    schedules = history.schedule()
    counts = jnp.arange(len(kept))
    np.testing.assert_array_equal(schedules["learning_rate"](counts), kept)
    np.testing.assert_array_equal(schedules["layers"](counts), [step % 9 for step in kept])
    for (_, end), (start, _) in zip(history.discarded, history.discarded[1:], strict=False):
        assert end < start


def test_whole_numbers_are_not_interpolated(monkeypatch):
    monkeypatch.setattr(history_module, "_MAX_RECORDS", 16)
    target = recorder()
    for step in range(1, 101):
        log(target, step, layers=1 if step <= 50 else 9)
    target.flush()
    schedule = target.history.schedule()
    layers = np.asarray(jax.vmap(schedule["layers"])(jnp.arange(100)))
    assert set(layers) == {1.0, 9.0}
    assert np.all(np.diff(layers) >= 0)
    rates = np.asarray(schedule["learning_rate"](jnp.arange(100)))
    np.testing.assert_allclose(rates[10:90], np.arange(11, 91), rtol=1e-5)  # linear between thinned records


@pytest.mark.parametrize("phase", [states.TRAIN, states.FORK])
def test_a_history_is_bounded_and_even_however_long_the_run(monkeypatch, phase):
    """Long forks too: they must not crowd out what comes after them."""
    monkeypatch.setattr(history_module, "_MAX_RECORDS", 64)
    monkeypatch.setattr(recorder_module, "_PENDING_LIMIT", 4)
    target = recorder()
    for step in range(1, 5001):
        log(target, step, phase=phase)
    target.flush()
    steps = np.array([row["step"] for row in target.history.records])
    assert 16 <= len(steps) <= 64
    assert max(np.diff(steps)) <= 4 * min(np.diff(steps))
    assert steps[-1] > 4700
    assert target.history.stride <= 5000 / 16


def test_no_rollback_is_missed_between_two_records(monkeypatch):
    monkeypatch.setattr(history_module, "_MAX_RECORDS", 16)
    target = recorder()
    for step in range(1, 1001):
        log(target, step, rewound=step - 3 if step % 101 == 0 else -1)
    target.flush()
    assert target.history.stride > 8
    assert [event["step"] for event in target.history.events] == list(range(101, 1001, 101))
    assert target.history.discarded[0] == (98, 101)


def test_events_are_bounded():
    target = recorder()
    for step in range(1, 3001):
        log(target, step, rewound=0)
    target.flush()
    assert 100 <= len(target.history.events) <= 1000
    assert target.history.discarded == [(0, 3000)]


def test_missing_libraries_are_named(monkeypatch, result):
    import builtins

    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("pandas", "matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"autotunenet-jax\[pandas\]"):
        result.history.to_pandas()
    with pytest.raises(ImportError, match=r"autotunenet-jax\[plot\]"):
        result.history.plot()


def test_the_value_in_force_at_a_step(result):
    history = result.history
    for row in history.records[::40]:
        assert history.value_at("learning_rate", row["step"]) == row["learning_rate"]
    assert history.value_at("learning_rate", 10**9) == history.records[-1]["learning_rate"]
    assert "records" in repr(history)
