"""State, books and controller change together or not at all; the best state is the one that was measured."""

import math

import jax
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller.state import TRAIN
from autotunenet_jax.loop.device_controller import DeviceController
from autotunenet_jax.session.host import Host
from autotunenet_jax.session.packed_controller import PackedController
from autotunenet_jax.session.progress import Progress
from autotunenet_jax.session.recorder import Recorder
from autotunenet_jax.session.session import Session, is_better
from tests import problem

SPACE, TOTAL = {"learning_rate": (1e-4, 1.0)}, 160


class Numbers(Host):
    """A training whose state is a number; copies fail when they are told to."""

    def __init__(self):
        self.state, self.metric, self.fails, self.restored = 0, None, False, 0

    def copy(self):
        if self.fails:
            raise MemoryError("injected")
        return self.state

    def restore(self, copy, *, rewinds):
        if self.fails:
            raise MemoryError("injected")
        self.state, self.restored = copy, self.restored + 1

    def write(self, hyperparams):
        self.values = dict(hyperparams)

    def evaluate(self):
        return self.metric

    def keep_best(self):
        return self.copy()

    def restore_best(self, best):
        self.state = best
        return best is not None


def begun(total=TOTAL, **options):
    tuner = atn.AutoTuneNet(SPACE, total, **options)
    recorder = Recorder(atn.History(tuner.space.names), tuner.space, Progress(1, is_on=False), ())
    host = Numbers()
    return Session(host, PackedController(tuner), recorder), host


def trained(session, host, steps, loss=1.0):
    for _ in range(steps):
        host.state += 1
        session.report(loss * 0.99**host.state)


def in_training(session, host):
    while session.controller.phase != TRAIN or session.controller.step < 100:
        trained(session, host, 1)


def everything(session, host):
    return (session.saved, session.kept, session.best, session.best_eval, host.state, session.evaluated_at)


@pytest.mark.parametrize("make", [PackedController, lambda tuner: DeviceController(tuner, key=jax.random.key(0))])
def test_what_a_controller_undoes_has_never_been(make):
    controller = make(atn.AutoTuneNet(SPACE, TOTAL))
    before, values = controller.state, controller.hyperparams()
    controller.observe_eval(0.5)
    controller.undo()
    controller.decide()
    controller.undo()
    assert problem.same(controller.state, before)
    assert controller.hyperparams() == values and (controller.step, controller.phase) == (0, 1)


def test_a_decision_whose_copies_fail_is_still_due_and_can_be_made_again():
    session, host = begun()
    twin, other = begun()
    is_seen = False
    for _ in range(TOTAL - 1):
        host.state, other.state = host.state + 1, other.state + 1
        decision = twin.report(0.99**other.state).decision
        host.fails = decision is not None and any(decision.directive[:4])
        if not host.fails:
            session.report(0.99**host.state)
            continue
        is_seen = True
        with pytest.raises(MemoryError):
            session.report(0.99**host.state)
        host.fails = False
        assert session.is_due
        books = session.books()
        assert books["is_due"]
        session.complete()
        session.write()
        assert not session.is_due
        assert problem.same(session.controller.state, twin.controller.state)
        assert everything(session, host) == everything(twin, other)
    assert is_seen


def test_the_state_that_is_kept_is_the_state_that_was_measured():
    session, host = begun()
    in_training(session, host)
    session.observe(0.5)
    assert session.kept == session.best == host.state
    assert int(session.controller.state.slots.kept_step) == session.controller.step
    at = host.state
    trained(session, host, 20)
    assert session.kept == at


def test_a_metric_whose_copy_fails_is_not_taken_in():
    session, host = begun()
    in_training(session, host)
    before, state = everything(session, host), session.controller.state
    host.fails = True
    with pytest.raises(MemoryError):
        session.observe(0.5)
    assert everything(session, host) == before and problem.same(session.controller.state, state)
    host.fails = False
    session.observe(0.5)
    assert session.best_eval == 0.5 and session.best_at == session.controller.step


@pytest.mark.parametrize(("mode", "good", "bad"), [("min", 0.1, 0.9), ("max", 0.9, 0.1), ("min", 0.1, math.nan)])
def test_a_run_ends_in_its_best_state(mode, good, bad):
    """Whether or not the controller still has that state."""
    session, host = begun(mode=mode)
    in_training(session, host)
    session.observe(good)
    best, at = host.state, session.controller.step
    session.kept = -1
    trained(session, host, TOTAL - session.controller.step)
    session.observe(bad)
    goes_back = bool(session.controller.state.validation.returns)
    assert session.end_at_best()
    assert host.state == (-1 if goes_back else best)
    said = [row["message"] for row in session.recorder.history.events if row["kind"] == "retreat"]
    assert said and all("the run ends in" in message.lower() for message in said)
    assert not any(row["is_kept"] for row in session.recorder.history.records if row["step"] > at)


def test_a_best_state_before_the_last_round_is_not_forgotten():
    session, host = begun(400)
    best, after_round = None, []
    while session.controller.step < 400:
        trained(session, host, 1)
        if len(session.recorder.history.rounds) == 2:
            after_round.append((session.saved, session.kept, host.state))
        is_between = session.controller.phase == TRAIN and int(session.controller.state.round.index) == 1
        if best is None and is_between:
            session.observe(0.1)
            best = host.state
        elif session.wants_eval:
            session.observe(1.0 + 1e-3 * session.controller.step)
    session.observe(2.0)
    # The second round made it worse whatever was tried: what it began from is kept as it was, not a step later.
    assert [row["best"] >= 0 for row in session.recorder.history.rounds] == [True, False]
    assert len(set(after_round[0])) == 1
    assert session.end_at_best()
    assert (host.state, session.last_eval) == (best, 0.1)


def test_a_run_whose_last_reading_is_the_best_stays_where_it_is():
    """Also where that reading is lower in 32 bits than in 64."""
    session, _ = begun()
    trained(session, session.host, TOTAL)
    session.observe(0.7)
    assert float(np.float32(0.7)) < 0.7 and not session.end_at_best()
    assert all("best state" not in row["message"] for row in session.recorder.history.events)


def test_a_state_has_one_metric():
    session, host = begun()
    heard = []
    session.recorder.history.evals.clear()
    in_training(session, host)
    for metric in (1.0, 2.0, 0.5):
        session.observe(metric)
        heard.append([row["value"] for row in session.recorder.history.evals])
    assert heard == [[1.0]] * 3 and session.best_eval == 1.0


def test_the_rates_climb_while_the_metric_improves_and_the_history_says_so():
    session, host = begun(400)
    rates = [0.0]
    while session.controller.step < 250:
        host.state += 1
        host.metric = 0.99**host.state
        session.report(host.metric)
        if session.wants_eval and session.controller.phase == TRAIN:
            session.observe(host.metric)
        rates.append(float(session.controller.state.incumbent[0]))
    session.recorder.flush()
    told = [row["step"] for row in session.recorder.history.events if row["kind"] == "climb"]
    assert told
    for step in told:
        # A quarter of a decade of the four that the space has.
        assert rates[step] - rates[step - 1] == pytest.approx(0.0625, abs=1e-6)


def test_the_rates_fall_once_and_the_history_says_so():
    session, host = begun()
    while session.controller.step < TOTAL - 20:
        host.state += 1
        loss = 1.0 if session.controller.phase == TRAIN else 0.999**host.state
        session.report(loss + 0.02 * (session.controller.step % 3))
    fallen = bool(session.controller.state.validation.has_fallen)
    session.recorder.flush()
    falls = [row for row in session.recorder.history.events if row["kind"] == "fall"]
    assert fallen and len(falls) == 1
    session.recorder.load(session.recorder.to_dict(), step=0)
    trained(session, host, 5)
    session.recorder.flush()
    assert [row for row in session.recorder.history.events if row["kind"] == "fall"] == falls


@pytest.mark.parametrize(
    ("metric", "other", "mode", "better"),
    [
        (1.0, 2.0, "min", True),
        (1.0, 2.0, "max", False),
        (2.0, 2.0, "max", False),
        (math.nan, 2.0, "min", False),
        (1.0, math.nan, "min", True),
        (None, 1.0, "min", False),
        (1.0, None, "max", True),
    ],
)
def test_which_metric_is_better(metric, other, mode, better):
    assert is_better(metric, other, mode) == better


def test_what_is_written_inside_a_round_is_one_training(tmp_path):
    session, host = begun()
    while len(session.recorder._forks) < 2:
        trained(session, host, 1)
    trained(session, host, 3)
    session.recorder.write(tmp_path)
    kept = atn.History.from_json(tmp_path / "history.json").kept()
    assert len({row["data_step"] for row in kept}) == len(kept) == 3
    assert len(session.recorder.history.kept()) > len(kept)
