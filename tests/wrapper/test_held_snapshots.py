"""Snapshots inside an optimizer's state: what comes out is what went in, and steps hardly pay for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.compiler import packing
from autotunenet_jax.wrapper import held_snapshots
from autotunenet_jax.wrapper.held_snapshots import Snapshot, SnapshotTrees, SnapshotVectors, snapshots_of


def snapshot(seed, *, shape=(3, 4)):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    params = {
        "w": jax.random.normal(next(keys), shape),
        "half": jax.random.normal(next(keys), (5,), jnp.bfloat16),
        "z": jax.random.normal(next(keys), (2,)) * (1 + 2j),
        "none": jnp.zeros((0, 3)),
        "alone": jnp.float32(seed),
    }
    inner = (jnp.int32(seed), {"mask": jnp.arange(4) < seed, "word": jnp.uint32(2**31 + seed)}, next(keys), None)
    return Snapshot(params, inner)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def trees_of(snapshots):
    return SnapshotTrees(tuple(snapshots))


@pytest.fixture(params=[snapshots_of, trees_of], ids=["vectors", "trees"])
def kept(request):
    return request.param([snapshot(0), snapshot(1)])


@jax.jit
def written(snapshots, flags, new):
    return snapshots.written(flags, Snapshot, *new)


def test_what_comes_out_is_what_went_in(kept):
    for number in range(2):
        assert_same(kept.read(number), snapshot(number))
        assert_same(jax.jit(type(kept).read_at)(kept, jnp.int32(number)), snapshot(number))


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
def test_only_flagged_slots_are_written(kept, flags):
    after = written(kept, tuple(map(jnp.array, flags)), snapshot(7))
    for number, flag in enumerate(flags):
        assert_same(after.read(number), snapshot(7 if flag else number))


def test_a_population_has_snapshots_of_its_own(kept):
    population = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), kept, written(kept, (jnp.array(True),) * 2, snapshot(5))
    )
    flags = (jnp.array([True, False]), jnp.array([False, True]))
    after = jax.vmap(written, in_axes=(0, 0, None))(population, flags, snapshot(7))
    for member, (first, second) in enumerate([(7, 1), (5, 7)]):
        assert_same(jax.tree.map(lambda leaf, m=member: leaf[m], after.read(0)), snapshot(first))
        assert_same(jax.tree.map(lambda leaf, m=member: leaf[m], after.read(1)), snapshot(second))


@pytest.fixture
def limited(monkeypatch):
    def limit(longest):
        monkeypatch.setattr(packing, "_LONGEST", longest)
        packing.pack.clear_cache()

    yield limit
    packing.pack.clear_cache()


def test_long_vectors_are_parted(limited):
    limited(16)
    kept = snapshots_of([snapshot(0), snapshot(1)])
    assert {name for name in kept.packed.vectors if name.startswith("float32")} == {"float32.0"}
    limited(12)
    kept = snapshots_of([snapshot(0), snapshot(1)])
    assert {name for name in kept.packed.vectors if name.startswith("float32")} == {"float32.0", "float32.1"}
    assert_same(kept.read(1), snapshot(1))
    after = written(kept, (jnp.array(False), jnp.array(True)), snapshot(3))
    assert_same(after.read(0), snapshot(0))
    assert_same(after.read(1), snapshot(3))
    limited(8)
    kept = snapshots_of([snapshot(0)])
    assert any(leaf.shape == (1, 3, 4) for leaf in kept.packed.apart)
    assert_same(kept.read(0), snapshot(0))


def test_nothing_is_shared_with_what_was_given():
    alone = Snapshot({"w": jnp.arange(4.0)}, ())
    for kept in (snapshots_of([alone, alone]), trees_of([alone, alone])):
        if isinstance(kept, SnapshotVectors):
            jax.jit(lambda kept: jax.tree.map(lambda leaf: leaf + 1, kept), donate_argnums=0)(kept)
            assert not alone.params["w"].is_deleted()


def layers(count, width=16):
    return [{"w": jnp.eye(width), "b": jnp.zeros(width)} for _ in range(count)]


def wrapped(memory):
    return atn.autotune(optax.adam, {"learning_rate": (1e-5, 1e-1)}, 100, memory=memory, learning_rate=1e-3)


def test_a_step_carries_few_arrays_more_however_many_parameters_there_are():
    params = layers(20)
    plain = len(jax.tree.leaves(optax.adam(1e-3).init(params)))
    assert len(jax.tree.leaves(wrapped("keep-winner").init(params))) <= plain + 10


def test_where_a_program_may_spread_them_they_stay_trees(monkeypatch):
    monkeypatch.setattr(held_snapshots.jax, "device_count", lambda: 2)
    # Arrays that one device holds are known to be whole, traced ones are not.
    assert isinstance(wrapped("keep-winner").init(layers(2)).snapshots, SnapshotVectors)
    state = jax.jit(wrapped("keep-winner").init)(layers(2))
    assert isinstance(state.snapshots, SnapshotTrees)
    assert_same(state.saved.params, layers(2))


@pytest.mark.parametrize("memory", ["keep-winner", "rewind"])
def test_without_parameters_there_is_nothing_to_copy(memory):
    """Such as those of a group that everything has been frozen in."""
    both = optax.partition({"a": wrapped(memory), "b": optax.sgd(0.1)}, {"w": "b"})
    params = {"w": jnp.ones(3)}
    state = both.init(params)
    _, after = jax.eval_shape(lambda p, s: both.update(p, s, p, value=jnp.float32(1.0)), params, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    tuned = wrapped(memory).init({})
    assert tuned.saved is None and tuned.kept is None
    assert set(atn.hyperparams(tuned)) == {"learning_rate"}
