"""The history of a tuned optimizer: what was in force and what was kept, exactly, wherever the state is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.compiler import packing
from autotunenet_jax.controller.state import OUTCOME_ROLLBACK
from autotunenet_jax.wrapper import ring
from autotunenet_jax.wrapper.state import in_force
from tests import history_fields

MEMORIES = ("keep-winner", pytest.param("rewind", marks=pytest.mark.soak), "drift")
SKIPPED, SPIKED, BROKEN = 150, range(120, 132), range(200, 240)


def spoil(i, loss, grads):
    """A batch that is not finite, a stretch whose losses stay far up, and a longer one without a finite loss."""
    loss = jnp.where((i == SKIPPED) | ((i >= BROKEN[0]) & (i <= BROKEN[-1])), jnp.nan, loss)
    return loss + jnp.where((i >= SPIKED[0]) & (i < SPIKED[-1]), 50.0, 0.0), grads


def make_told(toy, optimizer):
    """A step that also says what was in force, and the loss of the parameters it began with."""

    def step(carry, key):
        params, opt_state, i = carry
        opt_state = jax.lax.cond(
            atn.wants_eval(opt_state),
            lambda state: atn.observe_eval(state, toy.loss_fn(params, jax.random.key(77))),
            lambda state: state,
            opt_state,
        )
        rate = atn.hyperparams(opt_state)["learning_rate"]
        loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        told, grads = spoil(i, loss, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=told)
        return (optax.apply_updates(params, updates), opt_state, i + 1), (rate, loss)

    return step


def run_told(toy, optimizer, steps):
    scan = jax.jit(lambda carry, keys: jax.lax.scan(make_told(toy, optimizer), carry, keys))
    (params, opt_state, _), (rates, losses) = scan(toy.start(optimizer), toy.draws(steps))
    return params, opt_state, np.asarray(rates), np.asarray(losses)


RUNS = {}


@pytest.fixture(params=MEMORIES)
def told(request, toy, light_surrogate):
    """A run in a memory mode, made once, under the light surrogate as the tests are."""
    memory = request.param
    if memory not in RUNS:
        params, opt_state, rates, losses = run_told(toy, toy.wrapped(total_steps=260, memory=memory), 260)
        RUNS[memory] = memory, params, rates, losses, atn.history(opt_state)
    return RUNS[memory]


def test_every_step_is_told_with_what_was_in_force(told):
    _, _, rates, _, history = told
    assert [row["step"] for row in history.records] == list(range(1, 261))
    np.testing.assert_array_equal([row["learning_rate"] for row in history.records], rates)


def test_the_kept_steps_under_the_schedule_are_the_run(told, toy):
    """Plain Adam under the schedule, on the batches of the kept steps: no tuner, no forks, no rollbacks."""
    memory, params, _, losses, history = told
    kept = history.kept()
    steps = np.array([row["step"] for row in kept])
    assert SKIPPED + 1 not in steps and len(steps) < 260
    schedule = history.schedule()["learning_rate"]
    optimizer = optax.adam(schedule)

    def step(carry, key):
        weights, state = carry
        loss, grads = jax.value_and_grad(toy.loss_fn)(weights, key)
        updates, state = optimizer.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), loss

    weights = toy.make_params()
    keys = toy.draws(260)[steps - 1]
    (weights, _), replayed = jax.jit(lambda c, k: jax.lax.scan(step, c, k))((weights, optimizer.init(weights)), keys)
    np.testing.assert_allclose(replayed, losses[steps - 1], rtol=2e-3, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), weights, params)
    lost = sum(end - start for start, end in history.discarded)
    assert lost == 260 - len(steps) == sum(history.summary[name] for name in ("discarded_steps", "undone_steps"))
    assert (history.summary["discarded_steps"] == 0) == (memory == "drift")


def test_decisions_have_their_evidence(told):
    memory, _, _, _, history = told
    assert len(history.rounds) >= 1
    for row in history.rounds:
        assert len(row["forks"]) >= 1 and row["verdict"].endswith(".")
        for fork in row["forks"]:
            assert fork["end"] - fork["start"] == fork["steps"] or fork["status"] == "failed"
            assert 1e-4 <= fork["hyperparams"]["learning_rate"] <= 1.0
            assert np.isfinite(fork["p_better"]) and len(fork["scores"]) == (fork["status"] != "failed")
        assert row["best"] < 0 or row["forks"][row["best"]]["status"] == "kept"
        assert np.isfinite(row["reference"])
    # A round whose first fork fails before it is measured is scored by the loss.
    assert "validation" in {row["scored_by"] for row in history.rounds}
    text = history.explain()
    assert "Verdict: " in text and "fresh data" in text and len(text.splitlines()) < 40
    kinds = {event["kind"] for event in history.events}
    assert ("lowered" if memory == "drift" else "rollback") in kinds
    assert history.summary["evals"] == len(history.evals) > 5
    assert history.summary["dropped"] == 0 and len(history.events) < 10


def test_it_is_the_history_that_fit_returns(told):
    history_fields.check(told[-1])


def test_from_disk_it_gives_equal_pictures(told, tmp_path):
    pytest.importorskip("matplotlib")
    memory, history = told[0], told[-1]
    again = atn.History.from_dict(json.loads(json.dumps(history.to_dict(), allow_nan=False)))
    assert json.dumps(again.to_dict()) == json.dumps(history.to_dict())
    assert again.explain() == history.explain()
    if memory != "keep-winner":
        return  # one picture is enough
    history.plot(tmp_path / "a.png")
    again.plot(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_losses_that_are_reported_afterwards(toy):
    """A step back then takes an update of its own, which is no part of the training."""
    optimizer = toy.wrapped()

    def step(carry, key):
        params, opt_state = carry
        rate = atn.hyperparams(opt_state)["learning_rate"]
        loss, grads = jax.value_and_grad(toy.loss_fn)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), atn.observe(opt_state, loss)), (rate, loss)

    params = toy.make_params()
    scan = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (_, opt_state), (rates, losses) = scan((params, optimizer.init(params)), toy.draws())
    history = atn.history(opt_state)
    # The first update does not know yet that losses will come.
    np.testing.assert_array_equal([row["learning_rate"] for row in history.records][1:], rates[1:])
    steps = np.array([row["step"] for row in history.kept()])
    plain = optax.adam(history.schedule()["learning_rate"])

    def replayed(carry, key):
        weights, state = carry
        loss, grads = jax.value_and_grad(toy.loss_fn)(weights, key)
        updates, state = plain.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), loss

    keys = toy.draws()[steps - 1]
    _, again = jax.jit(lambda c, k: jax.lax.scan(replayed, c, k))((params, plain.init(params)), keys)
    np.testing.assert_allclose(again, losses[steps - 1], rtol=2e-3, atol=1e-5)


def test_it_is_found_wherever_the_state_is(toy):
    flax = pytest.importorskip("flax")
    from flax import nnx
    from flax.training import train_state

    _, opt_state, _ = toy.usual().end
    usual = atn.history(opt_state)
    assert len(usual.rounds) >= 1
    optimizer = toy.usual().optimizer
    state = train_state.TrainState.create(apply_fn=None, params=toy.make_params(), tx=optimizer)
    boxed = {"chain": (optax.EmptyState(), opt_state), "train state": state.replace(opt_state=opt_state)}
    for holder in boxed.values():
        assert atn.history(holder).to_dict() == usual.to_dict()
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    held = nnx.Optimizer(model, toy.wrapped(optax.sgd, learning_rate=1e-2), wrt=nnx.Param)
    assert atn.history(held).to_dict()["space"] == usual.to_dict()["space"]
    # Through bytes and back.
    leaves, structure = jax.tree.flatten(opt_state)
    data = flax.serialization.to_bytes([raw(leaf) for leaf in leaves])
    restored = flax.serialization.from_bytes([raw(leaf) for leaf in leaves], data)
    restored = jax.tree.unflatten(structure, [keyed(leaf, like) for leaf, like in zip(restored, leaves, strict=True)])
    assert atn.history(restored).to_dict() == usual.to_dict()


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf):
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def keyed(leaf, like):
    return jax.random.wrap_key_data(jnp.asarray(leaf)) if is_key(like) else jnp.asarray(leaf)


add_entry = jax.jit(lambda record, words: ring.add_entry(record, words, 1, flag=jnp.ones((), bool)))


def test_another_budget_on_the_way(toy):
    optimizer, step = toy.usual().optimizer, toy.usual().step
    carry, rates = toy.start(optimizer), []

    def train(step, carry, keys):
        for key in keys:
            rates.append(float(atn.hyperparams(carry[1])["learning_rate"]))
            carry, _ = step(carry, key)
        return carry

    params, opt_state, i = train(step, carry, toy.draws()[:130])
    opt_state = atn.extend(opt_state, total_steps=200)
    longer = jax.jit(toy.make_step(toy.wrapped(total_steps=200)))
    carry = train(longer, (params, opt_state, i), toy.draws(200)[130:])
    history = atn.history(carry[1])
    np.testing.assert_array_equal(np.float32([row["learning_rate"] for row in history.records]), np.float32(rates))
    assert [event["step"] for event in history.events if event["kind"] == "extended"] == [130]


def test_the_record_does_not_grow_and_a_plain_step_leaves_it(toy):
    optimizer, step = toy.usual().optimizer, toy.usual().step
    carry, changed = toy.start(optimizer), 0
    sizes = {carry[1].record.shape}
    for key in toy.draws():
        before = np.asarray(carry[1].record)
        carry, _ = step(carry, key)
        changed += not np.array_equal(before, carry[1].record)
        sizes.add(carry[1].record.shape)
    contents = ring.read(np.asarray(carry[1].record), 1)
    assert len(sizes) == 1 and contents.dropped == 0
    assert changed <= len(contents.entries.step) + len(contents.spans) + len(contents.levels)


def test_a_run_that_breaks_for_ever_is_told_in_a_few_rows(toy):
    """Going back to the same snapshot again and again takes one row."""
    _, opt_state, _ = toy.usual().end
    ts, record = opt_state.tuner, opt_state.record
    rounds = len(atn.history(opt_state).rounds)
    for number in range(3 * ring.CAPACITY):
        step = 170 + 8 * number
        made = ring.entry(
            ts._replace(step=jnp.int32(step)), cause=ring.HEARD, phase=0, outcome=OUTCOME_ROLLBACK, verdict=2,
            rewound=155,
        )  # fmt: skip
        record = add_entry(record, ring.words_of(made))
    packed = packing.pack(opt_state.course._replace(tuner=ts._replace(step=jnp.int32(step))))
    history = atn.history(opt_state._replace(record=record, packed=packed))
    assert history.summary["dropped"] == 0 and len(history.rounds) == rounds
    told = [event for event in history.events if event["kind"] == "rollback"]
    assert len(told) == 1 and f"{3 * ring.CAPACITY} times in a row" in told[0]["message"]
    assert history.discarded[-1] == (155, step)


def test_what_is_gone_is_said(toy):
    _, opt_state, _ = toy.usual().end
    ts, record = opt_state.tuner, opt_state.record
    for _ in range(ring.CAPACITY - 2):
        words = ring.words_of(ring.entry(ts, cause=ring.EXTENDED, phase=ts.phase))
        record = add_entry(record, words)
    history = atn.history(opt_state._replace(record=record))
    dropped = history.summary["dropped"]
    assert dropped > 0 and any(event["kind"] == "dropped" for event in history.events)
    assert all(row["forks"] and row["best"] < len(row["forks"]) for row in history.rounds)
    with pytest.raises(ValueError, match=f"first {dropped} decisions of this run are not known any more"):
        history.schedule()


def test_what_has_no_history_is_said(toy):
    optimizer = toy.usual().optimizer
    state = optimizer.init(toy.make_params())
    with pytest.raises(TypeError, match="read on the host"):
        jax.jit(lambda state: atn.history(state).summary)(state)
    with pytest.raises(ValueError, match="several runs"):
        atn.history(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state))
    with pytest.raises(ValueError, match=r"no state of autotunenet_jax\.autotune"):
        atn.history(optax.adam(1e-3).init(toy.make_params()))
    assert atn.history(toy.wrapped(enabled=False).init(toy.make_params())).records == []


def test_steps_without_any_loss_follow_the_schedule_from_the_start(toy):
    state = toy.usual().optimizer.init(toy.make_params())
    rates = [in_force(state.settings, state.course._replace(lag=jnp.int32(lag)), is_silent=True) for lag in range(3)]
    state = state._replace(packed=packing.pack(state.course._replace(lag=jnp.int32(3))))
    records = atn.history(state).records
    assert [row["learning_rate"] for row in records] == [float(values["learning_rate"]) for values in rates]
