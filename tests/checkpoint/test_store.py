"""What is saved is what is restored; ids, branches, retention, errors that name the differences."""

import math
import pathlib
import shutil
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import autotunenet_jax as atn
from autotunenet_jax import faults

ASSET = pathlib.Path(__file__).parent / "assets" / "snapshot_v1"


class Pair(NamedTuple):
    first: jax.Array
    second: object


def bits(leaf):
    """Everything about a leaf that must survive, as something that == compares."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", str(jax.random.key_impl(leaf)), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, jax.Array):
        return "jax", leaf.dtype, leaf.shape, leaf.weak_type, leaf.committed, np.asarray(leaf).tobytes()
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf), leaf.dtype, np.shape(leaf), leaf.tobytes()
    return type(leaf), repr(leaf)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves_with_path(expected), strict=True)
    for a, (path, e) in pairs:
        assert bits(a) == bits(e), jax.tree_util.keystr(path)


def small_state(value=0.0):
    return {"params": {"w": jnp.full((3, 2), float(value)), "b": jnp.zeros(2)}, "step": jnp.asarray(int(value))}


def every_kind_of_leaf():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3))
    params = {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    nans = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "model": nnx.state((model, nnx.Dropout(0.5, rngs=nnx.Rngs(1)))),
        "keys": [jax.random.key(0), jax.random.split(jax.random.key(1, impl="rbg"), 3), jax.random.PRNGKey(2)],
        "no_keys": jax.random.split(jax.random.key(0), 0),
        "odd_floats": jnp.asarray(nans),
        "minus_zeros": jnp.full((4,), -0.0),
        "small_dtypes": (jnp.arange(3, dtype=jnp.float8_e4m3fn), jnp.arange(3, dtype=jnp.int4), jnp.bool_(True)),
        "weak": (jnp.asarray(2.0), jnp.asarray(3), jnp.broadcast_to(jnp.asarray(0.5), (2, 2))),
        "empty": (jnp.zeros((0, 3)), np.zeros((2, 0), np.int64), jnp.zeros((0,), jnp.int4)),
        "numpy": (
            np.arange(3.0),
            np.arange(6).reshape(2, 3).T,
            np.array(1.5),
            np.arange(3, dtype=">f4"),
            np.eye(2) * 1j,
        ),
        "text_arrays": (np.array(["a", "bcd"]), np.array(["2026-01-01"], "datetime64[D]")),
        "scalars": (np.float32(0.1), np.int8(-3), np.bool_(False), np.float64(math.pi), np.complex64(1j)),
        "python": (3, -(10**30), 0.1, math.nan, -math.inf, -0.0, True, 2 - 1j, "h\u00e9 \n", b"\x00\xff"),
        "none": None,
        "containers": [(), {}, [None], Pair(jnp.ones(1), None), optax.EmptyState()],
    }


def test_every_kind_of_leaf_survives_bit_for_bit(tmp_path):
    tree = every_kind_of_leaf()
    with atn.Snapshots(tmp_path) as store:
        store.save(5, tree)
        step, restored = store.restore(tree)
    assert step == 5
    assert_same(restored, tree)


def test_names_that_collide_are_kept_apart(tmp_path):
    tree = {"a": {"b": jnp.ones(1)}, "a/b": jnp.zeros(1)}
    with atn.Snapshots(tmp_path) as store:
        store.save(0, tree)
        assert_same(store.restore(tree)[1], tree)


def test_single_leaves_and_empty_trees(tmp_path):
    with atn.Snapshots(tmp_path, keep=9) as store:
        for tree in (jnp.arange(3), {}, {"n": 1, "none": None}):
            store.save(0, tree)
            assert_same(store.restore(tree)[1], tree)


def test_donated_state_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"w": jnp.zeros(200_000)}
    with atn.Snapshots(tmp_path, keep=4) as store:
        for i in range(4):
            store.save(i, state)
            state = step(state)
        for record in store.records():
            saved_at, saved = store.restore(state, which=record.id)
            assert saved_at == record.step
            np.testing.assert_array_equal(saved["w"], np.full(200_000, record.step))
            jax.block_until_ready(step(saved))  # and what was restored may itself be donated


def test_restored_state_continues_without_recompiling(tmp_path):
    @jax.jit
    def step(state):
        return jax.tree.map(lambda x: x * 2, state)

    state = step({"w": jnp.ones(3), "rate": jnp.asarray(0.5), "n": 1})
    with atn.Snapshots(tmp_path) as store:
        store.save(1, state)
        _, restored = store.restore({"w": jnp.ones(3), "rate": jnp.asarray(0.5), "n": 1})  # n: saved as an array
    expected = step(state)
    traced = step._cache_size()
    assert_same(step(restored), expected)
    assert step._cache_size() == traced


def test_a_state_lost_to_a_failed_step_still_tells_what_to_restore(tmp_path):
    state = small_state(1.0)
    with atn.Snapshots(tmp_path) as store:
        store.save(1, state)
        jax.tree.map(lambda x: x.delete(), state)  # a step that fails has used its donated inputs up all the same
        _, restored = store.restore(state)
    assert_same(restored, small_state(1.0))


def test_numpy_and_jax_arrays_change_places_as_asked(tmp_path):
    with atn.Snapshots(tmp_path) as store:
        store.save(0, {"a": np.ones(2, np.float32), "b": jnp.ones(2)})
        _, tree = store.restore({"a": jnp.zeros(2), "b": np.zeros(2, np.float32)})
    assert isinstance(tree["a"], jax.Array)
    assert isinstance(tree["b"], np.ndarray)


@pytest.mark.parametrize("copy", [atn.copy_tree, lambda t: atn.copy_tree_to_host(t).to_device()])
def test_copies_in_memory_survive_donation(copy):
    tree = every_kind_of_leaf()
    before = [bits(x) for x in jax.tree.leaves(tree)]
    kept = copy(tree)
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    assert [bits(x) for x in jax.tree.leaves(kept)] == before


def test_a_host_copy_is_restored_anew_each_time_and_lends_its_memory():
    first = atn.copy_tree_to_host({"w": jnp.zeros(3)})
    jax.jit(lambda s: s, donate_argnums=0)(first.to_device())
    assert first.to_device()["w"].tolist() == [0, 0, 0]
    second = atn.copy_tree_to_host({"w": jnp.ones(3)}, reuse=first)
    assert second.arrays[0] is first.arrays[0]
    assert second.to_device()["w"].tolist() == [1, 1, 1]


# Ids, branches, retention.


def test_ids_grow_by_one_for_ever_and_are_not_steps(tmp_path):
    with atn.Snapshots(tmp_path, keep=1) as store:
        assert [store.save(s, small_state()) for s in (100, 100, 50)] == [1, 2, 3]
        assert store.latest() == 50
    with atn.Snapshots(tmp_path) as store:
        assert store.save(70, small_state()) == 4
        assert [r.id for r in store.records()] == [3, 4]


def test_going_back_abandons_what_came_after(tmp_path):
    with atn.Snapshots(tmp_path, keep=9) as store:
        for step in (10, 20, 30):
            store.save(step, small_state(step), metric=-float(step))
        store.restore(small_state(), which=1)
        store.save(15, small_state(15), branch="retry-1")
        records = {r.step: r for r in store.records()}
        assert {s: r.is_abandoned for s, r in records.items()} == {10: False, 15: False, 30: True}  # 30 is the best
        assert (records[15].parent, records[15].branch, records[10].branch) == (1, "retry-1", "main")
    with atn.Snapshots(tmp_path) as store:  # a fresh process continues on the line in force
        assert store.restore(small_state())[0] == 15
        assert store.save(16, small_state()) == 5
        assert store.records()[-1].branch == "retry-1"
        assert store.records()[-1].parent == 4


def test_abandon_tells_before_the_next_save(tmp_path):
    with atn.Snapshots(tmp_path, keep=9) as store:
        for step in (10, 20, 30):
            store.save(step, small_state(step))
        store.abandon(after_step=10)
        assert store.latest() == 10
    with atn.Snapshots(tmp_path) as store:
        assert store.latest() == 10


def test_retention_keeps_the_latest_the_best_and_the_last_healthy(tmp_path):
    metrics = [3.0, 1.0, math.nan, -math.inf, 2.0, math.nan, None, 5.0]
    with atn.Snapshots(tmp_path, keep=2) as store:
        for step, metric in enumerate(metrics):
            status = "healthy" if step == 3 else "suspect"
            store.save(step, small_state(step), metric=metric, status=status)
        assert [r.step for r in store.records()] == [1, 3, 6, 7]
        assert store.restore(small_state(), which="best")[0] == 1
        assert store.restore(small_state(), which="healthy")[0] == 3
        assert store.restore(small_state(), which="latest")[0] == 7
        store.mark(8, status="healthy")
        assert store.restore(small_state(), which="healthy")[0] == 7
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == [f"{i:08d}" for i in (2, 4, 7, 8)]


def test_a_nan_metric_does_not_displace_the_best(tmp_path):
    with atn.Snapshots(tmp_path, keep=1, mode="max") as store:
        for step, metric in enumerate([0.5, math.nan, math.inf, 0.4]):
            store.save(step, small_state(step), metric=jnp.float32(metric))
        step, tree = store.restore(small_state(), which="best")
    assert step == 0
    assert tree["params"]["w"][0, 0] == 0.0


def test_negative_and_equal_metrics(tmp_path):
    with atn.Snapshots(tmp_path, keep=1, keep_best=2) as store:
        for step, metric in enumerate([-1.0, -3.0, -3.0, 0.0]):
            store.save(step, small_state(step), metric=metric)
        assert [r.step for r in store.records()] == [1, 2, 3]
        assert store.restore(small_state(), which="best")[0] == 2


# Errors that name what is wrong; never a partial load.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tree = {"params": {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}, "key": jax.random.key(0), "n": 1}
    with atn.Snapshots(folder, space="space-a") as store:
        store.save(9, tree)
    return folder, tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["params"].update(dense_3={"kernel": jnp.ones((2, 2))}),
            r"missing params/dense_3/kernel \(float32",
        ),
        (lambda t: t["params"]["dense"].pop("bias"), r"unexpected params/dense/bias \(float32\[2\]\)"),
        (
            lambda t: t["params"]["dense"].update(kernel=jnp.ones((4, 3))),
            r"shape of params/dense/kernel: float32\[4,2\]",
        ),
        (lambda t: t["params"]["dense"].update(kernel=jnp.ones((4, 2), jnp.bfloat16)), "dtype of params/dense/kernel"),
        (lambda t: t["params"]["dense"].update(bias=None), "unexpected params/dense/bias"),
        (lambda t: t.update(key=jax.random.key(0, impl="rbg")), "type of key: key<threefry2x32>"),
        (lambda t: t.update(key=jax.random.PRNGKey(0)), "type of key"),
        (lambda t: t.update(n="one"), "type of n: Python int in the snapshot, Python str asked for"),
        (lambda t: t.update(n=jnp.asarray(1.0)), "type of n: Python int in the snapshot"),
    ],
)
def test_another_model_is_named_and_not_loaded(saved, change, message):
    folder, tree = saved
    other = jax.tree.map(lambda x: x, tree)
    change(other)
    with atn.Snapshots(folder) as store:
        with pytest.raises(atn.SnapshotMismatchError, match=message) as caught:
            store.restore(other)
        assert isinstance(caught.value, ValueError)
        assert store.restore(tree)[0] == 9  # and the snapshot is not the worse for it


def test_another_space_is_refused(saved):
    folder, tree = saved
    with atn.Snapshots(folder, space="space-b") as store, pytest.raises(ValueError, match=r"space-a.*space-b"):
        store.restore(tree)
    space = atn.SearchSpace({"learning_rate": atn.Float(1e-5, 1e-1)})
    with (
        atn.Snapshots(folder, space=space, read_only=True) as store,
        pytest.raises(atn.SnapshotMismatchError, match=r"learning_rate=Float\(1e-05, 0.1\)"),
    ):
        store.restore(tree)


def test_an_empty_folder_is_file_not_found(tmp_path):
    with atn.Snapshots(tmp_path / "new" / "folder") as store:
        assert store.latest() is None
        assert store.records() == ()
        with pytest.raises(FileNotFoundError, match="There is no snapshot 'latest'"):
            store.restore({})
        with pytest.raises(atn.NoSnapshotError, match="There is no snapshot 3"):
            store.restore({}, which=3)
        with pytest.raises(ValueError, match="which must be"):
            store.restore({}, which="newest")


def test_leaves_that_cannot_be_stored_are_named(tmp_path):
    with atn.Snapshots(tmp_path) as store:
        with pytest.raises(TypeError, match="Cannot snapshot model/apply: a leaf of type function"):
            store.save(0, {"model": {"apply": lambda x: x}})
        with pytest.raises(TypeError, match="dtype object"):
            store.save(0, {"a": np.array([{}], object)})
        with pytest.raises(TypeError, match="tracer"):
            jax.jit(lambda x: store.save(0, {"x": x}))(1.0)
        with pytest.raises(ValueError, match="step must not be negative"):
            store.save(-1, {})
        assert store.records() == ()


@pytest.mark.parametrize(
    "arguments", [{"keep": 0}, {"keep_best": -1}, {"mode": "best"}, {"overhead": 0.0}, {"interval_s": -1.0}]
)
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be"):
        atn.Snapshots(tmp_path / "never", **arguments)
    assert not (tmp_path / "never").exists()


def test_a_closed_store_says_so(tmp_path):
    store = atn.Snapshots(tmp_path)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.save(0, {})


def test_a_reader_beside_the_writer(tmp_path):
    with atn.Snapshots(tmp_path, keep=1) as writer:
        writer.save(1, small_state(1), wait=True)
        with atn.Snapshots(tmp_path, read_only=True) as reader:
            assert reader.restore(small_state())[0] == 1
            writer.save(2, small_state(2), wait=True)
            assert reader.latest() == 2
            with pytest.raises(ValueError, match="read only"):
                reader.save(3, small_state())
    with pytest.raises(FileNotFoundError, match="no snapshot folder"):
        atn.Snapshots(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()


# Cadence.


def test_is_due_keeps_to_the_interval_and_the_share_of_the_run(tmp_path):
    with atn.Snapshots(tmp_path, interval_s=0.0, overhead=0.5) as store:
        store.prepare(small_state())
        store.wait()
        assert store.is_due()
        with faults.slow_disk(delay_s=0.03):
            start = time.monotonic()
            store.save(0, small_state())
            assert not store.is_due()  # one is being written
            store.wait()
            written_s = time.monotonic() - start
        assert written_s > 0.1
        assert not store.is_due()  # and took long: at most a tenth of the time goes into writing
    with atn.Snapshots(tmp_path, interval_s=3600.0) as store:
        assert not store.is_due()


def test_a_slow_disk_does_not_block(tmp_path):
    with atn.Snapshots(tmp_path) as store:
        store.save(0, small_state(), wait=True)
        with faults.slow_disk(delay_s=0.05):
            start = time.monotonic()
            store.save(1, small_state())
            blocked_s = time.monotonic() - start
            store.wait()
            assert blocked_s < 0.3 < time.monotonic() - start


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    with atn.Snapshots(tmp_path) as store:
        store.save(1, small_state(1), wait=True)
        with faults.clock_jump(seconds=-1e6):
            store.save(2, small_state(2), wait=True)
        assert [r.step for r in store.records()] == [1, 2]
        assert store.latest() == 2


# The future.


def asset_state():
    return {
        "params": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.full(3, -0.0, jnp.bfloat16)},
        "key": jax.random.key(42),
        "empty": jnp.zeros((0, 2)),
        "epoch": 7,
        "rate": 0.1,
        "pair": Pair(jnp.asarray(2.0), None),
    }


def test_a_snapshot_of_the_first_version_restores(tmp_path):
    shutil.copytree(ASSET, tmp_path / "old")
    with atn.Snapshots(tmp_path / "old", space="asset") as store:
        step, tree = store.restore(asset_state(), which="best")
    assert step == 1234
    assert_same(tree, asset_state())


if __name__ == "__main__":  # writes the asset of the current version
    with atn.Snapshots(sys.argv[1], space="asset") as new:
        new.save(1234, asset_state(), metric=0.25)
