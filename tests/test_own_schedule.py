"""A schedule of the user's own as the base shape, its peak tuned, in all three ways in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller.state import TRAIN
from tests import problem
from tests.contract import conftest as toy

pytestmark = pytest.mark.filterwarnings("ignore:The best learning_rate lies at")

TOTAL = problem.TOTAL_STEPS
SHAPES = {
    "warm-up and cosine": optax.warmup_cosine_decay_schedule(0.0, 0.02, 16, TOTAL),
    "WSD": optax.join_schedules(
        [
            optax.linear_schedule(0.0, 0.02, 8),
            optax.constant_schedule(0.02),
            optax.linear_schedule(0.02, 0.0, TOTAL // 4),
        ],
        [8, TOTAL - TOTAL // 4],
    ),
}


@functools.cache
def share_of(shape):
    """What part of its peak a shape has at each step."""
    values = np.asarray(jax.jit(jax.vmap(shape))(np.arange(TOTAL + 1)), np.float64)
    return values / values.max()


def check(shape, steps, rates, peaks):
    """Rates of ordinary training are the shape, at the height that was tuned."""
    share = share_of(shape)[np.array(steps)]
    assert len(steps) > 40 and share.max() > 1.5 * share.min()
    np.testing.assert_allclose(rates, np.array(peaks) * share, rtol=2e-3, atol=1e-7)


def after_rounds(history):
    """Records of ordinary training between the last round and whatever moved the rates then."""
    ends = [row["end"] for row in history.rounds]
    moved = [event["step"] for event in history.events if event["kind"] in ("rollback", "retreat", "fall")]
    last = min([step for step in moved if step > max(ends)], default=TOTAL + 1)
    return [row for row in history.records if row["phase"] == "train" and max(ends) < row["step"] < last]


@pytest.mark.parametrize("name", ["warm-up and cosine", pytest.param("WSD", marks=pytest.mark.soak)])
def test_in_fit(name):
    shape = SHAPES[name]
    result = atn.fit(
        problem.train_step, problem.new_state(), problem.batches, tuner=problem.tuner(schedule=shape), progress=False
    )
    rows = after_rounds(result.history)
    (held,) = result.history.rounds
    peak = held["chosen"]["learning_rate"]
    assert peak > 1e-3  # found, from a start of 1e-5
    check(shape, [row["step"] - 1 for row in rows], [row["learning_rate"] for row in rows], [peak] * len(rows))


@pytest.mark.parametrize("name", ["warm-up and cosine", pytest.param("WSD", marks=pytest.mark.soak)])
def test_in_autotune(name, monkeypatch):
    # Which rates are tried is no matter here, and a step without the Gaussian process compiles in half the time.
    toy.lighten(monkeypatch.setattr)
    shape = SHAPES[name]
    optimizer = atn.autotune(optax.adam, {"learning_rate": (1e-5, 1.0)}, TOTAL, schedule=shape, learning_rate=1e-5)
    params = problem.new_state()["params"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(problem.loss_fn)(params, *batch[:2])
        rate = atn.hyperparams(state)["learning_rate"]
        updates, state = optimizer.update(gradient, state, params, value=loss)
        return optax.apply_updates(params, updates), state, rate

    rates = []
    for number in range(TOTAL):
        params, state, rate = step(params, state, problem.batch(number))
        rates.append(float(rate))
    history = atn.history(state)
    rows = after_rounds(history)
    peak = history.rounds[-1]["chosen"]["learning_rate"]
    assert peak > 1e-3
    steps = [row["step"] - 1 for row in rows]
    check(shape, steps, [rates[step] for step in steps], [peak] * len(steps))


@pytest.mark.parametrize("way", ["schedule", "LambdaLR"])
@pytest.mark.parametrize("name", ["warm-up and cosine", pytest.param("WSD", marks=pytest.mark.soak)])
def test_in_pytorch(name, way):
    torch = pytest.importorskip("torch")
    from autotunenet_torch import AutoTuneNet

    shape, share = SHAPES[name], share_of(SHAPES[name])
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x @ torch.arange(1.0, 7.0)[:, None]
    model = torch.nn.Linear(6, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    own = {"schedule": shape} if way == "schedule" else {}
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=TOTAL, initial={"learning_rate": 1e-3}, **own)
    scheduler = None
    if way == "LambdaLR":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(share[min(step, TOTAL)]))
    tuner.attach(model, optimizer, scheduler)
    fed = []
    optimizer.register_step_pre_hook(lambda *_: fed.append(optimizer.param_groups[0]["lr"]))
    for _ in range(TOTAL):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        tuner.step(loss)
    rows = after_rounds(tuner.history)
    peak = tuner.history.rounds[-1]["chosen"]["learning_rate"]
    steps = [row["step"] - 1 for row in rows]
    check(shape, steps, [fed[step] for step in steps], [peak] * len(steps))


def test_its_height_is_no_matter():
    """The peak is tuned; only the shape is taken."""
    tall, small = (problem.tuner(schedule=optax.cosine_decay_schedule(height, TOTAL)) for height in (jnp.pi, 1e-3))
    ts = tall.init(jax.random.key(0))
    ts = ts._replace(step=jnp.int32(TOTAL // 2), phase=jnp.int32(TRAIN))
    for tuner in (tall, small):
        # Half way down from the start.
        assert float(jax.jit(tuner.hyperparams)(ts)["learning_rate"]) == pytest.approx(0.5e-5, rel=1e-4)
