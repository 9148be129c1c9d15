"""Parts of the tuned optimizer: arguments, starting values, paths, messages, dropout; one run with the real tuner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.space import injection
from autotunenet_jax.wrapper import budget, trees
from tests.contract import conftest as toy

SPACE = {"learning_rate": (1e-4, 1.0)}
PARAMS = {"w": jnp.arange(3.0), "b": jnp.zeros(2)}


@pytest.fixture
def light_surrogate(monkeypatch):
    """For what is not about which rates are tried: without the Gaussian process a step compiles in half the time."""
    toy.lighten(monkeypatch.setattr)


def injected(**arguments):
    return optax.inject_hyperparams(optax.adamw)(**{"learning_rate": 1e-2, **arguments})


def test_the_real_tuner_trains_in_one_program():
    x = jax.random.normal(jax.random.key(0), (200, 4))
    y = jnp.tanh(x @ jnp.array([1.0, -1.0, 0.5, 2.0]))

    def loss_fn(w, rows):
        return jnp.mean((jnp.tanh(x[rows] @ w) - y[rows]) ** 2)

    optimizer = atn.autotune(injected(learning_rate=1e-4), SPACE, total_steps=200)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def whole(w, opt_state, keys):
        def step(carry, key):
            w, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(w, jax.random.randint(key, (32,), 0, 200))
            updates, opt_state = optimizer.update(grads, opt_state, w, value=loss)
            return (optax.apply_updates(w, updates), opt_state), (loss, atn.hyperparams(opt_state)["learning_rate"])

        return jax.lax.scan(step, (w, opt_state), keys)

    w = jnp.zeros(4)
    (w, opt_state), (losses, rates) = whole(jnp.zeros(4), optimizer.init(w), jax.random.split(jax.random.key(1), 200))
    assert int(opt_state.tuner.knowledge.observations.count) >= 2
    assert float(losses[-20:].mean()) < 0.2 * float(losses[0])
    assert float(rates.max()) > 0.05  # from 1e-4
    assert float(rates[-1]) < 1e-3 * float(rates.max()) + 1e-2  # decayed
    share = float(opt_state.tuner.discarded) / 200
    assert 0.0 < share <= 0.4 + 1e-6


def test_starts_where_the_optimizer_is_unless_told():
    for options, expected in (({}, 1e-2), ({"initial": {"learning_rate": 0.3}}, 0.3)):
        state = atn.autotune(injected(), SPACE, 100, **options).init(PARAMS)
        (start,) = state.course.start
        assert float(start) == np.float32(expected)
        assert float(state.inner.hyperparams["learning_rate"]) == np.float32(expected)


def test_factory_injects_only_what_is_tuned():
    optimizer = atn.autotune(optax.adamw, {**SPACE, "b1": (0.8, 0.99)}, 100, learning_rate=0.02, weight_decay=1e-3)
    state = optimizer.init(PARAMS)
    assert set(state.inner.hyperparams) == {"learning_rate", "b1"}
    assert {name: float(value) for name, value in state.inner.hyperparams.items()} == {
        "learning_rate": np.float32(0.02),
        "b1": np.float32(0.9),
    }
    partial = functools.partial(optax.rmsprop, decay=0.95)
    assert set(atn.autotune(partial, SPACE, 100).init(PARAMS).inner.hyperparams) == {"learning_rate"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: atn.autotune(injected(), SPACE, 100, memory="all"),
            ValueError,
            "keep-winner, rewind, drift; got 'all'",
        ),
        (lambda: atn.autotune(injected(), SPACE, 100, b1=0.9), TypeError, "'b1' can only be passed on to a factory"),
        (lambda: atn.autotune(3, SPACE, 100), TypeError, "a factory such as optax.adamw; got int"),
        (
            lambda: atn.autotune(optax.adamw, {"rate": (0.0, 1.0)}, 100),
            ValueError,
            "no argument named 'rate'; it has l",
        ),
        (
            lambda: atn.autotune(optax.adamw, SPACE, 100, learning_rate=optax.constant_schedule(1.0)),
            ValueError,
            "must start as a number",
        ),
        (lambda: atn.autotune(injected(), {"lr": (0.1, 1.0)}, 100).init(PARAMS), ValueError, "no hyperparameter named"),
        (
            lambda: atn.autotune(injected(), {**SPACE, "weight_decey": (0.0, 1.0)}, 100).init(PARAMS),
            ValueError,
            "did you mean 'weight_decay'",
        ),
        (
            lambda: atn.autotune(injected(), {"learning_rate": (0.1, 1.0)}, 100).init(PARAMS),
            ValueError,
            r"starts with learning_rate = 0.01, outside the declared Float\(lo=0.1",
        ),
        (lambda: atn.autotune(optax.adamw(1e-3), SPACE, 100).init(PARAMS), ValueError, "no injected hyperparameters"),
        (
            lambda: atn.autotune(injected(learning_rate=optax.linear_schedule(1.0, 0.0, 9)), SPACE, 100).init(PARAMS),
            ValueError,
            "follows an optax schedule",
        ),
        (lambda: atn.observe(injected().init(PARAMS), 1.0), ValueError, "no state of autotunenet_jax.autotune"),
        (lambda: atn.wants_eval({}), ValueError, "no state of autotunenet_jax.autotune"),
        (lambda: atn.hyperparams(optax.adam(0.1).init(PARAMS)), ValueError, "no injected hyperparameters"),
    ],
)
def test_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.fixture(scope="module")
def tuned():
    optimizer = atn.autotune(injected(), SPACE, 100)
    return optimizer, optimizer.init(PARAMS)


def test_update_checks_its_arguments(tuned):
    optimizer, state = tuned
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(PARAMS, state, value=jnp.float32(1.0))
    with pytest.raises(ValueError, match=r"value, must be a scalar; got shape \(3,\)"):
        optimizer.update(PARAMS, state, PARAMS, value=jnp.ones(3))
    with pytest.raises(ValueError, match=r"scalar; got shape \(2,\)"):
        atn.observe(state, jnp.ones(2))
    with pytest.raises(TypeError, match=r"got dict.*update\(grads, opt_state, params, value=loss\)"):
        optimizer.update(PARAMS, PARAMS, state, value=1.0)


def test_an_optimizer_that_refuses_a_loss_is_not_told_of_it():
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    optimizer = atn.autotune(optax.contrib.sam(sgd, optax.sgd(0.05), sync_period=2), SPACE, 100)
    params = {"w": jnp.ones(3)}
    step = functools.partial(optimizer.update, params, value=jnp.float32(1.0))
    updates, _ = jax.eval_shape(step, optimizer.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == {"w": (3,)}


@pytest.mark.parametrize(
    ("total_steps", "options", "part"),
    [(200, {}, "plan"), (100, {"mode": "max"}, "policy"), (100, {"warmup_steps": 5}, "policy")],
)
def test_a_state_of_another_optimizer_is_refused(tuned, total_steps, options, part):
    other = atn.autotune(injected(), SPACE, total_steps, **options)
    with pytest.raises(ValueError, match=f"made with another {part}"):
        other.update(PARAMS, tuned[1], PARAMS, value=jnp.float32(1.0))


def test_an_extended_state_is_one_of_either_budget(tuned):
    state = atn.extend(tuned[1], total_steps=200)
    for total_steps in (100, 200):
        budget.check(state, budget.digests_of(atn.AutoTuneNet(SPACE, total_steps)))
    with pytest.raises(ValueError, match="made with another plan"):
        budget.check(state, budget.digests_of(atn.AutoTuneNet(SPACE, 300)))


def test_tuned_values_are_not_set_by_hand(tuned):
    _, state = tuned
    with pytest.raises(ValueError, match="'learning_rate' is being tuned"):
        atn.set_hyperparams(state, {"learning_rate": 0.5})
    written = atn.set_hyperparams(state, {"weight_decay": 0.5})
    assert float(written.inner.hyperparams["weight_decay"]) == 0.5


def test_optax_finds_the_value_and_maps_the_parameters(tuned):
    optimizer, state = tuned
    assert float(optax.tree.get(state, "learning_rate")) == np.float32(1e-2)
    doubled = optax.tree.map_params(optimizer, lambda leaf: leaf + 1.0, state)
    # Snapshots in vectors are no parameters to be seen from outside.
    np.testing.assert_array_equal(doubled.saved.params["w"], PARAMS["w"])
    np.testing.assert_array_equal(doubled.inner.inner_state[0].mu["w"], jnp.ones(3))


def test_paths():
    both = optax.partition(
        {name: optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=rate))
         for name, rate in (("a", 0.1), ("b", 0.2))},
        {"w": "a", "b": "b"},
    )  # fmt: skip
    state = both.init(PARAMS)
    found = injection.places(state)
    assert [place.path for place in found] == [("a", "1"), ("b", "1")]
    assert set(atn.hyperparams(state)) == {"a/learning_rate", "b/learning_rate"}
    for name in ("b/learning_rate", "b/1/learning_rate"):
        assert float(atn.hyperparams(atn.set_hyperparams(state, {name: 0.7}))["b/learning_rate"]) == np.float32(0.7)
    with pytest.raises(ValueError, match="name the same hyperparameter"):
        atn.set_hyperparams(state, {"b/learning_rate": 0.7, "b/1/learning_rate": 0.7})
    twice = optax.chain(*[optax.inject_hyperparams(optax.sgd)(learning_rate=rate) for rate in (0.1, 0.2)])
    with pytest.raises(ValueError, match=r"ambiguous: the optimizer has '0/learning_rate' and '1/learning_rate'"):
        atn.set_hyperparams(twice.init(PARAMS), {"learning_rate": 0.7})
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    sharpness_aware = optax.contrib.sam(inner, inner)
    with pytest.raises(ValueError, match="2 times, in parts that have no names"):
        atn.set_hyperparams(sharpness_aware.init(PARAMS), {"learning_rate": 0.7})


def test_one_name_in_states_inside_each_other_is_one_hyperparameter(light_surrogate):
    inject = optax.inject_hyperparams

    def clipped(learning_rate):
        return optax.chain(inject(optax.clip)(max_delta=1.0), inject(optax.sgd)(learning_rate))

    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0), PARAMS)
    nested = inject(clipped)(learning_rate=1e-4)
    state = atn.set_hyperparams(nested.init(PARAMS), {"learning_rate": 0.1, "max_delta": 0.5})
    updates, state = nested.update(grads, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)  # clipped, then scaled
    assert {name: float(value) for name, value in atn.hyperparams(state).items()} == {
        "learning_rate": np.float32(0.1),
        "max_delta": 0.5,
    }

    tuned = atn.autotune(nested, SPACE, 300)
    update = jax.jit(tuned.update)
    state = tuned.init(PARAMS)
    for _ in range(2):
        before = atn.hyperparams(state)["learning_rate"]
        updates, state = update(grads, state, PARAMS, value=np.float32(1.0))
        np.testing.assert_allclose(updates["w"], -jnp.full(3, before), rtol=1e-6)
        assert atn.hyperparams(state)["learning_rate"] != before


def test_a_loop_that_is_not_compiled_compiles_the_update_once(light_surrogate):
    tuned, heard = atn.autotune(injected(), SPACE, 300), []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: heard.append(event))
    state, counts = tuned.init(PARAMS), []
    for value in np.float32([1.0, 0.9, 0.8, 0.7]):
        _, state = tuned.update(PARAMS, state, PARAMS, value=value)
        counts.append(sum("compile" in event for event in heard))
    assert counts[0] > 0 and counts[1:] == counts[:1] * 3
    assert int(state.tuner.step) == 4


def test_what_goes_back_too_is_given_at_each_update_and_is_the_optimizers_own(light_surrogate):
    given = jax.tree.map(jnp.copy, PARAMS)
    optimizer = atn.autotune(injected(), SPACE, total_steps=200, aux=given)
    donated = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
    donated(given)
    state = optimizer.init(PARAMS)
    donated(state.aux)
    jax.tree.map(np.testing.assert_array_equal, optimizer.init(PARAMS).aux, tuple(jax.tree.leaves(PARAMS)))
    with pytest.raises(ValueError, match="this update has none"):
        jax.eval_shape(lambda: optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value=1.0))


def test_autotune_inside_autotune_is_refused():
    twice = atn.autotune(atn.autotune(injected(), SPACE, 100), SPACE, 100)
    with pytest.raises(ValueError, match="an autotune inside this autotune"):
        twice.init(PARAMS)


def test_a_boolean_among_the_parameters_stays():
    params = {"w": jnp.ones(3), "mask": jnp.array([True, False])}
    target = {"w": jnp.zeros(3), "mask": jnp.array([False, False])}
    back = trees.way(params, target, jax.tree.map(jnp.zeros_like, params))
    after = optax.apply_updates(params, back)
    assert after["mask"].tolist() == [True, False] and after["w"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_way_back(dtype):
    key = jax.random.key(0)
    here = {"w": jax.random.normal(key, (1000,)).astype(dtype)}
    target = {"w": (here["w"] * jax.random.uniform(jax.random.key(1), (1000,), minval=0.6, maxval=1.9)).astype(dtype)}
    update = trees.way(here, target, here)
    # Within a factor of two the difference is exact, and so is the sum.
    np.testing.assert_array_equal(trees.moved(here, update)["w"], target["w"])
    far = {"w": jnp.array([1e4, -3e38, 0.0], dtype)}
    near = {"w": jnp.array([0.5, 3e38, 1e-6], dtype)}
    first = trees.moved(far, trees.way(far, near, far))
    assert bool(jnp.all(jnp.isfinite(first["w"])))
    eps = float(jnp.finfo(dtype).eps)
    assert abs(float(first["w"][0]) - 0.5) <= 1e4 * eps
    second = trees.moved(first, trees.way(first, near, first))
    np.testing.assert_allclose(second["w"].astype(jnp.float32), near["w"].astype(jnp.float32), rtol=2 * eps)
    for start, is_there in ((far, False), (second, True)):
        assert bool(trees.has_arrived(start, lambda leaf, zero: near["w"] + zero.astype(dtype))) == is_there


@jax.jit
def squared_norms(trees_of_numbers):
    return [trees.squared_norm(tree) for tree in trees_of_numbers]


@pytest.mark.parametrize(("bad", "usable"), [(np.nan, False), (np.inf, False), (1e30, False), (1e10, True)])
def test_a_norm_that_is_finite_tells_of_every_entry(bad, usable):
    found = []
    for shape in ((), (5,), (3, 5), (2, 3, 5)):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.complex64):
            spoiled = np.ones(shape, dtype)
            spoiled[(-1,) * len(shape)] = bad
            found.append({"w": spoiled, "whole": np.arange(3, dtype=np.int32), "none": np.zeros((0, 3), np.float32)})
            # An entry of the other sign beside it must not hide it.
            found.append([spoiled, -spoiled])
    assert {bool(np.isfinite(norm)) for norm in squared_norms(found)} == {usable}
    assert float(trees.squared_norm([jnp.full((2, 3), 2.0), jnp.array([1 + 2j])])) == 29.0


def test_dropout():
    x = jax.random.normal(jax.random.key(0), (4000,)) + 5.0
    dropout = jax.jit(atn.traced_dropout)
    y = dropout(jax.random.key(1), x, 0.3)
    assert float(jnp.mean(y == 0.0)) == pytest.approx(0.3, abs=0.03)
    assert float(jnp.mean(y)) == pytest.approx(float(jnp.mean(x)), rel=0.05)
    np.testing.assert_array_equal(dropout(jax.random.key(1), x, 0.0), x)
    np.testing.assert_array_equal(dropout(jax.random.key(1), x, 0.5, deterministic=True), x)
    assert dropout(jax.random.key(1), x.astype(jnp.bfloat16), 0.5).dtype == jnp.bfloat16
    for rate in (-1.0, 1.0, 2.0):
        assert bool(jnp.all(jnp.isfinite(dropout(jax.random.key(1), x, rate))))


def test_the_state_that_was_measured_is_the_one_that_is_kept(light_surrogate):
    optimizer = atn.autotune(injected(), SPACE, total_steps=400)

    @jax.jit
    def step(w, opt_state):
        loss, grads = jax.value_and_grad(lambda w: jnp.sum((w - 1.0) ** 2))(w)
        updates, opt_state = optimizer.update(grads, opt_state, w, value=loss)
        return optax.apply_updates(w, updates), opt_state

    w, opt_state = jnp.zeros(4), optimizer.init(jnp.zeros(4))
    for _ in range(300):
        w, opt_state = step(w, opt_state)
    assert int(opt_state.tuner.phase) == 0
    measured, moments, at = np.asarray(w), opt_state.inner, int(opt_state.tuner.step)
    opt_state = atn.observe_eval(opt_state, 0.5)
    w, opt_state = step(w, opt_state)
    assert np.array_equal(opt_state.kept.params, measured) and not np.array_equal(w, measured)
    kept = opt_state.kept.inner.inner_state
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, moments.inner_state))
    assert int(opt_state.tuner.slots.kept_step) == at


def test_values_of_a_stack_of_states_have_its_axes():
    optimizer = atn.autotune(injected(), SPACE, 100)
    one = optimizer.init(PARAMS)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)
    values = atn.hyperparams(stacked)["learning_rate"]
    assert values.tolist() == [float(atn.hyperparams(one)["learning_rate"])] * 3


def test_gradients_out_of_line_are_passed_over_unless_they_go_on(light_surrogate):
    total = 200
    optimizer = atn.autotune(optax.adam, {"learning_rate": (1e-4, 1e-1)}, total, learning_rate=1e-3)
    params = {"w": jnp.ones(3)}

    @jax.jit
    def moments(scales):
        def step(carry, scale):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w"] - 2.0) ** 2))(params)
            updates, state = optimizer.update(jax.tree.map(lambda g: scale * g, grads), state, params, value=loss)
            return (optax.apply_updates(params, updates), state), jnp.max(optax.tree.get(state.inner, "nu")["w"])

        return jax.lax.scan(step, (params, optimizer.init(params)), scales)[1]

    now_and_then = jnp.where(jnp.arange(total) % 20 == 10, 1e8, 1.0)
    assert float(jnp.max(moments(now_and_then))) < 1.0
    from_then_on = jnp.where(jnp.arange(total) >= 150, 1e8, 1.0)
    assert float(jnp.max(moments(from_then_on)[:150])) < 1.0 < 1e9 < float(moments(from_then_on)[-1])
