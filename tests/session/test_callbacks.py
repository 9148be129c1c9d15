"""What callbacks are, and the one that ends a run."""

import math

import pytest

import autotunenet_jax as atn
from autotunenet_jax.session.callbacks import HOOKS, as_callbacks


def history(mode="min"):
    return atn.History(("r",), mode=mode)


def reading(step, value):
    return atn.Reading(step, step, value, {})


def begun(mode="min", **options):
    stopping = atn.EarlyStopping(**options)
    stopping.on_begin(history(mode))
    return stopping


def heard(stopping, values, start=0):
    """Number of readings until it asks for the end; None if it does not."""
    for number, value in enumerate(values):
        try:
            stopping.on_validation(reading(start + 10 * number, value))
        except atn.StopTraining:
            return number + 1
    return None


def test_patience_counts_readings_without_improvement():
    assert heard(begun(patience=2), [3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.5]) == 6
    assert heard(begun(patience=3), [3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.5]) is None
    assert heard(begun("max", patience=2), [0.1, 0.5, 0.4, 0.5]) == 4


def test_an_improvement_below_min_delta_is_none():
    falling = [1.0 - 0.01 * n for n in range(12)]
    assert heard(begun(patience=4), falling) is None
    assert heard(begun(patience=4, min_delta=0.015), falling) is None  # every second one is far enough below
    assert heard(begun(patience=4, min_delta=0.05), falling) == 5


def test_a_metric_that_is_not_finite_is_no_improvement():
    assert heard(begun(patience=2), [math.nan, math.nan]) == 2
    assert heard(begun(patience=2), [1.0, math.inf, math.nan]) == 3


def test_what_a_rollback_took_back_does_not_count_and_what_the_tuner_took_back_does():
    for is_rollback, expected in ((True, None), (False, 1)):
        stopping = begun(patience=3)
        assert heard(stopping, [1.0, 2.0, 2.0]) is None
        stopping.on_rewind(atn.Rewind(25, 12, 12, is_rollback))
        assert heard(stopping, [2.0], start=30) == expected


def test_the_reason_says_since_when():
    stopping = begun(patience=1)
    stopping.on_validation(reading(10, 0.25))
    with pytest.raises(atn.StopTraining, match=r"did not improve in 1 readings since 0\.25 at step 10"):
        stopping.on_validation(reading(20, 0.5))


def test_it_counts_on_in_another_process_and_anew_in_another_run():
    first, second = begun(patience=3), begun(patience=3)
    heard(first, [1.0, 2.0, 2.0])
    second.load_state_dict(first.state_dict())
    assert heard(second, [2.0], start=30) == 1
    with pytest.raises(atn.StopTraining):
        begun(patience=3).load_state_dict(second.state_dict())
    second.on_begin(history())
    assert heard(second, [5.0, 6.0, 6.0]) is None


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": 1.5}, {"patience": True}])
def test_a_patience_out_of_range(options):
    with pytest.raises(ValueError, match="patience must be an integer of at least 1"):
        atn.EarlyStopping(**options)


@pytest.mark.parametrize("min_delta", [-0.1, math.inf, math.nan])
def test_a_min_delta_out_of_range(min_delta):
    with pytest.raises(ValueError, match="min_delta"):
        atn.EarlyStopping(patience=1, min_delta=min_delta)


def test_what_may_be_a_callback():
    class Some:
        def on_end(self, history):
            self.ended = history

    heard, some = [], Some()
    plain, partial, whole = as_callbacks([heard.append, some, atn.EarlyStopping(patience=1)])
    for callback in (plain, partial, whole):
        assert all(callable(getattr(callback, name)) for name in HOOKS)
    plain.on_decision({"end": 3})
    plain.on_step(None)
    partial.on_decision({})
    partial.on_end("over")
    assert heard == [{"end": 3}] and some.ended == "over"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([atn.EarlyStopping], r"Call it: EarlyStopping\(\)"),
        ([3], "must be a Callback"),
        (atn.EarlyStopping(patience=1), "Put it into a list"),
        (print, "Put it into a list"),
    ],
)
def test_what_may_not(given, message):
    with pytest.raises(TypeError, match=message):
        as_callbacks(given)
