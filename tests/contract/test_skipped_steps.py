"""A step that cannot be used did not happen: not for parameters, moments, accumulations, nor what is handed over."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.wrapper import aux_state

MEMORIES = ("keep-winner", pytest.param("drift", marks=pytest.mark.soak))


def arrays_of(state):
    """What the inner optimizer keeps, its tuned values apart."""
    return jax.tree.leaves(state.inner.inner_state)


def accumulating(learning_rate):
    return optax.MultiSteps(optax.adam(learning_rate), every_k_schedule=3).gradient_transformation()


@pytest.fixture(scope="module", params=MEMORIES)
def stepped(request, toy):
    """One compiled step, in which the loss is replaced and the gradients multiplied."""
    handed = {"mean": jnp.zeros(8), "count": jnp.int32(0)}
    inner = optax.inject_hyperparams(accumulating)(learning_rate=1e-2)
    # Said at the start, since a state that makes room for it later is another program.
    opt = toy.wrapped(inner, memory=request.param, aux=handed)

    @jax.jit
    def step(params, state, aux, key, loss, factor):
        value, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        grads = {**grads, "out": grads["out"].at[1].multiply(factor)}
        aux = {"mean": 0.9 * aux["mean"] + 0.1 * grads["out"], "count": aux["count"] + 1}
        updates, state = opt.update(grads, state, params, value=value + loss, aux=aux)
        return optax.apply_updates(params, updates), state, atn.rewound(state, aux)

    params = toy.make_params()
    carry = (params, opt.init(params), handed)
    for key in toy.draws(5):
        carry = step(*carry, key, 0.0, 1.0)
    return step, carry


@pytest.mark.parametrize(
    ("loss", "factor"), [(np.nan, 1.0), (np.inf, 1.0), (0.0, np.nan), (0.0, -np.inf), (0.0, 1e20), (0.0, 1e7)]
)
def test_nothing_of_it_happens(stepped, toy, loss, factor):
    step, (params, state, aux) = stepped
    # In the middle of an accumulation, and where one ends.
    for _ in range(3):
        after, new, rest = step(params, state, aux, toy.draws(9)[8], loss, factor)
        jax.tree.map(np.testing.assert_array_equal, after, params)
        jax.tree.map(np.testing.assert_array_equal, arrays_of(new), arrays_of(state))
        jax.tree.map(np.testing.assert_array_equal, rest, aux)
        assert int(new.tuner.step) == int(state.tuner.step) + 1
        # What is not finite is told as such; a gradient that is merely too large says nothing against its loss.
        told = int(new.tuner.health.bad_steps) - int(state.tuner.health.bad_steps)
        assert told == (0 if factor == 1e7 else 1)
        params, state, aux = step(params, state, aux, toy.draws(1)[0], 0.0, 1.0)
        assert int(aux["count"]) == int(rest["count"]) + 1


def test_gradients_that_stay_large_are_taken_after_a_few(stepped, toy):
    step, (params, state, aux) = stepped
    taken = []
    for key in toy.draws(8):
        _, state, new = step(params, state, aux, key, 0.0, 1e7)
        taken.append(int(new["count"]) > int(aux["count"]))
        aux = new
    assert not any(taken[:3]) and all(taken[6:])


def test_a_finite_loss_whose_update_is_not_says_so_too(toy):
    """Gradients and loss are fine; the optimizer divides by zero."""
    inner = optax.chain(
        optax.stateless(lambda g, p: jax.tree.map(lambda x: x / jnp.where(jnp.max(g["hidden"]) > 5.0, 0.0, 1.0), g)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2),
    )
    opt = toy.wrapped(inner)
    params = toy.make_params()
    state = opt.init(params)
    update = jax.jit(lambda g, s: opt.update(g, s, params, value=jnp.float32(1.0)))
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = update(grads, state)
    updates, state = update({**grads, "hidden": grads["hidden"].at[0, 0].set(6.0)}, state)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert int(state.tuner.health.bad_steps) == 1


def test_only_whole_states_are_copied_and_the_run_goes_back_to_one(toy):
    """What is handed over becomes infinite, and no loss tells; an infinity that was there before is nobody's fault."""
    opt = toy.wrapped(aux=(jnp.ones(3), jnp.float32(jnp.inf)))

    @jax.jit
    def step(params, state, aux, i, key):
        loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        aux = (jnp.where(i == 80, jnp.inf, aux[0]), aux[1])
        updates, state = opt.update(grads, state, params, value=loss, aux=aux)
        return optax.apply_updates(params, updates), state, atn.rewound(state, aux)

    carry = (toy.make_params(), opt.init(toy.make_params()), (jnp.ones(3), jnp.float32(jnp.inf)))
    seen = 0
    for i, key in enumerate(toy.draws()):
        carry = step(*carry, i, key)
        seen += not bool(jnp.all(jnp.isfinite(carry[2][0])))
        for slot in (carry[1].saved, carry[1].kept):
            np.testing.assert_array_equal(slot.aux[0], 1.0)
    assert 1 <= seen <= 45
    np.testing.assert_array_equal(carry[2][0], 1.0)
    assert int(carry[1].tuner.slots.saved_step) > 20
    assert toy.quality(carry[0]) < 0.7 * toy.quality(toy.make_params())


def counting(toy, opt, steps=None):
    """Weights are averaged and steps counted beside the optimizer, in one scan; also the average after the run."""

    def step(carry, key):
        params, state, aux = carry
        loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        average = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, aux["average"], params)
        aux = {"average": average, "count": aux["count"] + 1}
        updates, state = opt.update(grads, state, params, value=loss, aux=aux)
        return (optax.apply_updates(params, updates), state, atn.rewound(state, aux)), None

    params = toy.make_params()
    carry = (params, opt.init(params), started(toy))
    return jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))(carry, toy.draws(steps or toy.TOTAL))[0]


def started(toy):
    return {"average": toy.make_params(), "count": jnp.int32(0)}


@pytest.mark.parametrize(
    "around", [*(pytest.param(name, marks=pytest.mark.soak) for name in ("nothing", "chain")), "MultiSteps"]
)
def test_what_is_handed_over_goes_back_with_losing_forks(toy, around):
    tuned = toy.wrapped(aux=started(toy))
    opt, steps = {
        "nothing": (tuned, toy.TOTAL),
        "chain": (optax.chain(optax.clip_by_global_norm(1.0), tuned), toy.TOTAL),
        "MultiSteps": (optax.MultiSteps(tuned, every_k_schedule=2), 2 * toy.TOTAL),
    }[around]
    params, state, aux = counting(toy, opt, steps)
    ts = toy.find(state).tuner
    assert int(ts.discarded) > 10
    # One more step may have been spent on the way.
    share = steps // toy.TOTAL
    lost = steps - int(aux["count"])
    assert 0.5 * share * int(ts.discarded) <= lost <= 2.0 * share * int(ts.discarded) + 8
    # The average of the weights that survived is near them: none of a lost fork is in it.
    assert toy.quality(aux["average"]) < 1.5 * toy.quality(params) + 1e-3


def test_room_is_made_at_the_first_update_where_none_was_made_before(toy):
    """For what is given then, in both snapshots, and a step goes from there as from a state that had it all along."""
    aux, params = started(toy), toy.make_params()
    late, early = toy.wrapped(), toy.wrapped(aux=aux)

    def step(opt, state, aux):
        _, state = opt.update(params, state, params, value=jnp.float32(1.0), aux=aux)
        return state, atn.rewound(state, aux)

    state = late.init(params)
    with_room, given = aux_state.with_room(state, aux)
    for held in (given, with_room.aux, with_room.saved.aux, with_room.kept.aux):
        jax.tree.map(np.testing.assert_array_equal, list(held), jax.tree.leaves(aux))
    shapes, other = (jax.eval_shape(functools.partial(step, opt), opt.init(params), aux) for opt in (late, early))
    assert jax.tree.structure(shapes) == jax.tree.structure(other)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(other)


def test_another_tree_is_refused(toy):
    opt = toy.wrapped(aux={"a": jnp.zeros(3)})
    params = toy.make_params()
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"aux must keep its structure: .*\(3,\).* and now .*\(4,\)"):
        opt.update(params, state, params, value=jnp.float32(1.0), aux={"a": jnp.zeros(4)})
    with pytest.raises(ValueError, match="of 1 arrays; got one of 2"):
        atn.rewound(state, (1.0, 2.0))
    with pytest.raises(TypeError, match="aux must be a tree of arrays; got str"):
        toy.wrapped(aux={"name": "x"})
    with pytest.raises(ValueError, match=r"no state of autotunenet_jax.autotune"):
        atn.rewound({}, jnp.zeros(3))


def test_nothing_handed_over_costs_nothing(toy):
    opt = toy.wrapped()
    state = opt.init(toy.make_params())
    assert state.aux == () and state.saved.aux == ()
    off = toy.wrapped(enabled=False)
    assert int(atn.rewound(off.init(toy.make_params()), 3)) == 3
