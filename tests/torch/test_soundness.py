"""No copy holds numbers that are not finite, and a run ends no worse than it was measured."""

import math

import pytest

torch = pytest.importorskip("torch")

from autotunenet_torch import AutoTuneNet, TrainingState  # noqa: E402
from autotunenet_torch.soundness import Soundness  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The best learning_rate lies at")
STEPS = 200


class Net(torch.nn.Module):
    """With a mask that is infinite on purpose, and a statistic that nothing reads."""

    def __init__(self):
        super().__init__()
        self.norm, self.line = torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("idle", torch.ones(2))

    def forward(self, x):
        return self.line(self.norm(x))


def loss_of(model, x):
    return torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))


def held_out(model):
    torch.manual_seed(99)
    was = model.training
    with torch.no_grad():
        value = float(loss_of(model.eval(), torch.randn(400, 6)))
    model.train(was)
    return value


def run(*, faults, validates=False, total=STEPS, **options):
    """``faults`` maps steps to what is done to the model and the optimizer after that step."""
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, **options)
    rng = torch.Generator().manual_seed(4)

    def validate():
        return held_out(model)

    tuner.attach(model, optimizer, total_steps=total, validate=validate if validates else None)
    for step in range(total):
        loss = loss_of(model, torch.randn(24, 6, generator=rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in faults:
            with torch.no_grad():
                faults[step](model, optimizer)
        tuner.step(loss)
    return model, optimizer, tuner


def infinite_statistic(model, optimizer):
    model.idle.fill_(math.inf)


def infinite_moment(model, optimizer):
    optimizer.state[model.line.weight]["exp_avg_sq"].fill_(math.inf)


def far_too_long(model, optimizer):
    model.line.weight.mul_(-3e4)


@pytest.mark.parametrize("fault", [infinite_statistic, infinite_moment])
@pytest.mark.parametrize("at", [50, 130, STEPS - 1])
def test_damage_that_no_loss_tells_of_is_put_back(fault, at):
    model, optimizer, tuner = run(faults={at: fault})
    assert model.idle.isfinite().all() and held_out(model) < 0.5
    assert all(v.isfinite().all() for state in optimizer.state.values() for v in state.values())
    events = [event for event in tuner.history.events if event["kind"] == "rollback"]
    # At 50 it strikes a fork, which may be lost in any case.
    assert len(events) == 1 or at == 50
    assert all("not finite" in event["message"] for event in events)
    assert model.mask.isinf().any()


def test_the_tuner_hears_that_a_state_was_not_fit_to_be_copied():
    _, _, tuner = run(faults={130: infinite_moment})
    state = tuner._session.controller.state
    assert int(state.health.bad_steps) == 1


@pytest.mark.parametrize(("fault", "before", "validates"), [(infinite_moment, 1, False), (infinite_statistic, 6, True)])
def test_a_fork_that_damage_met_is_tried_again(fault, before, validates):
    _, _, whole = run(faults={}, validates=validates)
    fork = whole.history.rounds[0]["forks"][1]
    _, _, tuner = run(faults={fork["end"] - before: fault}, validates=validates)
    again = tuner.history.rounds[0]["forks"][1]
    assert again["status"] != "failed" and again["hyperparams"] == fork["hyperparams"]
    assert [event["step"] for event in tuner.history.events if event["kind"] == "retry"] == [fork["end"]]


@pytest.mark.parametrize("at", [STEPS - 1, STEPS - 2])
def test_a_last_step_that_wrecks_the_model_is_measured(at):
    model, _, _ = run(faults={at: far_too_long}, validates=True)
    assert held_out(model) < 0.5


def test_the_end_is_the_best_that_was_measured():
    """What is kept is the state that was measured, not the one a step later."""
    shake = {step: lambda model, _: model.line.weight.mul_(0.5) for step in range(121, STEPS, 10)}
    model, _, tuner = run(faults=shake, validates=True, decay="none")
    best = min(entry["value"] for entry in tuner.history.evals if entry["is_settled"])
    assert held_out(model) <= best + 1e-6


def test_a_buffer_that_is_always_broken_again_is_the_users_affair():
    model = Net()
    soundness = Soundness(TrainingState(model, torch.optim.SGD(model.parameters(), 0.1)))
    assert soundness.may_copy()
    model.idle.fill_(math.inf)
    assert soundness.damage() == ([], ["idle"]) and not soundness.may_copy()
    assert soundness.may_copy()  # put back by its owner again
    model.line.weight.data[0, 0] = math.nan
    assert soundness.damage()[0] == ["line.weight"]
    assert not soundness.may_copy() and not soundness.may_copy()


@pytest.mark.parametrize("measures", [True, False])
@pytest.mark.parametrize("stop_at", [125, 155])
def test_a_run_that_is_ended_early_is_in_the_best_state_that_was_measured(stop_at, measures):
    """With a function that measures the last state too, and with metrics that are reported from time to time."""
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rng = torch.Generator().manual_seed(4)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, decay="none")
    tuner.attach(model, optimizer, total_steps=STEPS, validate=(lambda: held_out(model)) if measures else None)
    moments = {}
    for step in range(1, stop_at + 1):
        loss = loss_of(model, torch.randn(24, 6, generator=rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > stop_at - 20:
            with torch.no_grad():
                model.line.weight.mul_(0.9)
        moments[held_out(model)] = [state["exp_avg"].clone() for state in optimizer.state.values()]
        if not measures and (tuner.wants_validation or step % 10 == 0):
            tuner.validate(held_out(model))
        tuner.step(loss)
    spoilt = held_out(model)
    tuner.finish()
    best = min(entry["value"] for entry in tuner.history.evals if entry["is_settled"])
    # Forks that were kept are measured too.
    assert held_out(model) <= best < spoilt - 0.01
    event = tuner.history.events[-1]
    assert event["kind"] == "retreat" and "ends in its best state" in event["message"]
    now = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(map(torch.equal, moments[held_out(model)], now))
    assert tuner.history.kept()[-1]["step"] == int(event["message"].split("step ")[1].rstrip("."))
