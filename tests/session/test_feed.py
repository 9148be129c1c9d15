"""What of a run reaches the user's hooks and loggers, and in what order."""

import json
import math
from ast import literal_eval

import pytest

import autotunenet_jax as atn
from autotunenet_jax.session import feed as feed_module
from autotunenet_jax.session.callbacks import Step
from autotunenet_jax.session.feed import Feed


class Heard(atn.Callback):
    """Everything, in order."""

    def __init__(self):
        self.events = []

    def on_begin(self, history):
        self.events.append("begin")

    def on_step(self, step):
        self.events.append(step)

    def on_validation(self, reading):
        self.events.append(reading)

    def on_decision(self, decision):
        self.events.append(decision)

    def on_rewind(self, rewind):
        self.events.append(rewind)

    def on_end(self, history):
        self.events.append("end")

    def steps(self):
        return [(event.step, event.kept_step) for event in self.events if isinstance(event, Step)]


def step(number, loss=1.0, **metrics):
    return Step(number, number, loss, metrics, {"r": 0.1})


def make(*callbacks, log_every=10):
    history, rows = atn.History(("r",)), []
    return history, rows, Feed(history, callbacks, [lambda row, at: rows.append((at, row))], log_every=log_every)


def test_of_a_round_the_steps_of_the_fork_that_won_are_heard_and_no_others():
    heard = Heard()
    history, _, feed = make(heard)
    for number in (1, 2):
        feed.step(step(number), fork=-1)
    for fork in range(3):
        for number in range(3 + 4 * fork, 7 + 4 * fork):
            feed.step(step(number), fork=fork)
    feed.deliver()
    assert heard.steps() == [(1, 1), (2, 2)]
    history.discard(2, 6)
    history.discard(10, 14)
    decision = {"end": 14, "chosen": {"r": 0.2}}
    history.rounds.append(decision)
    feed.end_round(1, decision)
    feed.step(step(15), fork=-1)
    feed.deliver()
    assert heard.steps() == [(1, 1), (2, 2), (7, 3), (8, 4), (9, 5), (10, 6), (15, 7)]
    assert heard.events[0] == "begin" and heard.events[-2] is decision


def test_a_fork_that_begins_again_is_heard_once():
    heard = Heard()
    history, _, feed = make(heard)
    feed.step(step(1), fork=0)
    feed.drop_fork(0)
    history.discard(0, 1)
    feed.step(step(2), fork=0)
    feed.end_round(0)
    feed.deliver()
    assert heard.steps() == [(2, 1)]


def test_a_round_without_a_winner_leaves_nothing():
    heard = Heard()
    _, _, feed = make(heard)
    feed.step(step(1), fork=0)
    feed.end_round(-1)
    feed.deliver()
    assert heard.steps() == []


def test_a_rewind_takes_the_count_of_kept_steps_back():
    heard = Heard()
    history, _, feed = make(heard)
    for number in range(1, 6):
        feed.step(step(number), fork=-1)
    history.discard(3, 6)
    feed.rewind(6, 3, is_rollback=True)
    feed.step(step(7), fork=-1)
    feed.read(7, 0.5, {})
    feed.deliver()
    assert heard.steps()[-1] == (7, 4)
    assert heard.events[-3] == atn.Rewind(6, 3, 3, True)
    assert heard.events[-1] == atn.Reading(7, 4, 0.5, {})


def test_rows_hold_means_and_their_steps_only_grow():
    history, rows, feed = make(log_every=4)
    for number in range(1, 5):
        feed.step(step(number, loss=number, share=math.nan if number == 2 else 1.0), fork=-1)
    feed.deliver()
    feed.read(4, 0.5, {"loss": 0.5, "accuracy": 0.9})
    for number in (5, 6):
        feed.step(step(number, loss=6.0), fork=-1)
    # The seventh did not happen, and training went back.
    history.discard(6, 7)
    feed.rewind(7, 6, is_rollback=True)
    feed.step(step(9, loss=3.0), fork=-1)
    feed.deliver()
    feed.finish(history)
    values = {"train/loss": 2.5, "train/share": 1.0, "hyperparams/r": 0.1}
    assert rows[0] == (4, values)
    assert [at for at, _ in rows] == [4, 6, 7, 9]
    assert rows[1][1]["train/loss"] == 6.0 and rows[2][1] == {"tuner/rewinds": 1}
    assert rows[3][1]["train/loss"] == 3.0


def test_what_belongs_to_one_step_is_one_row():
    history, rows, feed = make(log_every=2)
    for number in (1, 2):
        feed.step(step(number), fork=-1)
    feed.read(2, 0.5, {})
    decision = {"end": 2, "chosen": {"r": 0.2}}
    history.rounds.append(decision)
    feed.end_round(-1, decision, discarded=1)
    feed.deliver()
    ((at, row),) = rows
    assert at == 2
    assert row == {
        "train/loss": 1.0,
        "hyperparams/r": 0.1,
        "eval/metric": 0.5,
        "tuner/round": 1,
        "tuner/share_discarded": 0.5,
        "tuner/chosen/r": 0.2,
    }


def test_the_last_row_has_its_means_where_a_decision_ends_the_run():
    history, rows, feed = make(log_every=4)
    for number in range(1, 6):
        feed.step(step(number, loss=number), fork=-1)
    feed.read(5, 0.5, {})
    decision = {"end": 6, "chosen": {"r": 0.2}}
    feed.step(step(6, loss=6.0), fork=0)
    history.rounds.append(decision)
    feed.end_round(0, decision)
    feed.deliver()
    feed.finish(history)
    assert [at for at, _ in rows] == [4, 5, 6]
    assert "train/loss" not in rows[1][1] and rows[1][1]["eval/metric"] == 0.5
    assert rows[2][1]["train/loss"] == 5.5 and rows[2][1]["tuner/chosen/r"] == 0.2


def test_very_long_forks_are_thinned(monkeypatch):
    monkeypatch.setattr(feed_module, "_MOST_STEPS", 8)
    heard = Heard()
    _, _, feed = make(heard)
    for number in range(1, 101):
        feed.step(step(number), fork=0)
        assert len(feed._forks[0].steps) <= 8
    feed.end_round(0)
    feed.deliver()
    numbers = [number for number, _ in heard.steps()]
    assert numbers == list(range(1, 101, 16))
    assert heard.steps()[-1] == (97, 97)


def test_all_hear_of_everything_before_one_of_them_ends_the_run():
    class Ends(atn.Callback):
        def on_step(self, step):
            if step.step == 2:
                raise atn.StopTraining("enough")

    heard = Heard()
    _, rows, feed = make(Ends(), heard, log_every=1)
    for number in (1, 2, 3):
        feed.step(step(number), fork=-1)
    with pytest.raises(atn.StopTraining, match="enough"):
        feed.deliver()
    assert [number for number, _ in heard.steps()] == [1, 2, 3] == [at for at, _ in rows]


def test_an_error_is_not_told_twice_and_hides_nothing_after_it():
    class Fails(atn.Callback):
        def on_step(self, step):
            if step.step == 2:
                raise RuntimeError("its own")

    heard = Heard()
    _, rows, feed = make(Fails(), heard, log_every=1)
    for number in (1, 2, 3):
        feed.step(step(number), fork=-1)
    with pytest.raises(RuntimeError, match="its own"):
        feed.deliver()
    feed.deliver()
    assert [number for number, _ in heard.steps()] == [1, 3]
    assert [at for at, _ in rows] == [1, 2, 3]


@pytest.mark.parametrize("cut", range(12))
def test_another_process_goes_on_wherever_the_first_one_was(cut):
    """With what was known and not told yet, means and forks included."""

    def drive(feed, history, numbers):
        for number in numbers:
            fork = (number - 4) // 2 if 4 <= number < 8 else -1
            feed.step(step(number, loss=number), fork=fork)
            if number == 7:
                history.discard(3, 5)
                decision = {"end": 7, "chosen": {"r": 0.2}}
                history.rounds.append(decision)
                feed.end_round(1, decision)
            if number % 3 == 0:
                feed.deliver()

    def whole():
        heard = Heard()
        history, rows, feed = make(heard, log_every=4)
        drive(feed, history, range(1, 12))
        feed.finish(history)
        return heard, rows

    expected, expected_rows = whole()
    first, second = Heard(), Heard()
    history, rows, feed = make(first, log_every=4)
    drive(feed, history, range(1, cut + 1))
    kept = feed.to_dict()
    assert kept == literal_eval(repr(kept))  # plain data: a pickle of it names no class
    kept = json.loads(json.dumps(kept))
    _, later_rows, feed = make(second, log_every=4)
    feed._history = history
    feed.load(kept, step=cut)
    drive(feed, history, range(cut + 1, 12))
    feed.finish(history)
    assert first.steps() + second.steps() == expected.steps()
    assert rows + later_rows == expected_rows


def test_nobody_there_costs_nothing():
    history = atn.History(("r",))
    feed = Feed(history, (), (), log_every=10)
    assert not feed.is_open and not feed.hears_steps
    feed.read(3, 0.5, {})
    feed.rewind(3, 1, is_rollback=True)
    feed.deliver()
    assert not feed._queue


def test_who_hears_of_decisions_alone_is_told_of_no_steps():
    heard = []
    feed = Feed(atn.History(("r",)), [heard.append], (), log_every=10)
    assert feed.is_open and not feed.hears_steps


@pytest.mark.parametrize("log_every", [0, -1, 1.5, True, None])
def test_a_log_every_out_of_range(log_every):
    with pytest.raises(ValueError, match="log_every must be an integer"):
        Feed(atn.History(("r",)), (), (), log_every=log_every)
