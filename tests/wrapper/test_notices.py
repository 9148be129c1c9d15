"""What the user is told where the host looks, each thing in one text that stays the same."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.compiler import packing
from autotunenet_jax.session.notices import notices

SPACE = {"learning_rate": (1e-4, 1.0), "weight_decay": (1e-6, 1e-2)}


@pytest.fixture(scope="module")
def started():
    opt = atn.autotune(optax.adamw, SPACE, 1000, learning_rate=1e-2, weight_decay=1e-4)
    return opt.init({"w": jnp.ones(3)})


def heard(state, **changes):
    """The texts for a run in ordinary training after its first rounds, a metric told, nothing wrong but the changes."""
    course = state.course
    ts = course.tuner._replace(step=jnp.int32(500), phase=jnp.int32(0), round=course.tuner.round._replace(index=2))
    ts = ts._replace(validation=ts.validation._replace(level=jnp.float32(1.0)))
    course = course._replace(**{name: changes.pop(name) for name in set(changes) & set(course._fields)})
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        value = jnp.asarray(value)
        ts = ts._replace(**{part: getattr(ts, part)._replace(**{field: value})} if part else {field: value})
    packed = packing.pack(jax.tree.map(jnp.asarray, course._replace(tuner=ts)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        atn.hyperparams(jax.block_until_ready(state._replace(packed=packed)))
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_nothing_is_said_of_a_run_that_goes_well(started):
    assert heard(started) == []
    assert heard(started, health__bad_steps=jnp.int32(9), rollbacks=jnp.int32(3)) == []
    assert heard(started, home=jnp.int32(1), attempts=jnp.int32(60)) == []
    assert heard(started, home=jnp.int32(0), attempts=jnp.int32(30)) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"incumbent": jnp.array([0.99, 0.5], jnp.float32)}, "learning_rate lies at the upper bound of its range, 1;"),
        (
            {"incumbent": jnp.array([0.0, 0.5], jnp.float32)},
            "learning_rate lies at the lower bound of its range, ",
        ),
        ({"validation__level": jnp.float32(jnp.nan)}, "weight_decay stays as it starts: only a validation metric"),
        ({"health__bad_steps": jnp.int32(60)}, "or 1% of them, were skipped or more"),
        ({"health__bad_steps": jnp.int32(10)}, "or 1% of them, were skipped or more"),
        ({"rollbacks": jnp.int32(5)}, "went back to a snapshot 5 times or more"),
        ({"step": jnp.int32(1001)}, "more updates than its total_steps"),
        ({"home": jnp.int32(1), "attempts": jnp.int32(30)}, "something after autotune in the chain changes them"),
    ],
)
def test_one_thing_is_said_in_one_text(started, changes, text):
    (said,) = heard(started, **changes)
    assert text in said
    assert heard(started, **changes) == [said]


@pytest.mark.parametrize(("bad", "rollbacks"), [(9, 4), (12, 4), (9, 5), (50, 6)])
def test_it_says_what_the_history_says(started, bad, rollbacks):
    said = heard(started, step=jnp.int32(800), health__bad_steps=jnp.int32(bad), rollbacks=jnp.int32(rollbacks))
    ts = started.tuner._replace(step=800, rollbacks=rollbacks, health=started.tuner.health._replace(bad_steps=bad))
    ts = ts._replace(validation=ts.validation._replace(level=1.0))
    told = {notice.kind for notice in notices(atn.AutoTuneNet(SPACE, 1000), ts, rounds=[])}
    words = {"bad steps": "skipped", "many rollbacks": "snapshot"}
    assert told == {kind for kind, word in words.items() if word in str(said)}


def test_values_at_a_bound_in_a_fork_are_no_choice(started):
    assert heard(started, incumbent=jnp.array([1.0, 0.5], jnp.float32), phase=jnp.int32(2)) == []
