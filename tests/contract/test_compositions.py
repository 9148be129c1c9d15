"""`autotune` among other transformations, libraries and kinds of parameters."""

import functools
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.compiler import packing
from autotunenet_jax.wrapper import inner_state


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert bool(jnp.all(jnp.isfinite(leaf)))


@pytest.mark.soak
def test_clipping_after_only_lengthens_the_way_back(toy):
    """Clipped updates cannot go back at once; nothing is learned until the run is where the tuner thinks it is."""
    optimizer = optax.chain(toy.wrapped(space={"learning_rate": (1e-4, 3.0)}), optax.clip(0.05))
    step, carry = jax.jit(toy.make_step(optimizer)), toy.start(optimizer)
    trips, longest, here = 0, 0, 0
    for key in toy.draws():
        before = toy.find(carry[1])
        carry, _ = step(carry, key)
        state = toy.find(carry[1])
        here = here + 1 if int(state.course.home) and int(before.course.home) else 0
        longest = max(longest, here)
        if int(before.course.home) and not int(state.course.home):
            trips += 1
            # Home at last: the next update started from the snapshot.
            target = (before.saved, before.kept)[int(before.course.home) - 1].params
            jax.tree.map(lambda p, t: np.testing.assert_allclose(p, t, atol=0.06), carry[0], target)
    assert trips >= 2
    assert longest >= 3
    assert int(toy.find(carry[1]).tuner.step) == toy.TOTAL
    assert_finite(carry[0])


@pytest.mark.parametrize(
    "around",
    [
        "clipping in accumulation",
        pytest.param("clipping", marks=pytest.mark.soak),
        pytest.param("accumulation", marks=pytest.mark.soak),
    ],
)
def test_clipping_before_and_accumulation_around_it(toy, around):
    """Together, since each way in is a program of its own; alone in their long form."""
    optimizer, every = toy.wrapped(), 1
    if "clipping" in around:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    if "accumulation" in around:
        every = 2
        optimizer = optax.MultiSteps(optimizer, every_k_schedule=every)
    params, opt_state, _ = toy.run(optimizer, every * toy.TOTAL)
    assert int(toy.find(opt_state).tuner.step) == toy.TOTAL
    assert toy.rounds_begun(toy.find(opt_state).tuner) >= 1
    assert toy.quality(params) < 0.5 * toy.quality(toy.make_params())
    assert set(atn.hyperparams(opt_state)) == {"learning_rate"}


def test_batch_size_inside_it_changes_between_batches_only(toy):
    def factory(learning_rate, accumulation):
        steps = optax.MultiSteps(optax.adam(learning_rate), every_k_schedule=lambda step: accumulation)
        return steps.gradient_transformation()

    optimizer = toy.wrapped(
        optax.inject_hyperparams(factory)(learning_rate=1e-2, accumulation=4),
        {"learning_rate": (1e-3, 1.0), "accumulation": atn.Int(1, 16)},
        800,  # long enough for a round that looks beyond the rates
    )
    step, carry, seen, emitted = jax.jit(toy.make_step(optimizer)), toy.start(optimizer), set(), 0
    for key in toy.draws(300):
        accumulated = int(inner_state.found_next(carry[1]).inner_state.mini_step)
        in_force = int(atn.hyperparams(carry[1])["accumulation"])
        carry, _ = step(carry, key)
        inner = carry[1].inner
        seen.add(in_force)
        if int(carry[1].course.home) == 0:
            assert int(inner.hyperparams["accumulation"]) == in_force
            # Every batch is finished at the length it was begun with.
            assert int(inner.inner_state.mini_step) == (accumulated + 1) % in_force
            emitted += accumulated + 1 == in_force
    assert len(seen) >= 2
    assert emitted > 10


def groups(rates):
    return optax.partition(
        {name: optax.inject_hyperparams(optax.adam)(learning_rate=rate) for name, rate in rates.items()},
        {"hidden": "encoder", "out": "head"},
    )


def test_groups_are_addressed_by_path(toy):
    space = {"encoder/learning_rate": (1e-4, 1.0), "head/learning_rate": (1e-4, 1.0)}
    # Long enough for a round that first moves both rates together and then looks between its forks.
    optimizer = toy.wrapped(groups({"encoder": 1e-3, "head": 1e-2}), space, 400)
    opt_state = optimizer.init(toy.make_params())
    starts = {name: float(value) for name, value in zip(space, opt_state.course.start, strict=True)}
    assert starts == pytest.approx({"encoder/learning_rate": 1e-3, "head/learning_rate": 1e-2})
    step, carry, seen = jax.jit(toy.make_step(optimizer)), toy.start(optimizer), []
    for key in toy.draws(160):
        values = atn.hyperparams(carry[1])
        assert set(values) == set(space)
        before = carry[1]
        carry, _ = step(carry, key)
        for label in ("encoder", "head"):
            injected = carry[1].inner.inner_states[label].inner_state.hyperparams["learning_rate"]
            if int(carry[1].course.home) == 0 == int(before.course.home):
                assert float(injected) == pytest.approx(float(values[f"{label}/learning_rate"]), rel=1e-5)
        seen.append(tuple(float(value) for value in values.values()))
    assert any(encoder != head for encoder, head in seen)


def test_ambiguous_and_unknown_names_list_the_candidates(toy):
    both = groups({"encoder": 1e-3, "head": 1e-2})
    with pytest.raises(ValueError, match=r"ambiguous.*encoder/learning_rate.*head/learning_rate"):
        toy.wrapped(both).init(toy.make_params())
    with pytest.raises(
        ValueError, match=r"no hyperparameter 'neck/learning_rate'; it has encoder/b1, .*head/learning_rate"
    ):
        toy.wrapped(both, {"neck/learning_rate": (1e-4, 1.0)}).init(toy.make_params())
    with pytest.raises(ValueError, match="ambiguous"):
        atn.set_hyperparams(both.init(toy.make_params()), {"learning_rate": 0.1})
    written = atn.set_hyperparams(both.init(toy.make_params()), {"head/learning_rate": 0.1})
    assert float(atn.hyperparams(written)["head/learning_rate"]) == np.float32(0.1)
    assert float(atn.hyperparams(written)["encoder/learning_rate"]) == np.float32(1e-3)


@pytest.mark.soak
def test_lookahead_inside_it(toy):
    """Snapshots hold the slow parameters too, although gradients are of the fast ones alone."""
    inner = optax.lookahead(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), sync_period=5, slow_step_size=0.5)
    optimizer = toy.wrapped(inner)

    def step(carry, key):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(toy.loss_fn)(params.fast, key)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        return (optax.apply_updates(params, updates), opt_state), None

    params = optax.LookaheadParams.init_synced(toy.make_params())
    carry = (params, optimizer.init(params))
    (params, opt_state), _ = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))(carry, toy.draws())
    assert toy.rounds_begun(opt_state.tuner) >= 1
    assert isinstance(opt_state.saved.params, optax.LookaheadParams)
    assert toy.quality(params.slow) < 0.5 * toy.quality(toy.make_params())


def complex_loss(w, key):
    x = jax.random.normal(key, (16, 4))
    return jnp.mean(jnp.abs(x @ w - x @ jnp.array([1.0, 2j, -1.0, 1 + 1j])) ** 2)


def test_parameters_of_every_kind_in_one_run(toy):
    """Complex and short ones, beside a typed key in the optimizer's own state; each kind alone in the long forms."""

    def noisy(learning_rate, b2):
        noise = optax.add_noise(0.01, 0.5, jax.random.key(0))
        return optax.chain(noise, optax.scale_by_adam(b2=b2), optax.scale_by_learning_rate(learning_rate))

    optimizer = toy.wrapped(optax.inject_hyperparams(noisy)(learning_rate=1e-2, b2=0.999), key=jax.random.key(3))
    raw = toy.wrapped(optax.inject_hyperparams(noisy)(learning_rate=1e-2, b2=0.999), key=jax.random.PRNGKey(3))
    short = toy.make_params(jnp.bfloat16)
    params = {**short, "w": jnp.zeros(4, jnp.complex64)}
    opt_state = optimizer.init(params)
    for a, b in zip(jax.tree.leaves(opt_state.packed), jax.tree.leaves(raw.init(params).packed), strict=True):
        np.testing.assert_array_equal(a, b)

    def step(carry, key):
        params, opt_state = carry

        def loss_fn(params):
            complex_part = complex_loss(params["w"], key)
            return toy.loss_fn(params, key) + complex_part, complex_part

        (loss, complex_part), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(jax.tree.map(jnp.conj, grads), opt_state, params, value=loss)
        rate = atn.hyperparams(opt_state)["learning_rate"]
        return (optax.apply_updates(params, updates), opt_state), (complex_part, rate)

    scan = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (after, opt_state), (losses, rates) = scan((params, opt_state), toy.draws())
    assert {name: leaf.dtype for name, leaf in after.items()} == {name: leaf.dtype for name, leaf in params.items()}
    assert_finite(after)
    assert toy.quality(after) < 0.5 * toy.quality(short)
    assert float(losses[-1]) < 0.05 * float(losses[0])
    injected = opt_state.inner.hyperparams
    assert rates.dtype == injected["learning_rate"].dtype == injected["b2"].dtype == jnp.float32
    assert float(injected["b2"]) == np.float32(0.999)
    assert opt_state.tuner.key.dtype == jnp.uint32
    assert toy.rounds_begun(opt_state.tuner) >= 1


@pytest.mark.soak
@pytest.mark.parametrize("is_given", [True, False])
def test_complex_parameters(toy, is_given):
    optimizer = toy.wrapped(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2) if is_given else optax.adam)

    def step(carry, key):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(lambda params: complex_loss(params["w"], key))(params)
        updates, opt_state = optimizer.update(jax.tree.map(jnp.conj, grads), opt_state, params, value=loss)
        rate = atn.hyperparams(opt_state)["learning_rate"]
        return (optax.apply_updates(params, updates), opt_state), (loss, rate)

    params = {"w": jnp.zeros(4, jnp.complex64)}
    carry = (params, optimizer.init(params))
    (params, opt_state), (losses, rates) = jax.jit(lambda c, keys: jax.lax.scan(step, c, keys))(carry, toy.draws())
    assert float(losses[-1]) < 0.05 * float(losses[0])
    assert rates.dtype == opt_state.inner.hyperparams["learning_rate"].dtype == jnp.float32


@pytest.mark.soak
def test_apply_if_finite_around_it(toy):
    optimizer = optax.apply_if_finite(toy.wrapped(), max_consecutive_errors=3)

    def poison(i, value, grads):
        return value, jax.tree.map(lambda g: jnp.where(i % 7 == 3, jnp.nan, g), grads)

    params, opt_state, _ = toy.run(optimizer, poison=poison)
    assert_finite(params)
    assert int(opt_state.total_notfinite) > 5
    assert toy.rounds_begun(toy.find(opt_state).tuner) >= 1


@pytest.mark.soak
@pytest.mark.parametrize("is_injected", [True, False])
def test_reduced_precision(toy, is_injected):
    params = toy.make_params(jnp.bfloat16)
    adamw = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3) if is_injected else optax.adamw
    after, opt_state, _ = toy.run(toy.wrapped(adamw), params=params)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    injected = opt_state.inner.hyperparams
    assert {value.dtype for value in injected.values()} == {jnp.dtype(jnp.float32)}
    if "b2" in injected:
        assert float(injected["b2"]) == np.float32(0.999)
    assert_finite(after)
    assert toy.rounds_begun(opt_state.tuner) >= 1
    assert toy.quality(after) < 0.5 * toy.quality(params)


@pytest.mark.soak
def test_frozen_and_empty_subtrees(toy):
    labels = {"model": {"hidden": "free", "out": "free"}, "frozen": "still", "nothing": {}, "none": None}
    inner = optax.partition(
        {"free": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), "still": optax.set_to_zero()}, labels
    )
    frozen = jnp.arange(3.0)
    params = {"model": toy.make_params(), "frozen": frozen, "nothing": {}, "none": None}

    def loss(params, key):
        return toy.loss_fn(params["model"], key) + jnp.sum(params["frozen"])

    after, opt_state, _ = toy.run(toy.wrapped(inner), params=params, loss=loss)
    np.testing.assert_array_equal(after["frozen"], frozen)
    assert after["nothing"] == {}
    assert after["none"] is None
    assert toy.rounds_begun(opt_state.tuner) >= 1
    assert toy.quality(after["model"]) < 0.5 * toy.quality(toy.make_params())


@pytest.mark.soak
def test_keys_of_both_kinds(toy):
    # The optimizer's own state holds a typed key as well.
    noisy = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0)), optax.sgd(learning_rate))
    )(learning_rate=1e-2)
    typed, raw = (toy.wrapped(noisy, key=make(3)) for make in (jax.random.key, jax.random.PRNGKey))
    first, same = (jax.tree.leaves(optimizer.init(toy.make_params()).packed) for optimizer in (typed, raw))
    for a, b in zip(first, same, strict=True):
        np.testing.assert_array_equal(a, b)
    params, opt_state, _ = toy.run(typed)
    assert opt_state.tuner.key.dtype == jnp.uint32
    assert toy.rounds_begun(opt_state.tuner) >= 1
    assert toy.quality(params) < toy.quality(toy.make_params())


def test_any_serializer_stores_its_state(toy, tmp_path):
    from flax import serialization

    _, opt_state, _ = toy.usual().end
    leaves, structure = jax.tree.flatten(opt_state)
    np.savez(tmp_path / "state.npz", *leaves)
    stored = np.load(tmp_path / "state.npz")
    read = [stored[f"arr_{number}"] for number in range(len(leaves))]
    made = toy.usual().optimizer.init(toy.make_params())
    packed = serialization.from_bytes(made, serialization.to_bytes(opt_state))
    for again in (pickle.loads(pickle.dumps(opt_state)), structure.unflatten(read), packed):
        assert jax.tree.structure(again) == structure
        for a, b in zip(jax.tree.leaves(again), leaves, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    params = toy.make_params()
    other = toy.wrapped(total_steps=2 * toy.TOTAL)
    foreign = serialization.from_bytes(other.init(params), serialization.to_bytes(opt_state))
    with pytest.raises(ValueError, match=r"another plan.*extend"):
        other.update(params, foreign, params, value=jnp.float32(1.0))


def test_nnx_optimizer(toy):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            start = toy.make_params()
            self.hidden, self.out = nnx.Param(start["hidden"]), nnx.Param(start["out"])

    model = Model()
    optimizer = nnx.Optimizer(model, toy.wrapped(), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, key):
        traces.append(None)
        rate = atn.hyperparams(optimizer)["learning_rate"]
        loss, grads = nnx.value_and_grad(lambda m: toy.loss_fn({"hidden": m.hidden[...], "out": m.out[...]}, key))(
            model
        )
        optimizer.update(model, grads, value=loss)
        return loss, rate

    *keys, last = toy.draws()
    rates = [float(step(model, optimizer, key)[1]) for key in keys]
    told = float(atn.hyperparams(optimizer)["learning_rate"])
    assert told == pytest.approx(float(step(model, optimizer, last)[1]), rel=1e-5)
    # What is told between two steps is what the second one's update is made with.
    assert told == pytest.approx(float(toy.find(optimizer.opt_state).inner.hyperparams["learning_rate"]), rel=1e-5)
    assert len(traces) == 1
    assert len(set(rates)) > 20
    after = {"hidden": model.hidden[...], "out": model.out[...]}
    assert toy.quality(after) < 0.5 * toy.quality(toy.make_params())
    seen = toy.find(optimizer.opt_state).tuner.step
    atn.observe(optimizer, jnp.float32(0.5))
    assert int(toy.find(optimizer.opt_state).tuner.step) == int(seen) + 1


def test_train_state_and_observe(toy):
    from flax.training.train_state import TrainState

    state = TrainState.create(apply_fn=None, params=toy.make_params(), tx=toy.wrapped())

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key):
        loss, grads = jax.value_and_grad(toy.loss_fn)(state.params, key)
        return atn.observe(state.apply_gradients(grads=grads), loss)

    phases = set()
    for key in toy.draws():
        state = step(state, key)
        phases.add(int(toy.find(state).tuner.phase))
    assert phases == {0, 1, 2}
    assert int(toy.find(state).tuner.step) == toy.TOTAL
    assert toy.quality(state.params) < 0.5 * toy.quality(toy.make_params())


def silent_run(toy, optimizer, steps):
    params = toy.make_params()
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, key):
        updates, opt_state = optimizer.update(jax.grad(toy.loss_fn)(params, key), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for key in toy.draws(steps):
        params, opt_state = step(params, opt_state, key)
    return params, opt_state


def test_without_any_loss_it_trains_on_its_schedule_and_says_so(toy):
    optimizer = toy.wrapped(total_steps=100)
    _, opt_state = silent_run(toy, optimizer, 80)
    jax.block_until_ready(opt_state)
    with pytest.warns(UserWarning, match="not been told a single loss"):
        rate = atn.hyperparams(opt_state)["learning_rate"]
    assert float(rate) == pytest.approx(0.5e-3, rel=1e-5)


def test_the_warning_comes_once_and_not_without_reason(toy):
    optimizer = toy.wrapped(total_steps=100)
    params, opt_state = silent_run(toy, optimizer, 30)
    jax.block_until_ready(opt_state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for lag in (19, 30, 31):
            later = opt_state._replace(packed=packing.pack(opt_state.course._replace(lag=jnp.int32(lag))))
            atn.hyperparams(jax.block_until_ready(later))
            atn.hyperparams(atn.observe(opt_state, jnp.float32(1.0)))
        # A loop that is not compiled hears it from the update.
        for _ in range(2):
            _, opt_state = jax.block_until_ready(optimizer.update(params, opt_state, params))
    lines = [warning.lineno for warning in caught]
    assert len(lines) == len(set(lines)) == 2
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.soak
def test_silent_without_a_decay_it_is_the_plain_optimizer(toy):
    params, _ = silent_run(toy, toy.wrapped(optax.adam, decay="none", initial={"learning_rate": 3e-3}), 40)
    expected, _ = silent_run(toy, optax.with_extra_args_support(optax.adam(3e-3)), 40)
    # The same arithmetic in another program: equal up to the last rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)


def test_losses_reported_now_and_then(toy):
    """Unreported updates count in the budget; the run goes on tuning with the losses it gets."""
    optimizer = toy.wrapped(total_steps=192)
    params = toy.make_params()
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, key):
        loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for i, key in enumerate(toy.draws(192)):
        params, opt_state, loss = step(params, opt_state, key)
        if i % 2:
            opt_state = atn.observe(opt_state, loss)
    assert int(opt_state.tuner.step) == 192
    assert toy.rounds_begun(opt_state.tuner) >= 1
    assert toy.quality(params) < toy.quality(toy.make_params())


def test_slow_hyperparameters_by_validation_metric(toy):
    """A mode="max" metric, reported whenever the tuner asks, moves a weight decay."""
    inner = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, weight_decay=1e-3)
    optimizer = toy.wrapped(inner, {"weight_decay": (1e-4, 1.0)}, mode="max")
    step, carry, asked, held = jax.jit(toy.make_step(optimizer)), toy.start(optimizer), 0, set()
    for key in toy.draws():
        carry, _ = step(carry, key)
        if atn.wants_eval(carry[1]):
            asked += 1
            metric = -toy.quality(carry[0])
            carry = (carry[0], atn.observe_eval(carry[1], jnp.float32(metric)), carry[2])
        held.add(float(carry[1].inner.hyperparams["weight_decay"]))
    assert asked >= 4
    assert len(held) >= 3
    assert toy.rounds_begun(carry[1].tuner) >= 1


def test_orbax_round_trip_in_mid_round_continues_identically(toy, tmp_path):
    import orbax.checkpoint as ocp

    step, carry = toy.usual().step, toy.start(toy.usual().optimizer)
    keys = list(toy.draws())
    while not (int(carry[1].tuner.phase) == 2 and int(carry[1].tuner.round.fork) == 1):  # until the second fork runs
        carry, _ = step(carry, keys.pop(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, carry))
    for key in keys:
        carry, _ = step(carry, key)
        restored, _ = step(restored, key)
    jax.tree.map(np.testing.assert_array_equal, carry[0], restored[0])
    assert toy.rounds_begun(restored[1].tuner) >= 1


def test_own_snapshots_hold_it_too(toy, tmp_path):
    step, carry = toy.usual().step, toy.start(toy.usual().optimizer)
    for key in toy.draws(20):
        carry, _ = step(carry, key)
    with atn.Snapshots(tmp_path / "run") as store:
        store.save(20, carry)
        store.wait()
        at, restored = store.restore(like=carry)
    assert at == 20
    jax.tree.map(np.testing.assert_array_equal, carry[1].saved.params, restored[1].saved.params)
    step(restored, toy.draws(1)[0])
