"""The state as two vectors, and the thread count of a decision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch._engine import Engine  # noqa: E402
from autotunenet_torch._packing import Packing, touched  # noqa: E402

TREE = {
    "a": jnp.asarray([1.5, -0.0, jnp.nan, jnp.inf], jnp.float32),
    "b": jnp.asarray([[True, False], [False, True]]),
    "c": jnp.asarray(-3, jnp.int32),
    "d": jax.random.key(7),
    "e": jnp.zeros((0, 2), jnp.float32),
}


def bits(tree):
    leaves = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
              for x in jax.tree.leaves(tree)]  # fmt: skip
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


@pytest.mark.parametrize("live", [(), (0, 2), (1, 3, 4), (0, 1, 2, 3, 4)])
def test_packs_every_bit(live):
    packing = Packing.of(TREE, live=frozenset(live))
    assert bits(jax.jit(lambda tree: packing.unpack(*packing.pack(tree)))(TREE)) == bits(TREE)


def test_touched_leaves_are_those_read_or_written():
    def step(tree, x):
        return {**tree, "a": tree["a"] + x, "c": tree["c"], "e": tree["f"], "f": tree["e"]}, tree["b"]

    tree = {name: jnp.zeros(2) for name in "abcdef"}
    assert touched(step, tree, 1.0) == {0, 1, 4, 5}


def test_a_step_leaves_the_idle_vector_alone():
    engine = Engine(atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, 200), seed=0)
    idle, size = engine._idle, engine._live.size
    for _ in range(3):
        engine.tick(1.0)
    assert engine._idle is idle and not idle.is_deleted()
    assert size < idle.size


def test_blas_has_one_thread_inside_a_decision_and_its_own_again_after():
    controller = pytest.importorskip("threadpoolctl").ThreadpoolController()

    def threads():
        return [library["num_threads"] for library in controller.select(user_api="blas").info()]

    before = threads()
    with atn.one_blas_thread():
        assert set(threads()) <= {1}
    assert threads() == before
