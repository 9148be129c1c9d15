"""The tuner as a user makes it: what is refused, what states fit, and when a decay sets in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import state
from autotunenet_jax.controller.plan import NEVER, Recipe
from tests.controller.light import SPACES, run, told, tuner

RATE = SPACES["rate"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"total_steps": 1000.0}, TypeError, "total_steps must be an integer number of training steps"),
        ({"total_steps": True}, TypeError, "total_steps must be an integer"),
        ({"total_steps": 0}, ValueError, "total_steps must lie between 1"),
        ({"total_steps": 20}, ValueError, "total_steps must be at least 40"),
        ({"initial": {"momentum": 0.9}}, ValueError, "'momentum', which is not in the search space"),
        ({"initial": {"learning_rate": 2.0}}, ValueError, r"initial\['learning_rate'\] = 2.0 lies outside"),
        ({"mode": "maximise"}, ValueError, "mode must be 'min' or 'max'; got 'maximise'"),
        ({"max_share": 1.0}, ValueError, "max_share must lie strictly between 0 and 1; got 1.0"),
        ({"guard": 6.0}, TypeError, "guard must be a Guard; got 6.0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be an integer from 0 to 999; got -1"),
        ({"capacity": 8}, ValueError, "capacity must be an integer of at least 32; got 8"),
        ({"decay": "step"}, ValueError, "decay must be one of"),
    ],
)
def test_bad_arguments_name_the_rule(options, error, says):
    with pytest.raises(error, match=says):
        atn.AutoTuneNet(RATE, **{"total_steps": 1000, **options})


@pytest.mark.parametrize(
    ("loss", "error", "says"),
    [
        (np.ones(1), ValueError, r"scalar; got shape \(1,\).*Average"),
        (None, TypeError, "the loss must be a real number; got NoneType"),
        ("1.0", TypeError, "the loss must be a real number; got str"),
        (1j * np.ones(()), TypeError, "the loss must be a real number; got complex"),
    ],
)
def test_a_loss_that_is_none(loss, error, says):
    tuned = tuner()
    with pytest.raises(error, match=says):
        tuned.update(tuned.init(jax.random.key(0)), loss)


def test_numbers_of_numpy_are_as_good_and_a_seed_is_no_key():
    tuned = atn.AutoTuneNet(RATE, np.int64(1000), warmup_steps=np.int32(10), capacity=np.int64(40))
    assert (tuned.total_steps, tuned.core.warmup_steps, tuned.capacity) == (1000, 10, 40)
    with pytest.raises(TypeError, match=r"such as jax\.random\.key\(0\); got 0"):
        tuned.init(0)


def test_a_run_starts_where_it_is_told_to():
    space = {**SPACES["both"], "momentum": (0.0, 0.8)}
    tuned = atn.AutoTuneNet(space, 1000, initial={"learning_rate": 1e-2})
    begins = {name: float(value) for name, value in tuned.start().items()}
    assert begins == pytest.approx({"learning_rate": 1e-2, "momentum": 0.4, "dropout": 0.1}, rel=1e-5)
    at = tuned.space.decode(tuned.init(jax.random.key(0), start={"dropout": 0.3, "learning_rate": 1e-4}).incumbent)
    assert {name: float(v) for name, v in at.items()} == pytest.approx({**begins, "dropout": 0.3}, rel=1e-5)


def test_any_key_will_do_and_a_state_can_be_made_inside_a_compiled_function():
    tuned = tuner()
    typed, legacy = jax.random.key(3), jax.random.PRNGKey(3)
    states = [tuned.init(typed), tuned.init(legacy), jax.jit(tuned.init)(typed)]
    for other in states[1:]:
        assert jax.tree.map(jax.typeof, states[0]) == jax.tree.map(jax.typeof, other)
        np.testing.assert_array_equal(jax.random.key_data(states[0].key), jax.random.key_data(other.key))
    # No two leaves share a buffer: the state can be donated.
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(states[0]._replace(key=typed))]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize(
    ("space", "options", "differs"),
    [
        ({"learning_rate": (1e-5, 0.5)}, {}, "another search space"),
        ({**RATE, "dropout": (0.0, 0.5)}, {}, "another search space and plan"),
        (RATE, {"total_steps": 500}, "another plan: total_steps was 400, and is 500 here"),
        (RATE, {"max_share": 0.1}, "another plan"),
        (RATE, {"recipe": Recipe(first=0.08)}, "another plan"),
        (RATE, {"guard": atn.Guard(sigmas=9.0)}, "another policy"),
        (RATE, {"warmup_steps": 10}, "another policy"),
        (RATE, {"mode": "max"}, "another policy"),
        (RATE, {"decay": "cosine"}, "another policy"),
        (RATE, {"schedule": optax.linear_schedule(1.0, 0.0, 400)}, "another policy"),
    ],
)
def test_a_state_of_another_tuner_is_refused_and_what_differs_is_named(space, options, differs):
    ts = tuner().init(jax.random.key(0))
    tuner().check(ts)
    other = atn.AutoTuneNet(space, **{"total_steps": 400, **options})
    with pytest.raises(ValueError, match=rf"was made with {differs}\."):
        other.check(ts)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"schedule": optax.warmup_cosine_decay_schedule(0.0, 1.0, 40, 400)},
        lambda: {"decay": lambda spent: 1.0 - spent},
    ],
)
def test_a_function_of_the_same_values_is_the_same_policy(options):
    """As it is in another process, where the run goes on."""
    made, again = (atn.AutoTuneNet(RATE, 400, **options()) for _ in range(2))
    again.check(made.init(jax.random.key(0)))
    again.check(jax.jit(made.init)(jax.random.key(0)))


def test_a_state_of_another_version_is_refused():
    ts = tuner().init(jax.random.key(0))._replace(format=jnp.int32(state.FORMAT - 1))
    with pytest.raises(ValueError, match=f"has format {state.FORMAT - 1}, this version reads {state.FORMAT}"):
        tuner().check(ts)


def test_a_mode_is_the_sign_of_the_metric():
    highest, lowest = (atn.AutoTuneNet(RATE, 400, mode=mode) for mode in ("max", "min"))
    a = highest.observe_eval(highest.init(jax.random.key(0)), 0.75)
    b = lowest.observe_eval(lowest.init(jax.random.key(0)), -0.75)
    assert float(a.validation.level) == -0.75
    # A state is only good for the mode it was made with.
    a, b = (ts._replace(key=0, fingerprint=0) for ts in (a, b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("decay", ["hold", "linear", "cosine", "none"])
def test_a_decay_that_is_asked_for_ends_at_zero(decay):
    tuned = atn.AutoTuneNet(RATE, decay=decay)
    ts = tuned.anneal(tuned.init(jax.random.key(0))._replace(phase=jnp.int32(state.TRAIN)), 50)
    rates = [float(tuned.hyperparams(ts._replace(step=jnp.int32(at)))["learning_rate"]) for at in (1, 25, 50)]
    assert rates[0] > rates[1] > rates[2] >= 0.0
    assert rates[2] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.usefixtures("light_surrogate")
def test_an_open_ended_run_anneals_when_asked_and_holds_no_more_rounds():
    tuned = tuner("rate", None)
    losses = (2.0 * np.exp(-np.arange(400) / 100)).astype(np.float32)
    rows, ts = run(tuned, told(losses))
    settled = rows["hp"]["learning_rate"][-50:]
    assert np.all(settled == settled[0])  # no decay is planned
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        tuned.anneal(ts, 0)
    ts = tuned.anneal(ts, 50)
    rate = jax.jit(jax.vmap(lambda step: tuned.hyperparams(ts._replace(step=step))["learning_rate"]))
    np.testing.assert_allclose(rate(400 + np.arange(60)), settled[0] * np.maximum(1 - np.arange(60) / 50, 0), rtol=1e-4)
    assert np.all(ts.plan.start == NEVER)
    assert int(ts.phase) == state.TRAIN and int(ts.segment_left) == NEVER


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_flags_that_raise_at_every_nan_are_refused_at_the_start(flag):
    tuner = atn.AutoTuneNet(RATE, 300)
    jax.config.update(flag, True)
    try:
        with pytest.raises(ValueError, match=f"{flag} would stop the tuner.*Switch it off"):
            tuner.init(jax.random.key(0))
    finally:
        jax.config.update(flag, False)
