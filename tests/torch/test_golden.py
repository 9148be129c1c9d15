"""The adapter beside the core: one sequence of losses and metrics, the same decisions."""

import math

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_jax.controller.validation_monitor import kept_at_once  # noqa: E402
from autotunenet_torch import AutoTuneNet  # noqa: E402

SPACE = {"learning_rate": (1e-4, 1.0), "dropout": (0.0, 0.5)}
TRAIN, SWEEP, FORK = 0, 1, 2
INITIAL = {"learning_rate": 1e-3, "dropout": 0.1}
STEPS = 1200
EVAL_EVERY = 10


class Curve:
    """A loss that falls fastest near one rate, with noise, faults and, late, a rise of the validation metric.

    Faults come at the steps of a phase, so that they hit what they are meant for.
    """

    def __init__(self, seed):
        self.random, self.level, self.last, self.counts = np.random.default_rng(seed), 2.0, 0, [0, 0, 0]

    def loss(self, step, rate, phase):
        self.last, count = step, self.counts[phase]
        self.counts[phase] += 1
        self.level -= 0.006 * math.exp(-((math.log10(max(rate, 1e-12)) + 1.5) ** 2)) * self.level
        noise = 0.01 * self.random.standard_normal()
        if (phase, count) in ((TRAIN, 30), (TRAIN, 90), (FORK, 10)):
            return np.float32(math.nan)
        if (phase, count) in ((SWEEP, 5), (TRAIN, 31)):  # the latter right after a rollback
            return np.float32(math.inf)
        return np.float32(self.level + noise + (30.0 if phase == TRAIN and 50 <= count < 62 else 0.0))

    def metric(self):
        # After the last round it falls for a while, then rises for good.
        late = 0.02 * max(self.last - 930, 0) - 0.2 * (self.last > 890)
        return float(np.float32(self.level + late + 0.002 * self.random.standard_normal()))


def core_twin():
    core = atn.AutoTuneNet(SPACE, STEPS, initial=INITIAL, max_share=0.5)

    def observe_eval(ts, metric):
        """As a host does that has the measured state at hand."""
        return kept_at_once(core.observe_eval(ts, metric))[0]

    return core, jax.jit(core.update), jax.jit(core.hyperparams), jax.jit(observe_eval)


TWIN = core_twin()


def assert_alike(ours, theirs, step):
    """Whole numbers are the same, and others to rounding: two programs that were compiled apart."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=str(step))
        else:
            np.testing.assert_array_equal(a, b, err_msg=str(step))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_same_decisions_as_the_core(seed):
    core, update, hyperparams, observe_eval = TWIN
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.1))
    tuner = AutoTuneNet(SPACE, total_steps=STEPS, initial=INITIAL, max_share=0.5, seed=seed)
    tuner.attach(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    run, curve, seen = tuner._session, Curve(seed), []
    ts = observe_eval(core.init(jax.random.key(seed)), 2.0)
    tuner.validate(2.0)
    for step in range(STEPS):
        values = {name: float(value) for name, value in hyperparams(ts).items()}
        assert tuner.hyperparams == values, step
        before = int(ts.phase)
        loss = curve.loss(step, values["learning_rate"], before)
        ts, want = update(ts, loss)
        said = run.report(float(loss))
        want = jax.device_get(want)
        assert [int(x) for x in want] == [int(x) for x in said.directive], step
        seen.append((before, want))
        assert tuner.wants_validation == bool(want.evaluate)
        if tuner.wants_validation or (int(ts.phase) == 0 and step % EVAL_EVERY == 0):
            metric = curve.metric()
            tuner.validate(metric)
            ts = observe_eval(ts, metric)
        if step % 50 == 0 or step == STEPS - 1:
            assert_alike(ts, run.controller.state, step)
    assert {before for before, _ in seen} == {0, 1, 2}
    history = tuner.history
    kinds = [row["kind"] for row in history.rounds]
    assert len(kinds) >= 2 and set(kinds) == {"fast", "slow"}
    assert history.summary["rollbacks"] >= 1
    assert any(row["kind"] == "rollback" for row in history.events)
    assert int(ts.validation.retreats) >= 1
    for name in ("save", "restore", "keep", "adopt", "evaluate"):
        assert any(getattr(want, name) for _, want in seen), name
    # In training: back to a snapshot, and back to the state of the best metric.
    assert any(before == 0 and want.restore for before, want in seen)
    assert any(before == 0 and want.adopt and not want.outcome for before, want in seen)
