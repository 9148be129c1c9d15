"""A step that breaks the state does not happen, whatever part of the state it breaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import autotunenet_jax as atn
from autotunenet_jax.loop.sound_steps import sound_step, train
from tests import problem


def state_of(fill):
    """Every kind of leaf a state may hold, of awkward shapes."""
    return {
        "matrix": jnp.full((5, 3), fill),
        "deep": jnp.full((2, 1, 3, 1), fill, jnp.bfloat16),
        "half": jnp.full(7, fill, jnp.float16),
        "scalar": jnp.float32(fill),
        "complex": jnp.full(4, fill, jnp.complex64),
        "tiny": jnp.full(6, fill, jnp.float8_e5m2),
        "empty": jnp.zeros((0, 3)),
        "count": jnp.int32(fill),
        "key": jax.random.key(int(fill)),
        "mask": jnp.array([0.0, -jnp.inf, 0.0]),
    }


RUN = jax.jit(sound_step, donate_argnums=1)
FLOATS = ["matrix", "deep", "half", "scalar", "complex", "tiny"]


def ended(new, loss):
    state, told = RUN(new, state_of(1.0), jnp.float32(loss))
    return state, float(told)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
def test_one_number_that_is_not_finite_undoes_the_whole_step(name, value):
    new = state_of(2.0)
    leaf = new[name]
    new[name] = leaf.reshape(-1).at[-1].set(jnp.asarray(value, leaf.dtype)).reshape(leaf.shape)
    state, told = ended(new, 0.5)
    assert problem.same(state, state_of(1.0)) and np.isnan(told)


@pytest.mark.parametrize("loss", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_loss_that_is_not_finite_undoes_the_step(loss):
    state, told = ended(state_of(2.0), loss)
    assert problem.same(state, state_of(1.0)) and np.isnan(told)


def test_a_sound_step_stays_a_mask_of_infinities_included():
    state, told = ended(state_of(2.0), 0.5)
    assert problem.same(state, state_of(2.0)) and told == 0.5


@pytest.mark.parametrize("trained", ["matrix", "deep"])
def test_a_step_that_skipped_its_own_update_keeps_what_else_it_changed(trained):
    """Dynamic loss scaling: without it a scale that is too large would never fall."""
    old, new = state_of(1.0), state_of(2.0)
    skipped = {**new, "matrix": old["matrix"], "deep": old["deep"]}
    state, told = ended(skipped, jnp.inf)
    assert problem.same(state, skipped) and np.isnan(told)
    assert problem.same(ended({**skipped, trained: new[trained]}, jnp.inf)[0], old)
    assert problem.same(ended({**skipped, "scalar": jnp.float32(jnp.nan)}, jnp.inf)[0], old)


def in_place(state, batch, hp):
    state["w"] = state["w"] - hp["learning_rate"] * batch
    return state, jnp.sum(state["w"])


def merged(state, batch, hp):
    """What `nnx.merge` gives writes into the variables of the state that it was made of."""
    graph = nnx.graphdef(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model = nnx.merge(graph, state)
    model.kernel[...] -= hp["learning_rate"] * batch
    return nnx.state(model), jnp.sum(model.kernel[...])


@pytest.mark.parametrize("train_step", [in_place, merged])
def test_a_step_that_writes_into_the_state_it_is_given_does_not_happen_either(train_step):
    state = {"w": jnp.ones(2)} if train_step is in_place else nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    step = jax.jit(lambda state, batch: train(train_step, state, batch, {"learning_rate": 0.1}, has_aux=False))
    done = step(state, jnp.ones(2))
    assert not problem.same(done.state, state) and done.told == done.loss
    undone = step(state, jnp.full(2, jnp.nan))
    assert problem.same(undone.state, state) and np.isnan(undone.told)


@pytest.mark.filterwarnings("ignore:The best learning_rate lies at")
def test_a_run_under_dynamic_loss_scaling_finds_its_scale():
    """The scaled loss overflows above 2**9; the step then halves the scale and leaves the rest as it was."""

    def train_step(state, batch, hp):
        inner, loss = problem.train_step(state["inner"], batch, hp)
        is_fit = state["scale"] <= 2.0**9
        inner = jax.tree.map(lambda a, b: jnp.where(is_fit, a, b), inner, state["inner"])
        return {"inner": inner, "scale": jnp.where(is_fit, state["scale"], state["scale"] / 2)}, jnp.where(
            is_fit, loss, jnp.inf
        )

    state = {"inner": problem.new_state(), "scale": jnp.float32(2.0**24)}
    with pytest.warns(UserWarning, match="were skipped"):
        result = atn.fit(train_step, state, problem.batches, tuner=problem.tuner(), progress=False)
    assert float(result.state["scale"]) == 2.0**9
    assert float(problem.eval_step(result.state["inner"])) < 0.1


def test_infinities_may_move_and_go_and_large_numbers_are_none():
    new = {**state_of(2.0), "mask": jnp.array([-jnp.inf, 0.0, 0.0]), "matrix": jnp.full((5, 3), 3e38)}
    assert problem.same(ended(new, 0.5)[0], new)
    gone = {**new, "mask": jnp.zeros(3)}
    assert problem.same(ended(gone, 0.5)[0], gone)
    more = {**new, "mask": jnp.array([-jnp.inf, 0.0, -jnp.inf])}
    assert problem.same(ended(more, 0.5)[0], state_of(1.0))


def test_a_run_skips_bad_steps_and_nothing_of_them_is_left():
    """In one of seven batches the loss, in one of eleven a moment that no loss ever tells of."""

    def train_step(state, batch, hp):
        inner, loss = problem.train_step(state["inner"], batch[:3], hp)
        moment = jnp.where(batch[3] == 2, jnp.inf, state["moment"] * 0.9 + 0.1)
        return {"inner": inner, "moment": moment}, jnp.where(batch[3] == 1, jnp.nan, loss)

    def batches(step, hp):
        code = 1 if step % 7 == 0 else 2 if step % 11 == 0 else 0
        return (*problem.batch(step), np.int32(code))

    state = {"inner": problem.new_state(), "moment": jnp.ones(3)}
    with pytest.warns(UserWarning, match="steps .* were skipped") as caught:
        result = atn.fit(train_step, state, batches, tuner=problem.tuner(), progress=False)
    assert len(caught) == 1
    rows = [row for row in result.history.records if row["is_kept"]]
    taken = [row["data_step"] - 1 for row in rows]
    assert all(position % 7 and position % 11 for position in taken)
    assert int(result.state["inner"]["seen"]) == sum(taken)
    assert bool(jnp.all(jnp.isfinite(result.state["moment"])))
    assert result.history.summary["rollbacks"] == 0
    assert float(problem.eval_step(result.state["inner"])) < 0.1


WRECKS = -7


def wrecking_step(state, batch, hp):
    """A batch of that number multiplies what was trained by ten thousand: finite, and worth nothing."""
    state, loss = problem.train_step(state, batch, hp)
    size = jnp.where(batch[2] == WRECKS, 1e4, 1.0)
    return {**state, "params": jax.tree.map(lambda leaf: leaf * size, state["params"])}, loss


class Rewinds(atn.Callback):
    def __init__(self):
        self.told = []

    def on_rewind(self, rewind):
        self.told.append(rewind)


@pytest.mark.parametrize("before_the_end", [0, 1, 2])
def test_a_state_that_the_last_steps_wreck_is_not_returned_where_no_metric_tells(before_the_end):
    calls = iter(range(-1, 10**6))  # the first batch is asked for once more, before the run

    def batches(position, hp):
        x, y, number = problem.batch(position)
        return x, y, np.int32(WRECKS) if next(calls) == problem.TOTAL_STEPS - 1 - before_the_end else number

    heard = Rewinds()
    tuner = problem.tuner(1e-3)
    result = atn.fit(wrecking_step, problem.new_state(), batches, tuner=tuner, progress=False, callbacks=[heard])
    assert float(problem.eval_step(result.state)) < 0.1
    assert result.history.events[-1]["kind"] == "rollback"
    assert heard.told[-1].is_rollback
    assert not any(row["is_kept"] for row in result.history.records if row["step"] > heard.told[-1].back_to)
