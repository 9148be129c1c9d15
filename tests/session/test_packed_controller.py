"""The packed controller is the tuner, and the thread count of a decision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import loss_monitor
from autotunenet_jax.session.packed_controller import PackedController


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


CURVES = {
    "noisy": lambda t, noise: 2 * np.exp(-t / 200) + 0.1 + 0.05 * noise,
    "fast": lambda t, noise: 2 * np.exp(-t / 50) * (1 + 0.01 * noise),
    "flat": lambda t, noise: 1 + 0.02 * noise,
    "negative, large": lambda t, noise: 1e6 * (5 * np.exp(-t / 100) - 5 + 0.05 * noise),
    "spikes": lambda t, noise: 1 + np.exp(-t / 100) + 0.02 * noise + 30 * (t % 67 == 5),
    "up and down": lambda t, noise: 1 + 0.01 * noise + 2 * ((t > 300) & (t < 320)) - 0.3 * (t > 500),
    "skipped": lambda t, noise: np.where(t % 71 == 9, math.nan, 1 + 0.02 * noise),
    "diverges": lambda t, noise: 1 + 0.02 * noise + np.where(t % 300 > 200, np.exp(np.minimum(t % 300 - 200, 60)), 0),
}


@pytest.mark.parametrize("kind", CURVES)
def test_losses_that_wait_change_nothing(kind):
    """Beside a controller that hears each loss at once: the same said, and the same state bit for bit."""
    steps = 600
    space = {"learning_rate": (1e-4, 1.0), "dropout": (0.0, 0.5)}
    tuner = atn.AutoTuneNet(space, steps, decay="cosine", guard=atn.Guard(stall_steps=100))
    waits, hears = PackedController(tuner), PackedController(tuner)
    losses = CURVES[kind](np.arange(steps), np.random.default_rng(3).standard_normal(steps))
    in_train = waited = 0
    for step, loss in enumerate(losses.tolist()):
        hears._may_wait = 0
        in_train += waits.phase == 0
        said, expected = waits.tick(loss), hears.tick(loss)
        waited += bool(waits._waiting)
        assert said == expected and waits.hyperparams() == hears.hyperparams()
        for name in ("step", "data_step", "phase", "may_copy", "saved_data"):
            assert getattr(waits, name) == getattr(hears, name)
        if said.is_due:
            waits.decide(), hears.decide()
        if step % 150 == 149:
            assert waits.observe_eval(loss) == hears.observe_eval(loss)
        if step % 97 == 0 or step == steps - 1:
            assert bits(waits.state) == bits(hears.state)
    assert waited > 0.3 * in_train


def test_a_loss_out_of_bounds_is_answered_at_once():
    controller = PackedController(atn.AutoTuneNet({"learning_rate": (1e-4, 1.0)}, 100_000))
    rng, heard = np.random.default_rng(0), []
    for _ in range(5000):  # until the first round is over
        if controller.tick(1.0 + 0.1 * rng.standard_normal()).is_due:
            controller.decide()
    for _ in range(12):
        assert controller.phase == 0 and controller._may_wait > 4
        controller.tick(1.0)
        heard.append(controller.tick(math.nan).directive.verdict)
        for _ in range(30):
            controller.tick(1.0 + 0.1 * rng.standard_normal())
    assert set(heard) == {loss_monitor.SKIPPED} and int(controller.state.health.bad_steps) == 12


def test_blas_has_one_thread_inside_a_decision_and_its_own_again_after():
    controller = pytest.importorskip("threadpoolctl").ThreadpoolController()

    def threads():
        return [library["num_threads"] for library in controller.select(user_api="blas").info()]

    before = threads()
    with atn.one_blas_thread():
        assert set(threads()) <= {1}
    assert threads() == before
