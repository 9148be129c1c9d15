"""What the user is told before training starts: the rule, the value, and what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import autotunenet_jax as atn
from tests import problem
from tests.contract import conftest as toy


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({}, "empty"),
        ({"learning_rate": (1e-1, 1e-5)}, "reversed"),
        ({"learning_rate": (1e-3, 1e-3)}, "equal"),
        ({"learning_rate": (1e-3, float("inf"))}, "finite"),
        ({"learning_rate": (float("nan"), 1.0)}, "finite"),
    ],
)
def test_bad_spaces(space, says):
    with pytest.raises(ValueError, match=says):
        atn.AutoTuneNet(space, 1000)


def test_a_log_scale_needs_positive_bounds():
    with pytest.raises(ValueError, match="lo > 0"):
        atn.Float(0.0, 1.0, log=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"initial": {"momentum": 0.9}}, r"momentum.*it has learning_rate"),
        ({"initial": {"learning_rate": 10.0}}, r"10\.0 lies outside"),
        ({"total_steps": 10}, r"at least 40.*got 10"),
        ({"total_steps": 0}, "between 1 and"),
        ({"mode": "best"}, "'min' or 'max'; got 'best'"),
        ({"decay": "exponential"}, "hold, linear, cosine, none, or a function"),
        ({"decay": "linear", "schedule": optax.constant_schedule(1.0)}, "give one of them"),
        ({"schedule": optax.constant_schedule(0.0)}, "positive somewhere"),
        ({"schedule": optax.constant_schedule(1.0), "total_steps": None}, "needs total_steps"),
        ({"max_share": 1.5}, "between 0 and 1; got 1.5"),
        ({"capacity": 4}, "at least 32; got 4"),
        ({"warmup_steps": -1}, "from 0 to 999; got -1"),
        ({"warmup_steps": 1000}, "from 0 to 999; got 1000"),
    ],
)
def test_bad_tuners(options, says):
    with pytest.raises(ValueError, match=says):
        atn.AutoTuneNet(**{"param_space": problem.SPACE, "total_steps": 1000, **options})


@pytest.mark.parametrize(
    "options",
    [{"total_steps": 10.5}, {"total_steps": True}, {"guard": "strict"}, {"schedule": 0.1}, {"initial": 1e-3}],
)
def test_tuner_arguments_of_the_wrong_type(options):
    with pytest.raises(TypeError):
        atn.AutoTuneNet(**{"param_space": problem.SPACE, "total_steps": 1000, **options})


def fit(train_step=problem.train_step, batches=problem.batches, **options):
    calls = []

    def counted(step, hp):
        calls.append(step)
        return batches(step, hp)

    source = counted if callable(batches) else batches
    try:
        return atn.fit(train_step, problem.new_state(), source, progress=False, **{"tuner": problem.tuner(), **options})
    finally:
        assert calls in ([], [0])  # nothing was trained


def test_a_loss_that_is_no_scalar():
    def train_step(state, batch, hp):
        state, loss = problem.train_step(state, batch, hp)
        return state, jnp.stack([loss, loss])

    with pytest.raises(ValueError, match=r"scalar loss; it returned float32\[2\].*Average"):
        fit(train_step)


def test_no_pair():
    with pytest.raises(TypeError, match=r"pair \(state, loss\)"):
        fit(lambda state, batch, hp: problem.train_step(state, batch, hp)[1])


def test_an_integer_loss():
    with pytest.raises(ValueError, match="real loss"):
        fit(lambda state, batch, hp: (problem.train_step(state, batch, hp)[0], jnp.int32(1)))


def test_a_state_that_changes_its_structure_or_dtype():
    def drops(state, batch, hp):
        state, loss = problem.train_step(state, batch, hp)
        return {"params": state["params"]}, loss

    def casts(state, batch, hp):
        state, loss = problem.train_step(state, batch, hp)
        return {**state, "seen": state["seen"].astype(jnp.float32)}, loss

    with pytest.raises(ValueError, match="structure"):
        fit(drops)
    with pytest.raises(ValueError, match=r"\['seen'\] went in as int32\[\] and came out as float32"):
        fit(casts)


def test_a_name_the_optimizer_does_not_have():
    tuner = atn.AutoTuneNet({"learning_rat": (1e-5, 1e-1)}, 160)
    with pytest.raises(ValueError, match="learning_rat'; it has b1, b2, eps, eps_root, learning_rate"):
        fit(tuner=tuner)


def test_a_name_nobody_uses():
    tuner = atn.AutoTuneNet({**problem.SPACE, "momentun": (0.0, 0.9)}, 160)
    with pytest.raises(ValueError, match="never uses 'momentun'"):
        fit(tuner=tuner)
    tuner = atn.AutoTuneNet({**problem.SPACE, "act": ["relu", "gelu"]}, 160)
    with pytest.raises(ValueError, match=r"never uses 'act'.* the position of the option"):
        fit(tuner=tuner)


def test_a_rate_that_follows_a_schedule_of_its_own():
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.1, 0.0, 10))
    with pytest.raises(ValueError, match="follows an optax schedule"):
        atn.set_hyperparams(optimizer.init(jnp.zeros(2)), {"learning_rate": 0.1})


def test_an_optimizer_without_injected_hyperparameters():
    with pytest.raises(ValueError, match="inject_hyperparams"):
        atn.set_hyperparams(optax.adam(1e-3).init(jnp.zeros(2)), {"learning_rate": 0.1})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"batches": 3}, TypeError, "callable"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"tuner": "adam"}, TypeError, "AutoTuneNet"),
        ({"steps": 1000}, ValueError, "exceeds"),
        ({"eval_every": 0}, ValueError, "at least 1"),
        ({"tuner": atn.AutoTuneNet(problem.SPACE)}, ValueError, "steps="),
        ({"resume": True}, ValueError, "Give snapshots="),
        ({"monitor": "loss"}, ValueError, "there is no eval_step"),
        ({"snapshots": 5}, TypeError, "a folder or a Snapshots; got int"),
        ({"key": 3}, TypeError, r"jax.random.key\(0\); got int"),
        ({"callbacks": [atn.EarlyStopping(patience=5)]}, ValueError, "EarlyStopping goes by the validation metric"),
        ({"batches": {"x": jnp.ones(3)}}, TypeError, r"got dict. A batch that is always the same is \[batch\]"),
        ({"batches": (jnp.ones((8, 3)), jnp.ones(8))}, TypeError, r"float32\[3\], float32\[\].*like one batch"),
        ({"batches": [("text", jnp.ones(3))]}, TypeError, r"batch\[0\] is a builtins.str. Convert it"),
    ],
)
def test_bad_arguments_of_fit(options, error, says):
    with pytest.raises(error, match=says):
        fit(**options)


@pytest.mark.parametrize("batches", [lambda: 1, lambda step: 1])
def test_a_function_of_other_arguments_gives_no_batches(batches):
    with pytest.raises(TypeError, match=r"batches, a function, is called with the position.*batches\(step, hp\)"):
        atn.fit(problem.train_step, problem.new_state(), batches, tuner=problem.tuner(), progress=False)


def test_a_loss_by_another_name_than_optaxs():
    optimizer = atn.autotune(optax.adam, problem.SPACE, 100, learning_rate=1e-3)
    params = jnp.ones(3)
    with pytest.raises(TypeError, match=r"update\(grads, opt_state, params, value=loss\)"):
        optimizer.update(params, optimizer.init(params), params, loss=jnp.float32(1.0))


def test_what_the_optimizer_could_have_and_has_not_is_told_of():
    space = {**problem.SPACE, "momentum": (0.5, 0.99), "weight": (0.0, 1.0)}
    optimizer = atn.autotune(optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2), space, 1000)
    with pytest.warns(UserWarning, match="no hyperparameter 'momentum'; it has learning_rate.*momentum=0.9"):
        optimizer.init(jnp.ones(3))
    # A factory has it injected.
    state = atn.autotune(optax.sgd, space, 1000, learning_rate=1e-2).init(jnp.ones(3))
    assert "momentum" in state.inner.hyperparams


def test_a_model_that_is_a_tree_with_functions_in_it(monkeypatch):
    """As Equinox's are, whose gradients have None where a leaf is no array."""
    toy.lighten(monkeypatch.setattr)  # without the Gaussian process a step compiles in half the time
    optimizer = atn.autotune(optax.adam, problem.SPACE, 100, learning_rate=1e-3)
    model, grads = {"w": jnp.ones(3), "activation": jax.nn.relu}, {"w": jnp.ones(3), "activation": None}
    state = optimizer.init({"w": jnp.ones(3), "activation": None})
    step = jax.jit(lambda grads, state: optimizer.update(grads, state, model, value=jnp.float32(1.0)))
    updates, state = step(grads, state)
    assert updates["activation"] is None and jax.tree.structure(updates) == jax.tree.structure(grads)
    assert float(updates["w"][0]) < 0.0
    with pytest.raises(TypeError, match=r"params hold what is no array, such as a .*arrays alone"):
        optimizer.update({"w": jnp.ones(3)}, state, model, value=jnp.float32(1.0))


@pytest.mark.parametrize("value", [None, "0.5", jnp.ones(1), [0.5]])
def test_a_metric_that_is_no_scalar(value):
    optimizer = atn.autotune(optax.adam, problem.SPACE, 100, learning_rate=1e-3)
    with pytest.raises((TypeError, ValueError), match=r"the metric must be a (scalar|real number); got"):
        atn.observe_eval(optimizer.init(jnp.ones(3)), value)
