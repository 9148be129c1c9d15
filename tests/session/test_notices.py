"""What a user is told, and that it is told once."""

import logging
import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest

import autotunenet_jax as atn
from autotunenet_jax.session.notices import Notices, notices
from autotunenet_jax.session.progress import Progress
from autotunenet_jax.session.recorder import Recorder
from autotunenet_jax.user_warning import warn

NAMES = ("learning_rate", "weight_decay", "dropout")
SPACE = {"learning_rate": (1e-4, 1e-1), "weight_decay": (1e-5, 1e-1), "dropout": (0.0, 0.5)}


def made(*, space=SPACE, mode="min", step=0, bad=0, rollbacks=0, level=None, at=None):
    tuner = atn.AutoTuneNet(space, 1000, mode=mode)
    ts = tuner.init(jax.random.key(0))
    health = ts.health._replace(bad_steps=jnp.int32(bad))
    ts = ts._replace(step=jnp.int32(step), health=health, rollbacks=jnp.int32(rollbacks))
    if level is not None:
        ts = ts._replace(validation=ts.validation._replace(level=jnp.float32(level)))
    if at is not None:
        ts = ts._replace(incumbent=tuner.space.encode(dict(zip(NAMES, at, strict=True))))
    return tuner, ts


def kinds(*state, **options):
    return [notice.kind for notice in notices(*state, **options)]


def a_round(best, *values, scores=None):
    scores = [0.5 + 0.1 * (number != best) for number in range(len(values))] if scores is None else scores
    forks = [
        {"hyperparams": dict(zip(NAMES, row, strict=True)), "scores": [] if score is None else [score]}
        for row, score in zip(values, scores, strict=True)
    ]
    return {"best": best, "forks": forks, "kind": "fast", "scored_by": "validation"}


def test_a_healthy_run_is_told_nothing():
    rounds = [a_round(0, (1e-2, 1e-3, 0.1), (3e-2, 1e-4, 0.2))]
    assert kinds(*made(step=1000, bad=3, rollbacks=2, level=0.4), rounds=rounds, is_over=True) == []


@pytest.mark.parametrize(("step", "bad", "is_told"), [(200, 9, False), (200, 11, True), (5000, 40, False)])
def test_a_share_of_bad_steps(step, bad, is_told):
    found = notices(*made(step=step, bad=bad, level=1.0), rounds=[])
    assert bool(found) == is_told
    assert not is_told or f"{bad} of {step} steps" in found[0].message


def test_many_rollbacks():
    assert kinds(*made(step=300, rollbacks=4, level=1.0), rounds=[]) == []
    assert "6 times" in notices(*made(step=300, rollbacks=6, level=1.0), rounds=[])[0].message


@pytest.mark.parametrize(("mode", "other"), [("min", "max"), ("max", "min")])
def test_a_metric_that_is_never_better_than_untrained(mode, other):
    sign = 1.0 if mode == "min" else -1.0
    state = made(mode=mode, level=1.0, step=400)

    def told(values):
        found = notices(*state, rounds=[], evals=[{"value": sign * value} for value in values])
        return [notice.message for notice in found]

    wrong = [0.1, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8]
    (message,) = told(wrong)
    assert f'mode="{other}"' in message and "None of 9" in message
    assert told(wrong[:9]) == told([*wrong, 0.09]) == told([]) == []


@pytest.mark.parametrize(("scored_by", "is_told"), [("training loss", True), ("validation", False)])
def test_a_metric_that_came_but_not_when_it_was_asked_for(scored_by, is_told):
    rounds = [{**a_round(-1, (1e-2, 1e-3, 0.1), scores=[None]), "kind": "slow", "scored_by": scored_by}]
    found = notices(*made(step=400, level=0.4), rounds=rounds)
    assert [notice.kind for notice in found] == ["no metric"] * is_told
    assert not is_told or "dropout, weight_decay stay as they start" in found[0].message
    assert not is_told or "none came when it was asked for" in found[0].message


@pytest.mark.parametrize(("unusable", "good", "is_told"), [(1, 1, False), (2, 0, True), (2, 8, True), (2, 9, False)])
def test_metrics_that_are_not_finite(unusable, good, is_told):
    evals = [{"value": float("nan")}] * unusable + [{"value": 0.3}] * good
    found = notices(*made(step=300, level=1.0), rounds=[], evals=evals)
    assert [notice.kind for notice in found] == ["unusable metrics"] * is_told
    assert not is_told or f"{unusable} of {len(evals)} validation metrics" in found[0].message


def test_a_metric_that_never_came_is_missed_late():
    assert kinds(*made(step=100), rounds=[]) == []
    assert kinds(*made(step=400, mode="max"), rounds=[]) == ["no metric", "nothing to maximise"]
    message = notices(*made(step=400), rounds=[])[0].message
    assert message.startswith("dropout, weight_decay stay as they start: only") and "leave them out" in message
    one = {name: SPACE[name] for name in ("learning_rate", "dropout")}
    message = notices(*made(space=one, step=400), rounds=[])[0].message
    assert message.startswith("dropout stays as it starts: only") and "leave it out" in message


@pytest.mark.parametrize(
    ("best", "is_told"),
    [
        ((1e-1, 1e-3, 0.1), ["bound of learning_rate"]),
        ((1e-4, 1e-3, 0.1), ["bound of learning_rate"]),
        ((1e-2, 1e-5, 0.1), ["bound of weight_decay"]),
        ((1e-2, 1e-3, 0.0), []),  # nothing lies below
        ((1e-2, 1e-3, 0.5), ["bound of dropout"]),
    ],
)
def test_a_choice_at_a_bound(best, is_told):
    rounds = [a_round(1, (1e-3, 1e-2, 0.2), best)]
    assert kinds(*made(step=400, level=1.0, at=best), rounds=rounds) == is_told
    assert kinds(*made(step=200, level=1.0, at=best), rounds=rounds) == []  # later rounds may lead away


@pytest.mark.parametrize(("rate", "is_told"), [(1e-4, False), (1e-1, True)])
def test_a_lower_bound_that_going_back_has_led_to_is_none(rate, is_told):
    at = (rate, 1e-3, 0.1)
    tuner, state = made(step=400, level=1.0, at=at)
    state = state._replace(validation=state.validation._replace(retreats=jnp.int32(3)))
    assert ("bound of learning_rate" in kinds(tuner, state, rounds=[a_round(1, (1e-3, 1e-2, 0.2), at)])) == is_told


@pytest.mark.parametrize(("rate", "level", "is_told"), [(6e-2, 1.0, False), (6e-2, None, True), (3e-2, None, False)])
def test_what_counts_is_where_training_goes_on(rate, level, is_told):
    """A metric may have led below what won; without one rates stand a quarter of a decade below it."""
    rounds = [a_round(1, (1e-3, 1e-2, 0.2), (1e-1, 1e-3, 0.1))]
    told = kinds(*made(step=400, level=level, at=(rate, 1e-3, 0.1)), rounds=rounds)
    assert ("bound of learning_rate" in told) == is_told


def test_what_was_never_varied_was_never_chosen():
    at = (1e-2, 1e-5, 0.5)
    assert kinds(*made(step=400, level=1.0, at=at), rounds=[a_round(0, at, (3e-3, 1e-5, 0.5))]) == []


@pytest.mark.parametrize(("scores", "is_told"), [((2.3, 2.3), []), ((None, 2.3), ["bound of learning_rate"])])
def test_a_choice_at_a_bound_that_made_no_difference_is_none(scores, is_told):
    """As of a loss that never changes; a fork that failed has no score."""
    rounds = [a_round(1, (1e-2, 1e-3, 0.1), (1e-4, 1e-3, 0.1), scores=scores)]
    assert kinds(*made(step=400, level=1.0, at=(1e-4, 1e-3, 0.1)), rounds=rounds) == is_told


def test_a_value_outside_its_range_names_it():
    (notice,) = notices(*made(), rounds=[], outside={"weight_decay": 0.5})
    assert "weight_decay stands at 0.5" in notice.message and "1e-05" in notice.message


def test_each_is_told_once_also_after_a_resume(caplog):
    """Where a framework's logger tells it, the line of the event beside it would be a second time."""
    caplog.set_level(logging.INFO)
    told = []
    recorder = Recorder(atn.History(("learning_rate",)), atn.SearchSpace(SPACE), Progress(1, is_on=False), ())
    found = notices(*made(step=300, rollbacks=6, level=1.0), rounds=[])
    for _ in range(2):
        Notices(recorder, through=told.append).tell(300, found)
        books = recorder.to_dict()
        recorder.load(books, step=0)
    assert len(told) == 1 and not caplog.messages
    assert [(event["step"], event["kind"]) for event in recorder.history.events] == [(300, "many rollbacks")]


def test_each_is_told_once_where_a_history_holds_no_more_events(monkeypatch):
    history, told = atn.History(("learning_rate",)), []
    recorder = Recorder(history, atn.SearchSpace(SPACE), Progress(1, is_on=False), ())
    monkeypatch.setattr(recorder, "record", lambda *event: None)
    teller = Notices(recorder, through=told.append)
    for step in (300, 310):
        teller.tell(step, notices(*made(step=step, rollbacks=6, level=1.0), rounds=[]))
    assert len(told) == 1


def test_a_warning_points_at_the_users_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("something")
    assert pathlib.Path(caught[0].filename) == pathlib.Path(__file__)
