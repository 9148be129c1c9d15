"""Whatever the losses and gradients are, parameters stay finite and the run goes on."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import autotunenet_jax as atn

# The user is told of it when the hyperparameters are looked at.
pytestmark = pytest.mark.filterwarnings("ignore:a hundred steps", "ignore:learning_rate lies at")

STEPS = 60
FINE, NAN_LOSS, INF_LOSS, NAN_GRADS, INF_GRADS, HUGE, ALL_NAN = range(7)
SPOILS = st.sampled_from(range(1, 7))


@pytest.fixture(
    scope="module",
    params=[
        "keep-winner",
        pytest.param("rewind", marks=pytest.mark.soak),
        pytest.param("drift", marks=pytest.mark.soak),
    ],
)
def spoiled_run(request, toy):
    optimizer = toy.wrapped(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), memory=request.param)

    @jax.jit
    def whole(params, keys, kinds):
        def step(carry, inputs):
            key, kind = inputs
            params, opt_state = carry
            loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
            loss = jnp.select(
                [kind == NAN_LOSS, kind == INF_LOSS, kind == HUGE, kind == ALL_NAN],
                [jnp.nan, jnp.inf, 1e30, jnp.nan],
                loss,
            )
            one = grads["out"].at[3]
            grads = {
                "hidden": jnp.where((kind == ALL_NAN), jnp.nan, jnp.where(kind == HUGE, 1e30, grads["hidden"])),
                "out": jnp.select(
                    [kind == NAN_GRADS, kind == INF_GRADS, kind == ALL_NAN],
                    [one.set(jnp.nan), one.set(jnp.inf), jnp.full_like(grads["out"], jnp.nan)],
                    grads["out"],
                ),
            }
            updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
            params = optax.apply_updates(params, updates)
            is_finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, opt_state.inner))]
            return (params, opt_state), jnp.all(jnp.stack(is_finite))

        return jax.lax.scan(step, (params, optimizer.init(params)), (keys, kinds))

    return functools.partial(whole, toy.make_params(), toy.draws(STEPS))


def check(spoiled_run, kinds):
    (params, opt_state), was_finite = spoiled_run(jnp.asarray(kinds, jnp.int32))
    assert bool(jnp.all(was_finite)), f"first lost at step {int(jnp.argmin(was_finite))}"
    assert int(opt_state.tuner.step) == STEPS
    rate = float(atn.hyperparams(opt_state)["learning_rate"])
    assert np.isfinite(rate) and 0.0 <= rate <= 1.0 + 1e-6
    return params, opt_state


@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(spoils=st.dictionaries(st.integers(0, STEPS - 1), SPOILS, max_size=20))
def test_any_pattern(spoiled_run, spoils):
    check(spoiled_run, [spoils.get(i, FINE) for i in range(STEPS)])


@pytest.mark.parametrize("kind", range(1, 7))
def test_on_the_first_step_and_on_every_step(spoiled_run, toy, kind):
    check(spoiled_run, [kind] + [FINE] * (STEPS - 1))
    params, _ = check(spoiled_run, [kind] * STEPS)
    # Nothing was ever learned, so nothing was ever changed.
    jax.tree.map(np.testing.assert_array_equal, params, toy.make_params())


@pytest.mark.parametrize("kind", range(1, 7))
def test_a_whole_stretch_of_them(spoiled_run, toy, kind):
    for begin in (3, 12, 30):
        params, _ = check(spoiled_run, [kind if begin <= i < begin + 8 else FINE for i in range(STEPS)])
        assert toy.quality(params) < 2.0 * toy.quality(toy.make_params())


def test_a_fork_of_bad_batches_alone_says_nothing_and_is_not_adopted(toy):
    optimizer = toy.wrapped()

    def poison(i, loss, grads):
        # More bad batches in a row than a fork waits for, and more often than it begins again.
        return jnp.where((i >= 20) & (i < 60), jnp.nan, loss), grads

    step, carry, failures = jax.jit(toy.make_step(optimizer, poison=poison)), toy.start(optimizer), 0
    for key in toy.draws():
        carry, _ = step(carry, key)
        failures = max(failures, int(jnp.sum(carry[1].tuner.knowledge.observations.failed)))
    assert failures == 0
    assert toy.rounds_begun(carry[1].tuner) >= 1
    assert toy.quality(carry[0]) < toy.quality(toy.make_params())


def test_a_metric_in_place_of_none_says_nothing(toy):
    """A program without a conditional reports NaN where no metric was asked for."""
    optimizer = toy.wrapped(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2))

    def step(carry, key):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        metric, wants = jnp.sum(params["out"] ** 2), atn.wants_eval(opt_state)
        told = atn.observe_eval(opt_state, jnp.where(wants, metric, jnp.nan))
        asked = optax.tree.where(wants, atn.observe_eval(opt_state, metric), opt_state)
        return (params, told), (wants, jax.tree.leaves(told), jax.tree.leaves(asked))

    params = toy.make_params()
    scan = jax.jit(lambda carry, draws: jax.lax.scan(step, carry, draws)[1])
    wants, told, asked = scan((params, optimizer.init(params)), toy.draws(STEPS))
    assert 0 < np.sum(wants) < STEPS
    for one, other in zip(told, asked, strict=True):
        is_key = jnp.issubdtype(one.dtype, jax.dtypes.prng_key)
        one, other = map(jax.random.key_data, (one, other)) if is_key else (one, other)
        np.testing.assert_array_equal(one, other)
