"""A run's schedules, replayed by a scheduler of PyTorch; both ways in of it give the same history."""

import json

import pytest

import autotunenet_jax as atn
from tests import history_fields

torch = pytest.importorskip("torch")

from autotunenet_torch import AutoTuneNet, Trainer, replay  # noqa: E402

SPACE = {"learning_rate": (1e-4, 1.0)}
STEPS = 160


def recorded(rates, name="learning_rate"):
    history = atn.History((name,))
    for step, rate in enumerate(rates, start=1):
        history.add({"step": step, "data_step": step, "loss": 0.0, name: rate})
    return history


def optimizer_of(*groups):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups])


def seen_by(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_a_scheduler_replays_a_history_and_keeps_proportions():
    history = recorded([0.1 / step for step in range(1, 21)])
    history.discard(4, 10)
    kept = [row["learning_rate"] for row in history.kept()]
    optimizer = optimizer_of({"lr": 0.5}, {"lr": 0.25})
    rates = seen_by(optimizer, replay(history, optimizer), len(kept))
    assert [rate for rate, _ in rates] == pytest.approx(kept, rel=1e-6)
    assert [rate for _, rate in rates] == pytest.approx([rate / 2 for rate in kept], rel=1e-6)


def test_a_scheduler_finds_its_group():
    optimizer = optimizer_of({"lr": 0.5, "name": "body"}, {"lr": 0.25, "name": "head"})
    rates = seen_by(optimizer, replay(recorded([0.1, 0.2], "head/learning_rate"), optimizer), 2)
    assert rates == [pytest.approx([0.5, 0.1]), pytest.approx([0.5, 0.2])]
    with pytest.raises(ValueError, match="no group of that name"):
        replay(recorded([0.1], "tail/learning_rate"), optimizer)
    with pytest.raises(ValueError, match="rate above 0"):
        replay(recorded([0.1]), optimizer_of({"lr": 0.0}))
    with pytest.raises(ValueError, match="no learning rate was tuned in this run, only weight_decay"):
        replay(recorded([0.1], "weight_decay"), optimizer)


def batch_of(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def model_of():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def loss_of(model, number):
    x, y = batch_of(number)
    return torch.nn.functional.cross_entropy(model(x), y)


@pytest.fixture(scope="module")
def run():
    """A loop of one's own: fresh batches, also in forks."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    tuner = AutoTuneNet(SPACE, total_steps=STEPS)
    held_out = [batch_of(10**6 + number) for number in range(4)]

    def validate():
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(model(x), y) for x, y in held_out]
        return sum(losses) / len(losses)

    tuner.attach(model, optimizer, validate=validate)
    for number in range(STEPS):
        loss = loss_of(model, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tuner.step(loss)
    return tuner.history


def test_it_is_the_history_that_fit_returns(run):
    history_fields.check(run)
    discarded, undone = history_fields.check_price(run)
    assert discarded > 0 and (undone > 0) == any(event["kind"] == "retreat" for event in run.events)
    assert not run.is_paired and "fresh data" in run.explain() and "Verdict: " in run.explain()


def test_a_replay_repeats_the_losses(run):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = replay(run, optimizer)
    kept = run.kept()
    assert 40 < len(kept) < STEPS
    for row in kept:
        loss = loss_of(model, row["step"] - 1)
        assert loss.item() == pytest.approx(row["loss"], rel=1e-3, abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def test_from_disk_it_gives_equal_pictures(run, tmp_path):
    pytest.importorskip("matplotlib")
    again = atn.History.from_dict(json.loads(json.dumps(run.to_dict(), allow_nan=False)))
    run.plot(tmp_path / "a.png")
    again.plot(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert again.explain() == run.explain()


@pytest.mark.filterwarnings("ignore:The best learning_rate lies at")
def test_the_trainer_gives_it_too(loader):
    model = torch.nn.Linear(6, 3)
    trainer = Trainer(torch.nn.functional.cross_entropy, torch.optim.AdamW, epochs=15, progress=False)
    history = trainer.fit(model, loader, loader, tuner=AutoTuneNet(SPACE))
    history_fields.check(history)
    assert history.is_paired and "the same data" in history.explain()
