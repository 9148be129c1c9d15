"""`autotune` under the transformations of JAX, and in every memory mode."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.compiler import packing
from autotunenet_jax.space import injection
from autotunenet_jax.wrapper import ring
from autotunenet_jax.wrapper.held_snapshots import snapshots_of

MEMORIES = (
    "keep-winner",
    pytest.param("rewind", marks=pytest.mark.soak),
    pytest.param("drift", marks=pytest.mark.soak),
)


def read(tree):
    """A tree in which what a tuned state remembers is numbers, not their bits."""

    def told(node):
        if not injection.is_tuned(node):
            return node
        contents = ring.read(np.asarray(node.record), node.settings.core.space.dims)
        return node._replace(record=jax.tree.map(np.asarray, contents))

    return jax.tree.map(told, tree, is_leaf=injection.is_tuned)


def assert_same(a, b, rtol=1e-4, atol=1e-6):
    def check(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(x, y)

    jax.tree.map(check, read(a), read(b))


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_trace_with_rounds_and_donation(toy, memory):
    optimizer = toy.wrapped(memory=memory)
    traces = []
    pure = toy.make_step(optimizer)

    def counted(carry, key):
        traces.append(None)
        return pure(carry, key)

    step = jax.jit(counted, donate_argnums=0)
    carry, phases, values = toy.start(optimizer), set(), set()
    for key in toy.draws():
        before = carry
        carry, _ = step(carry, key)
        opt_state = before[1]
        large = (before[0], opt_state.inner.inner_state, opt_state.snapshots)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(large))
        phases.add(int(carry[1].tuner.phase))
        assert bool(atn.in_round(carry[1])) == (int(carry[1].tuner.phase) != 0)
        values.add(float(atn.hyperparams(carry[1])["learning_rate"]))
    assert len(traces) == 1
    assert phases == ({0, 2} if memory == "drift" else {0, 1, 2})
    assert len(values) > 20
    assert toy.rounds_begun(carry[1].tuner) >= 1
    assert int(carry[1].tuner.step) == toy.TOTAL
    assert toy.quality(carry[0]) < 0.7 * toy.quality(toy.make_params())


def test_scan_is_the_loop(toy):
    """With the start inside the compiled program too."""
    optimizer = toy.wrapped()

    @jax.jit
    def whole(params, keys):
        carry = (params, optimizer.init(params), jnp.int32(0))
        return jax.lax.scan(toy.make_step(optimizer), carry, keys)

    (params, opt_state, _), losses = whole(toy.make_params(), toy.draws())
    *end, looped = toy.usual().end
    np.testing.assert_allclose(losses, looped, rtol=1e-4, atol=1e-6)
    assert_same((params, opt_state), tuple(end))


def test_vmap_of_three_is_three_runs(toy):
    optimizer = toy.usual().optimizer
    starts = [jax.tree.map(lambda p, k=k: p * k, toy.make_params()) for k in (0.5, 1.0, 1.5)]
    carries = [toy.start(optimizer, params) for params in starts]
    singles = [toy.usual().run(carry, toy.draws())[0][:2] for carry in carries]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *carries)
    step = jax.vmap(toy.make_step(optimizer), in_axes=(0, None))
    (params, opt_state, _), _ = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))(stacked, toy.draws())
    for i, single in enumerate(singles):
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], (params, opt_state))
        assert_same(one, single, rtol=2e-3, atol=1e-4)


def test_obeys_as_a_loop_of_ones_own_would(toy):
    """The wrapper makes exactly the copies that the directives of the pure tuner ask for."""
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    # A run in which a fork before the last one wins.
    (final, opt_state, _), losses = toy.usual().run(toy.start(toy.usual().optimizer), toy.draws(seed=9))

    tuner = atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, toy.TOTAL, initial={"learning_rate": 1e-3}, capacity=33)

    @jax.jit
    def step(state, ts, key):
        params, inner_state = state
        loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        inner_state = atn.set_hyperparams(inner_state, tuner.hyperparams(ts))
        updates, inner_state = inner.update(grads, inner_state, params)
        return (optax.apply_updates(params, updates), inner_state), *tuner.update(ts, loss), loss

    params = toy.make_params()
    state, ts = (params, inner.init(params)), tuner.init(jax.random.key(0))
    saved = kept = state
    asked = set()
    for key, seen in zip(toy.draws(seed=9), losses, strict=True):
        state, ts, directive, loss = step(state, ts, key)
        np.testing.assert_allclose(loss, seen, rtol=1e-3, atol=1e-5)
        if directive.save:
            saved = state
        if directive.keep:
            kept = state
        if directive.restore:
            state = saved
        if directive.adopt:
            state = kept
        asked |= {name for name in ("save", "keep", "restore", "adopt") if getattr(directive, name)}
    assert asked == {"save", "keep", "restore", "adopt"}
    assert_same(final, state[0], rtol=1e-3, atol=1e-5)
    assert int(ts.step) == int(opt_state.tuner.step) == toy.TOTAL


@pytest.mark.parametrize(("asked", "slot"), [("restore", "saved"), ("adopt", "kept")])
def test_every_way_back_brings_parameters_and_moments(toy, asked, slot):
    """Whatever the policy asks for in the runs above, both snapshots can be returned to, moments and all."""
    optimizer, step = toy.usual().optimizer, toy.usual().step
    carry = toy.start(optimizer)
    for key in toy.draws(6):
        carry, _ = step(carry, key)
    params, state, i = carry
    # Each snapshot differs from the other and from where the run is.
    saved, kept = (
        jax.tree.map(lambda leaf, k=k: leaf * k if leaf.ndim else leaf, slot)
        for k, slot in ((1.25, state.saved), (1.5, state.kept))
    )
    order = state.course.order._replace(**{asked: jnp.ones((), bool)})
    target = {"saved": saved, "kept": kept}[slot]
    packed = packing.pack(state.course._replace(order=order))
    carry = (params, state._replace(packed=packed, snapshots=snapshots_of([saved, kept])), i)
    carry, _ = step(carry, toy.draws(1)[0])
    assert_same(carry[0], target.params, rtol=1e-5, atol=1e-6)
    # The next update is the optimizer's own, from the snapshot's parameters and moments.
    after, _ = step(carry, toy.draws(1)[0])
    loss_grads = jax.grad(toy.loss_fn)(carry[0], toy.draws(1)[0])
    rate = atn.hyperparams(carry[1])["learning_rate"]
    plain = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(learning_rate=1e-3)
    inner = carry[1].inner._replace(inner_state=target.inner.inner_state)
    inner = atn.set_hyperparams(inner, {"learning_rate": rate})
    updates, inner = plain.update(loss_grads, inner, carry[0])
    assert_same(after[1].inner.inner_state, inner.inner_state, rtol=1e-4, atol=1e-6)
    if not int(after[1].course.home):
        assert_same(after[0], optax.apply_updates(carry[0], updates), rtol=1e-4, atol=1e-5)


def test_memory_is_as_documented(toy):
    plain = optax.adam(1e-3).init(toy.make_params())

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    one = size(toy.make_params()) + size(plain)
    for memory, copies in (("keep-winner", 2), ("rewind", 1), ("drift", 0)):
        state = toy.wrapped(memory=memory).init(toy.make_params())
        stored = size(state.snapshots)
        # An injected state has a counter more.
        assert abs(stored - copies * one) <= 8 * copies


@pytest.mark.usefixtures("optimised")
def test_copies_take_no_room_but_their_own():
    """Temporary memory of a step with two copies is that of the plain optimizer, and of one array on its way."""
    size = 256
    params, x = {"a": jnp.eye(size), "b": jnp.eye(size), "bias": jnp.zeros(size)}, jnp.ones((8, size))
    plain = optax.with_extra_args_support(optax.inject_hyperparams(optax.adam)(1e-3))
    tuned = atn.autotune(optax.adam, {"learning_rate": (1e-5, 1e-1)}, 100, memory="keep-winner", learning_rate=1e-3)

    def temporary(optimizer):
        def step(params, state):
            def loss_fn(p):
                return jnp.mean(jnp.square(jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]))

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # One matrix at a time, and the numbers of the run, which do not grow with the parameters.
    assert temporary(tuned) <= temporary(plain) + 4 * size**2 + 2**15


def test_rewind_goes_back_to_where_the_round_began(toy):
    optimizer = toy.wrapped(memory="rewind")
    step, carry = jax.jit(toy.make_step(optimizer)), toy.start(optimizer)
    returns = 0
    for key in toy.draws():
        before = carry[1]
        carry, _ = step(carry, key)
        if int(carry[1].course.home) == 1:
            returns += 1
            jax.tree.map(lambda p, s: np.testing.assert_allclose(p, s, rtol=1e-5, atol=1e-6), carry[0],
                         before.saved.params)  # fmt: skip
    assert returns >= 3
    # The steps of a winner that could not be kept are counted as lost.
    assert int(carry[1].tuner.discarded) > 0


def test_drift_never_undoes_and_moves_in_small_steps(toy):
    optimizer = toy.wrapped(memory="drift", decay="none")
    step, carry = jax.jit(toy.make_step(optimizer)), toy.start(optimizer)
    incumbents, trials = [], set()
    for key in toy.draws():
        carry, _ = step(carry, key)
        incumbents.append(float(carry[1].tuner.incumbent[0]))
        assert int(carry[1].course.home) == 0
        if int(carry[1].tuner.phase) == 2:
            trials.add(float(carry[1].tuner.trial[0]))
            assert abs(max(trials, key=lambda u: abs(u - incumbents[-1])) - incumbents[-1]) <= 0.6 / 4 + 1e-5
    assert int(carry[1].tuner.discarded) == 0
    assert np.max(np.abs(np.diff(incumbents))) <= 0.3 / 4 + 1e-5
    assert len(trials) > 2


def test_disabled_is_bit_identical_to_the_plain_optimizer(toy):
    plain = optax.adamw(3e-3, weight_decay=1e-2)
    off = atn.autotune(optax.adamw, {"learning_rate": (1e-4, 1.0)}, toy.TOTAL, learning_rate=3e-3, weight_decay=1e-2,
                       enabled=False)  # fmt: skip

    def step_plain(carry, key):
        params, opt_state = carry
        updates, opt_state = plain.update(jax.grad(toy.loss_fn)(params, key), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = toy.make_params()
    (expected, _), _ = jax.lax.scan(step_plain, (params, plain.init(params)), toy.draws())
    got, opt_state, _ = toy.run(off)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert float(atn.hyperparams(opt_state)["learning_rate"]) == np.float32(3e-3)


def test_rising_validation_brings_the_best_state_back_at_a_lower_rate(toy):
    """The loss reported goes on falling; late in the run the metric rises."""
    lowest = 100
    optimizer = toy.wrapped()

    @jax.jit
    def step(params, opt_state, value, key):
        grads = jax.grad(toy.loss_fn)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    params = toy.make_params()
    opt_state = optimizer.init(params)
    past, homes, rates = [], [], []
    for i, key in enumerate(toy.draws()):
        if i % 4 == 0 or bool(atn.wants_eval(opt_state)):
            metric = 2.0 * np.exp(-min(i, lowest) / 30) + 0.05 * max(i - lowest, 0)
            opt_state = atn.observe_eval(opt_state, metric)
        params, opt_state = step(params, opt_state, jnp.float32(2.0 * np.exp(-i / 30)), key)
        course = opt_state.course
        past.append(params)
        homes.append(int(course.home) if int(course.tuner.phase) == 0 else 0)
        rates.append(float(course.tuner.incumbent[0]))
    back = next(i for i, home in enumerate(homes) if home == 2 and i > lowest)
    # The state that the best metric was measured of; half a decade of four lower.
    assert_same(past[back], past[lowest - 1], rtol=1e-5, atol=1e-6)
    assert rates[back] == pytest.approx(max(rates[lowest] - 0.125, 0.0), abs=1e-6)
    assert rates[lowest] > 0.0
    # While every reading was the lowest they climbed, which the history tells of.
    events = atn.history(opt_state).events
    told = [event["step"] for event in events if event["kind"] == "climb"]
    assert told and max(told) <= lowest
    for at in told:
        assert max(rates[at - 2 : at + 2]) == pytest.approx(min(rates[at - 2 : at + 2]) + 0.0625, abs=1e-6)
