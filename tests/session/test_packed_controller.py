"""The controller's state in two parts, and the thread count of a decision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.session.packed_controller import PackedController, touched


def tuner():
    return atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, 200)


def bits(tree):
    leaves = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
              for x in jax.tree.leaves(tree)]  # fmt: skip
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def test_the_state_is_the_tuners_bit_for_bit():
    assert bits(PackedController(tuner(), seed=3).state) == bits(tuner().init(jax.random.key(3)))


def test_bytes_give_the_state_back():
    first, second = PackedController(tuner(), seed=3), PackedController(tuner(), seed=4)
    for loss in (1.0, 0.5):
        first.tick(loss)
    second.from_bytes(first.to_bytes())
    assert bits(second.state) == bits(first.state)
    assert (second.step, second.phase, second.hyperparams()) == (2, first.phase, first.hyperparams())


def test_bytes_of_another_tuner_are_refused():
    other = PackedController(atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, 300))
    with pytest.raises(ValueError, match="plan"):
        PackedController(tuner()).from_bytes(other.to_bytes())
    with pytest.raises(ValueError, match="another tuner"):
        PackedController(tuner()).from_bytes(other.to_bytes()[:-4])


def test_touched_leaves_are_those_read_or_written():
    def step(tree, x):
        return {**tree, "a": tree["a"] + x, "c": tree["c"], "e": tree["f"], "f": tree["e"]}, tree["b"]

    tree = {name: jnp.zeros(2) for name in "abcdef"}
    assert touched(step, tree, 1.0) == {0, 1, 4, 5}


def test_a_step_leaves_the_idle_part_alone():
    def size(packed):
        return sum(leaf.size for leaf in jax.tree.leaves(packed))

    controller = PackedController(tuner())
    idle, live_size = controller._idle, size(controller._live)
    for _ in range(3):
        controller.tick(1.0)
    assert controller._idle is idle and not any(leaf.is_deleted() for leaf in jax.tree.leaves(idle))
    assert live_size < size(idle)


def test_blas_has_one_thread_inside_a_decision_and_its_own_again_after():
    controller = pytest.importorskip("threadpoolctl").ThreadpoolController()

    def threads():
        return [library["num_threads"] for library in controller.select(user_api="blas").info()]

    before = threads()
    with atn.one_blas_thread():
        assert set(threads()) <= {1}
    assert threads() == before
