"""Whatever a step may have to do besides, it asks once whether there is anything."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest


def reached(text):
    """The lines of a program's text that every run executes: those of loops' and branches' own programs are not."""
    parts = {}
    for part in re.split(r"\n(?=(?:ENTRY )?%)", text):
        parts[re.match(r"(?:ENTRY )?%([\w.\-]+)", part)[1] if part.lstrip("ENTRY ").startswith("%") else ""] = part
    entry = re.search(r"\nENTRY %([\w.\-]+)", text)[1]
    todo, seen = [entry], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in parts[name].splitlines():
            yield line
            todo += re.findall(r"(?:to_apply|calls)=%([\w.\-]+)", line)


@pytest.mark.parametrize(("off", "questions"), [("one_turn", 1), ("", 2)])
@pytest.mark.parametrize("memory", ["keep-winner", pytest.param("drift", marks=pytest.mark.soak)])
def test_a_step_asks_once(toy, monkeypatch, memory, off, questions):
    """On CPUs, where asking costs nothing, the inner optimizer's update is a loop of one turn too, in its place."""
    monkeypatch.setenv("AUTOTUNENET_COMPILER_OFF", off)
    optimizer = toy.wrapped(memory=memory)

    def step(params, state, x):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p["hidden"]) @ p["out"])))(params)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    params = toy.make_params()
    text = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), jnp.ones((2, 4))).compile().as_text()
    )
    asked = [line for line in reached(text) if re.search(r" (?:while|conditional)\(", line)]
    assert len(asked) == questions
    # What is seldom done is in there.
    assert len(re.findall(r" while\(", text)) > questions
