"""How a run ends, goes back to its best state, and is carried over to another process."""

import io
import math

import pytest

torch = pytest.importorskip("torch")

from autotunenet_torch import AutoTuneNet  # noqa: E402

SPACE = {"learning_rate": (1e-4, 1.0)}
STEPS = 200


def make(steps=STEPS):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    tuner = AutoTuneNet(SPACE, total_steps=steps)
    tuner.attach(model, optimizer)
    return model, optimizer, tuner


def train_one(model, optimizer, tuner, *, told=None):
    x = torch.randn(16, 6)
    loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    tuner.step(loss if told is None else told)
    return float(loss.detach())


def spoil(model):
    with torch.no_grad():
        model[0].weight.fill_(math.nan)


def train_to(phase, model, optimizer, tuner):
    while tuner._session.controller.phase != phase:
        train_one(model, optimizer, tuner)


def test_ended_inside_a_sweep_it_is_back_where_the_sweep_began(bits):
    model, optimizer, tuner = make()
    begin = bits(model.state_dict())
    assert tuner._session.controller.phase == 1
    for _ in range(4):
        train_one(model, optimizer, tuner)
    assert bits(model.state_dict()) != begin
    tuner.finish()
    assert bits(model.state_dict()) == begin
    history = tuner.history
    assert [row["is_kept"] for row in history.records] == [False] * 4
    assert history.summary["discarded_steps"] == 4


def test_ended_inside_a_fork_the_history_says_which_steps_are_left():
    model, optimizer, tuner = make()
    while not (tuner._session.controller.phase == 2 and int(tuner._session.controller.state.round.kept) >= 0):
        train_one(model, optimizer, tuner)
    train_one(model, optimizer, tuner)
    kept = tuner._session.kept
    tuner.finish()
    assert torch.equal(model[0].weight, kept["training"]["model"]["0.weight"])
    assert tuner.hyperparams["learning_rate"] == kept["values"]["learning_rate"] == optimizer.param_groups[0]["lr"]
    records = tuner.history.records
    assert not records[-1]["is_kept"] and any(row["is_kept"] for row in records)


def test_a_last_step_that_breaks_the_model_is_undone():
    model, optimizer, tuner = make()
    weights, rates = [], []
    for _ in range(STEPS - 1):
        train_one(model, optimizer, tuner)
        weights.append(model[0].weight.detach().clone())
        rates.append(optimizer.param_groups[0]["lr"])
    spoil(model)
    tuner.step(0.5)  # the loss of the step that broke it was measured before
    last = tuner.history.events[-1]
    assert last["kind"] == "rollback" and "state was not finite" in last["message"]
    # It is in the state that it is said to be in, and at the rate that the schedule ends at, not at that state's.
    back = int(last["message"].split("step ")[1].split()[0])
    assert torch.equal(model[0].weight, weights[back - 1]) and rates[back - 1] > 0.0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == tuner.hyperparams["learning_rate"] == pytest.approx(0.0, abs=1e-6)


def test_goes_back_to_the_best_state_when_validation_rises(bits):
    model, optimizer, tuner = make(400)
    train_to(0, model, optimizer, tuner)
    returned, lowered, level, last = None, None, 1.0, 100
    for count in range(400 - tuner._session.controller.step):
        x = torch.randn(16, 6)
        loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        level *= 0.995
        before = tuner.best_hyperparams["learning_rate"]
        kept = tuner._session.kept
        tuner.step(level)
        stepped = tuner.best_hyperparams["learning_rate"]
        if count > last and stepped < 0.9 * before:
            pytest.fail("a rate is lowered by the metric, not by the loss")
        if (
            returned is None
            and count > last
            and bits(model.state_dict()) == bits({name: kept["training"]["model"][name] for name in model.state_dict()})
        ):
            returned = count
        if count % 10 == 0:
            # Falls for a while, then rises while the training loss goes on falling.
            tuner.validate(1.0 - 0.01 * count if count <= last else 0.01 * (count - last))
            if tuner.best_hyperparams["learning_rate"] < 0.9 * stepped:
                lowered = lowered or count
                assert tuner.best_hyperparams["learning_rate"] == pytest.approx(10**-0.5 * stepped)
                assert optimizer.param_groups[0]["lr"] < 0.4 * stepped
    # Two readings above the lowest, 5 % of the budget apart, and one of the cooled state.
    assert returned is not None and returned <= last + 65 and lowered == returned - 1


def test_a_run_whose_last_metric_is_bad_ends_in_the_best_state(bits):
    model, optimizer, tuner = make(400)
    train_to(0, model, optimizer, tuner)
    level = 1.0
    for count in range(400 - tuner._session.controller.step):
        train_one(model, optimizer, tuner, told=level)
        level *= 0.995
        if count % 40 == 0:
            tuner.validate(level)
    tuner.finish()
    kept = tuner._session.kept
    best = bits({name: kept["training"]["model"][name] for name in model.state_dict()})
    assert bits(model.state_dict()) != best
    tuner.validate(3.0)
    assert bits(model.state_dict()) == best
    assert "ends in the best state" in tuner.history.events[-1]["message"]


def test_a_checkpoint_keeps_the_best_state_and_the_totals(bits):
    model, optimizer, tuner = make(400)
    while len(tuner.history.rounds) < 2:
        train_one(model, optimizer, tuner)
    for count in range(41):
        train_one(model, optimizer, tuner)
        if count % 10 == 0:
            tuner.validate(1.0 - 0.01 * count if count < 40 else 2.0)
    run = tuner._session
    assert bool(run.controller.state.validation.is_kept)
    file = io.BytesIO()
    torch.save(tuner.state_dict(), file)
    file.seek(0)
    _, _, other = make(400)
    other.load_state_dict(torch.load(file, weights_only=True))
    kept = bits(run.kept["training"]["model"])
    assert bits(other._session.kept["training"]["model"]) == kept != bits(model.state_dict())
    assert other.history.summary == tuner.history.summary
    assert other.history.summary["discarded_steps"] > 0
    assert other._session.last_eval == 2.0
