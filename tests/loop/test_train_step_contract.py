"""What `fit` says of a training step or a validation that it cannot use, before it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.loop import fit as fit_module
from autotunenet_jax.loop import train_step_contract
from tests import problem


def fit(*, train_step=problem.train_step, eval_step=problem.eval_step, tuner=None, **options):
    given = {"tuner": problem.tuner() if tuner is None else tuner, "eval_step": eval_step, "progress": False}
    return atn.fit(train_step, problem.new_state(), problem.batches, **given, **options)


@pytest.mark.parametrize(
    "reader",
    [
        lambda hp: dict(hp.items())["noise"],
        lambda hp: (lambda learning_rate, noise: noise)(**hp),
        lambda hp: jax.tree.map(lambda value: value, hp)["noise"],
        lambda hp: jax.jit(lambda values: values["noise"])(hp),
        lambda hp: {name: hp[name] for name in hp}["noise"],
        lambda hp: list(hp.values())[1],
        lambda hp: hp.get("noise"),
        lambda hp: hp["noise"],
    ],
)
def test_a_hyperparameter_that_only_the_data_needs_is_no_mistake(reader):
    """However the batches read it."""
    reads = fit_module._Reads({"learning_rate": jnp.float32(0.1), "noise": jnp.float32(0.5)})
    assert reads.names == set()
    assert float(reader(reads)) == 0.5
    assert "noise" in reads.names
    train_step_contract.check_train_step(
        lambda state, batch, hp: (state, hp["learning_rate"]),
        {},
        None,
        dict(reads),
        used_elsewhere=reads.names,
        has_aux=False,
    )


def test_a_state_and_a_loss_in_the_wrong_order_are_told_so():
    def step(state, batch, hp):
        return problem.train_step(state, batch, hp)[::-1]

    with pytest.raises(TypeError, match=r"must return \(state, loss\), in this order"):
        fit(train_step=step)


def test_a_name_that_the_space_does_not_have_is_told_with_those_it_has():
    with pytest.raises(KeyError) as caught:
        fit(train_step=lambda state, batch, hp: (state, hp["learning_rat"]))
    assert any("hp holds what is tuned: 'learning_rate'." in note for note in caught.value.__notes__)


def test_arguments_in_another_order_are_told():
    with pytest.raises(KeyError) as caught:
        fit(train_step=lambda state, hp, batch: (batch[0], hp["learning_rate"]))
    assert any("train_step(state, batch, hp)" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        ({"train_step": lambda state, batch: (state, 0.0)}, r"train_step\(state, batch, hp\)"),
        ({"eval_step": lambda state, batch: 0.0}, r"eval_step\(state\)"),
        ({"callbacks": [lambda: None]}, r"callback\(decision\)"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_before_the_first_step(arguments, usage):
    with pytest.raises(TypeError, match=f"does not take. Write it as {usage}"):
        fit(**arguments)


@pytest.mark.parametrize(("part", "kind"), [("tanh", "builtins.str"), (jax.nn.relu, "jax.custom_jvp")])
def test_what_a_state_cannot_hold_is_named(part, kind):
    with pytest.raises(TypeError, match=rf"state\['activation'\] is a {kind}.*outside it"):
        atn.fit(
            problem.train_step,
            {**problem.new_state(), "activation": part},
            problem.batches,
            tuner=problem.tuner(),
            progress=False,
        )


@pytest.mark.parametrize("owner", ["train_step", "eval_step"])
def test_what_cannot_be_compiled_is_told_that_it_is(owner):
    def step(state, batch, hp):
        state, loss = problem.train_step(state, batch, hp)
        return state, jnp.float32(float(loss))

    functions = {"eval_step": lambda state: np.mean(np.asarray(state["params"]["w"])), "train_step": step}
    with pytest.raises(TypeError) as caught:
        fit(**{owner: functions[owner]})
    assert any(note.startswith(f"{owner} is compiled") and "jax.numpy" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("eval_step", "says"),
    [
        (lambda state: state["params"]["w"], r"one real scalar.*it returned float32\[8\]"),
        (lambda state: (problem.eval_step(state), 1.0), "it returned tuple"),
        (lambda state: state["seen"], "it returned dtype int32. Cast"),
    ],
)
def test_an_eval_step_that_is_no_metric(eval_step, says):
    with pytest.raises(ValueError, match=says):
        fit(eval_step=eval_step)


def test_an_unused_name_lists_what_the_optimizer_has():
    tuner = atn.AutoTuneNet({**problem.SPACE, "momentun": (0.0, 0.9)}, problem.TOTAL_STEPS)
    with pytest.raises(ValueError, match=r"never uses 'momentun'.*the optimizer has \(b1, b2, eps, eps_root, learning"):
        fit(tuner=tuner)
